"""Tokenizers of Hugging Face folders: opened and checked before any tensor is read."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooer_jax.text.tokenizer import Tokenizer

from ..core.errors import Problems
from ..core.folders import copier
from ..core.kind import Writer
from ..readers import ReadError, check_file, read_object
from ..readers.gguf_tokens import byte_level_bpe

FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
)
# Slow tokenizers that are converted: model_type -> (tokenizer_class, pre-tokenizer).
_SLOW = {"qwen2": ("Qwen2Tokenizer", "qwen2"), "llama": ("GPT2Tokenizer", "gpt-2")}
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def open_tokenizer(folder: Path, problems: Problems, *, model_type: str) -> Writer | None:
  """Opens the tokenizer of a model folder.

  Args:
    folder: with tokenizer.json or tokenizer.model; or with the files of a slow tokenizer,
      vocab.json and merges.txt, which are converted.
    problems: receives the reason if there is no tokenizer, or it cannot be read.
    model_type: "qwen2" or "llama".

  Returns:
    A function that writes the tokenizer's files; None if there was a problem.
  """
  files = [folder / name for name in FILES if (folder / name).is_file()]
  names = {file.name for file in files}
  try:
    for file in files:
      check_file(file)
    if names & {"tokenizer.json", "tokenizer.model"}:
      return copier(files)
    if names >= {"vocab.json", "merges.txt"}:
      converted = _convert_slow(folder, model_type)

      def write(target: Path) -> None:
        copier(files)(target)
        converted.save(str(target / "tokenizer.json"))

      return write
  except (ReadError, UnicodeDecodeError) as error:
    problems.add(str(error) if isinstance(error, ReadError) else f"{folder}: {error}")
    return None
  problems.add(
    f"{folder}: no tokenizer; download tokenizer.json (or tokenizer.model, or vocab.json and"
    " merges.txt) and tokenizer_config.json into it"
  )
  return None


def read_tokenizer(write: Writer) -> Tokenizer:
  """Reads the tokenizer that `write` writes.

  Raises:
    FileNotFoundError, ValueError: if it cannot be used.
  """
  with tempfile.TemporaryDirectory() as folder:
    write(Path(folder))
    try:
      return Tokenizer.from_folder(folder)
    except (ValueError, OSError) as error:
      raise ValueError(f"the LLM's folder: {str(error).replace(f'{folder}/', '')}") from error


def check_tokenizer(write: Writer, vocab: int, problems: Problems) -> None:
  """Adds a problem if the tokenizer cannot be read, or has more tokens than the embedding rows."""
  try:
    tokenizer = read_tokenizer(write)
  except ValueError as error:
    problems.add(str(error))
    return
  if tokenizer.vocab_size > vocab:
    problems.add(
      f"the LLM's tokenizer has {tokenizer.vocab_size} tokens, its embedding {vocab} rows; take the"
      " tokenizer of this model"
    )


def _convert_slow(folder: Path, model_type: str) -> Any:
  """Makes the fast tokenizer of vocab.json and merges.txt, as transformers does."""
  from tokenizers import AddedToken

  config_file = folder / "tokenizer_config.json"
  config = read_object(config_file) if config_file.is_file() else {}
  known, pre_tokenizer = _SLOW[model_type]
  name = config.get("tokenizer_class", known)
  if name.removesuffix("Fast") != known:
    raise ReadError(
      f"{folder}: the slow tokenizer {name} of a {model_type} cannot be converted, only {known};"
      " write tokenizer.json with transformers: AutoTokenizer.from_pretrained(folder)"
      ".save_pretrained(folder)"
    )
  vocabulary = read_object(folder / "vocab.json")
  if odd := [token for token, index in vocabulary.items() if type(index) is not int]:
    raise ReadError(f"{folder / 'vocab.json'}: the id of {odd[0]!r} is {vocabulary[odd[0]]!r}")
  merges = []
  lines = (folder / "merges.txt").read_text("utf-8").split("\n")
  for number, line in enumerate(lines, 1):
    if not line or (number == 1 and line.startswith("#version")):
      continue
    first, _, second = line.partition(" ")
    if not {first, second, first + second} <= vocabulary.keys():
      raise ReadError(f"{folder / 'merges.txt'}:{number}: {line!r} is not a merge of two tokens")
    merges.append((first, second))
  try:
    added = _added_tokens(folder, config, vocabulary)
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    raise ReadError(f"{folder}: added tokens that cannot be read: {error!r}") from error
  tokenizer = byte_level_bpe(
    vocabulary,
    merges,
    pre_tokenizer=pre_tokenizer,
    added=[AddedToken(token, **options) for token, (_, options) in added.items()],
    add_prefix_space=bool(config.get("add_prefix_space", False)),
  )
  for token, (index, _) in added.items():
    if tokenizer.token_to_id(token) != index:
      raise ReadError(
        f"{folder}: the added token {token!r} has id {index}, but comes to"
        f" {tokenizer.token_to_id(token)} after the {len(vocabulary)} tokens of vocab.json"
      )
  return tokenizer


def _added_tokens(
  folder: Path, config: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> dict[str, tuple[int, dict]]:
  """Token -> (id, options of AddedToken), in the order of ids."""
  found: dict[str, tuple[int, dict]] = {}
  for index, entry in config.get("added_tokens_decoder", {}).items():
    options = {key: bool(value) for key, value in entry.items() if key != "content"}
    found[entry["content"]] = (int(index), options)
  # Older versions of transformers saved these files instead.
  file = folder / "added_tokens.json"
  ids = {**vocabulary, **(read_object(file) if file.is_file() else {})}
  special = {_text(config.get(name)) for name in _NAMED}
  special |= {_text(entry) for entry in config.get("additional_special_tokens") or ()}
  for token, index in ids.items():
    if token in special or token not in vocabulary:
      found.setdefault(token, (int(index), {"normalized": False, "special": token in special}))
  return dict(sorted(found.items(), key=lambda item: item[1][0]))


def _text(entry: Any) -> str | None:
  return entry.get("content") if isinstance(entry, dict) else entry
