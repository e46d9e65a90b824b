"""Tokenizers of Hugging Face folders: opened and checked before any tensor is read."""

import tempfile
from pathlib import Path
from typing import Any

from mooer_jax.text.tokenizer import Tokenizer

from ..core.errors import ConversionError
from ..core.folders import copier
from ..core.kind import Writer
from ..readers import ReadError, check_file, read_object

FILES = (
  "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model",
  "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Slow tokenizers that are converted, by model_type.
_SLOW = {"qwen2": "Qwen2Tokenizer", "llama": "GPT2Tokenizer"}


def open_tokenizer(folder: Path, *, model_type: str) -> Writer:
  """Opens the tokenizer of a model folder, and returns a function that writes its files.

  vocab.json and merges.txt, of a slow tokenizer, are converted. Raises ConversionError if there is
  no tokenizer, or it cannot be read.
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
  except ReadError as error:
    raise ConversionError(str(error)) from error
  raise ConversionError(
    f"{folder}: no tokenizer; download tokenizer.json (or tokenizer.model, or vocab.json and"
    " merges.txt) and tokenizer_config.json into it"
  )


def read_tokenizer(write: Writer) -> Tokenizer:
  """Reads the tokenizer that `write` writes. Raises ValueError if it cannot be used."""
  with tempfile.TemporaryDirectory() as folder:
    write(Path(folder))
    try:
      return Tokenizer.from_folder(folder)
    except (ValueError, OSError) as error:
      raise ValueError(f"the LLM's folder: {str(error).replace(f'{folder}/', '')}") from error


def check_tokenizer(write: Writer, vocab: int) -> None:
  """Raises ValueError if it cannot be read, or has more tokens than the embedding has rows."""
  tokenizer = read_tokenizer(write)
  if tokenizer.vocab_size > vocab:
    raise ConversionError(
      f"the LLM's tokenizer has {tokenizer.vocab_size} tokens, its embedding {vocab} rows; take the"
      " tokenizer of this model"
    )


def _convert_slow(folder: Path, model_type: str) -> Any:
  """Makes a `tokenizers.Tokenizer` of vocab.json and merges.txt, by transformers.

  Raises ReadError if transformers cannot read them, or gives an added token another id.
  """
  import transformers

  file = folder / "tokenizer_config.json"
  config = read_object(file) if file.is_file() else {}
  known = _SLOW[model_type]
  name = config.get("tokenizer_class", known)
  if name.removesuffix("Fast") != known:
    raise ReadError(
      f"{folder}: the slow tokenizer {name} of a {model_type} cannot be converted, only {known};"
      " run transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )
  try:
    made = getattr(transformers, f"{known}Fast").from_pretrained(folder, local_files_only=True)
    added = {e["content"]: int(n) for n, e in config.get("added_tokens_decoder", {}).items()}
  except Exception as error:  # of tokenizers, which raises plain Exception, or of any odd entry
    raise ReadError(
      f"{folder}: not a slow tokenizer that transformers can read: {error}"
    ) from error
  file = folder / "added_tokens.json"  # of older versions of transformers
  added |= read_object(file) if file.is_file() else {}
  for token, index in added.items():
    if (found := made.convert_tokens_to_ids(token)) != index:
      raise ReadError(f"{folder}: the added token {token!r} has id {index}, but becomes {found}")
  return made.backend_tokenizer
