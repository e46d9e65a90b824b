"""The tokenizer of the language model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

QWEN2_SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
QWEN2_EOS = "<|im_end|>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_TOKENIZER_FILE = "tokenizer.json"
_SENTENCEPIECE_FILE = "tokenizer.model"
_ADDED_FILE = "added_tokens.json"
_CONFIG_FILE = "tokenizer_config.json"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Tokenizer:
  """Convert between text and token ids with a `tokenizer.json` or a `tokenizer.model`.

  Create one with `from_folder` or `from_characters`. It can be pickled for data workers.

  Attributes:
    vocab_size: the largest id plus one, the minimum number of rows of the embedding.
    eos_id: id of the token that ends an answer.
  """

  def __init__(self, model, config: dict, eos: str):
    # A folder saved after padded or truncated calls keeps those settings, which would truncate
    # transcripts silently.
    model.no_truncation()
    model.no_padding()
    self._model = model
    self._config = {**config, "eos_token": eos}
    self._vocabulary = model.get_vocab(with_added_tokens=True)
    self._known = frozenset(self._vocabulary.values())
    self.vocab_size = max(self._known) + 1
    self._specials = [t.content for t in model.get_added_tokens_decoder().values()]
    # A word-level model has no byte fallback, so each character must be in its vocabulary.
    self._per_character = type(model.model).__name__ == "WordLevel"
    self.eos_id = self.token_id(eos)

  def __reduce__(self):
    return Tokenizer, (self._model, self._config, self._config["eos_token"])

  @classmethod
  def from_folder(cls, path: str | Path, *, eos: str | None = None) -> Tokenizer:
    """Read the tokenizer of a Hugging Face model folder or of a checkpoint's `tokenizer/`.

    Args:
      path: folder with `tokenizer.json` and `tokenizer_config.json`; or with LLaMA's
        `tokenizer.model` (SentencePiece), where those two and `added_tokens.json` may be absent.
      eos: token that ends an answer; default: `eos_token` of `tokenizer_config.json`
        (`<|im_end|>` in Qwen2-Instruct), or that of the `tokenizer.model`. The further ids in
        `generation_config.json` are not used: they do not end an answer in MooER.

    Raises:
      FileNotFoundError: if the folder or a required file is missing.
      ValueError: if a file cannot be read, no eos is defined, or the two files disagree on an id.
    """
    import tokenizers

    folder = Path(path)
    if folder.is_file():
      raise ValueError(f"{folder}: is a file; name the folder of the tokenizer")
    if not folder.is_dir():
      raise FileNotFoundError(f"{folder}: no such tokenizer folder")
    for name in (_TOKENIZER_FILE, _SENTENCEPIECE_FILE, _ADDED_FILE, _CONFIG_FILE):
      if (folder / name).is_file() and (folder / name).read_bytes().startswith(_LFS_POINTER):
        raise ValueError(f"{folder / name}: a Git LFS pointer: run git lfs pull")
    config_file, file = folder / _CONFIG_FILE, folder / _TOKENIZER_FILE
    if file.is_file():
      config = _read_config(config_file, needed=eos is None)
      try:
        model = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
      except Exception as error:  # the package raises plain Exception for every problem
        raise ValueError(f"{file}: not a tokenizer.json that can be read: {error}") from error
    elif (folder / _SENTENCEPIECE_FILE).is_file():
      model, config = _from_sentencepiece(folder, _read_config(config_file))
    else:
      raise FileNotFoundError(
        f"{file}: not found, nor {_SENTENCEPIECE_FILE}. Write one with transformers: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
      )
    _check_added_tokens(model, config, folder)
    eos = eos or _token_text(config.get("eos_token"))
    if not eos:
      raise ValueError(
        f'{folder / _CONFIG_FILE}: no "eos_token"; set it (Qwen2: {QWEN2_EOS!r}) or pass eos='
      )
    return cls(model, config, eos)

  @classmethod
  def from_characters(
    cls,
    characters: Iterable[str],
    specials: Sequence[str] = QWEN2_SPECIALS,
    *,
    eos: str = QWEN2_EOS,
  ) -> Tokenizer:
    """Create a small tokenizer with one token per character, for tiny models and tests.

    Ids: the distinct characters in code point order from 0, then the specials as given. It has no
    byte fallback and no unknown token, so `encode` raises for other characters.

    Args:
      characters: the characters, including those of the prompt template.
      specials: special tokens, which are matched before the text is split into characters.
      eos: one of the specials.

    Raises:
      ValueError: if an item of `characters` is not one character, the specials are empty or not
        distinct from each other and the characters, or eos is not one of them.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Model

    letters = sorted(set(characters))
    if wrong := [item for item in letters if len(item) != 1]:
      raise ValueError(f"characters must be one character each, got {wrong[0]!r}")
    names = [*letters, *specials]
    if len(set(names)) != len(names) or "" in names:
      raise ValueError(
        f"specials {tuple(specials)} must be distinct, not empty and none of the characters"
      )
    if eos not in specials:
      raise ValueError(f"eos {eos!r} is not among the specials {tuple(specials)}")
    model = Model(models.WordLevel({name: i for i, name in enumerate(names)}))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), behavior="isolated")
    model.decoder = decoders.Fuse()
    model.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return cls(model, {"tokenizer_class": "PreTrainedTokenizerFast"}, eos)

  @property
  def bos_ids(self) -> list[int]:
    """Ids before every text: [BOS] for LLaMA, [] for Qwen2.

    Set by `add_bos_token` of the config, else by the tokenizer's own post-processor.
    """
    bos = _token_text(self._config.get("bos_token"))
    added = self._config.get("add_bos_token")
    if added is None:
      bos_id = None if bos is None else self._vocabulary.get(bos)
      return [i for i in self._model.encode("", add_special_tokens=True).ids if i == bos_id]
    return [self.token_id(bos)] if added and bos else []

  def vocabulary(self) -> dict[str, int]:
    """Return {token: id}, special tokens included."""
    return dict(self._vocabulary)

  def encode(self, text: str) -> list[int]:
    """Return the ids of `text`. Special tokens in it become their ids; none is added.

    Raises ValueError if a character-level tokenizer does not have a character.
    """
    if self._per_character:
      self._check_characters(text)
    return self._model.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Return the text of `ids`.

    Ids outside the vocabulary (Qwen2 pads its embedding) and invalid UTF-8 become U+FFFD. Negative
    ids, which mark padding in this library, raise ValueError.
    """
    pieces, run = [], []
    for i in (int(i) for i in ids):
      if i < 0:
        raise ValueError(f"token id {i} is padding; remove it before decoding")
      if i in self._known:
        run.append(i)
      else:
        pieces += [self._model.decode(run, skip_special_tokens=skip_special), REPLACEMENT]
        run = []
    return "".join(pieces) + self._model.decode(run, skip_special_tokens=skip_special)

  def token_id(self, token: str) -> int:
    """Return the id of one token; raises ValueError if it is not in the vocabulary."""
    if token not in self._vocabulary:
      raise ValueError(
        f"token {token!r} is not in the vocabulary of {len(self._vocabulary)} tokens; its special"
        f" tokens are {self._specials[:8]}"
      )
    return self._vocabulary[token]

  def with_special_tokens(self, names: Sequence[str]) -> Tokenizer:
    """A tokenizer with further special tokens, whose ids follow the largest one in order.

    Raises ValueError if it has one of them already, or a name is given twice.
    """
    import tokenizers

    if known := [name for name in names if name in self._vocabulary]:
      raise ValueError(f"the tokenizer already has the token {known[0]!r}")
    model = tokenizers.Tokenizer.from_str(self._model.to_str())
    model.add_special_tokens(
      [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
    )
    larger = Tokenizer(model, self._config, self._config["eos_token"])
    ids = [larger._vocabulary.get(name) for name in names]
    if ids != [*range(self.vocab_size, self.vocab_size + len(names))]:
      raise ValueError(
        f"the new tokens {names[0]!r}, … get the ids {ids[:3]}, … instead of those from"
        f" {self.vocab_size} on: a name is given twice, or ids are unused"
      )
    return larger

  def save(self, folder: str | Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `from_folder` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._model.save(str(folder / _TOKENIZER_FILE))
    text = json.dumps(self._config, ensure_ascii=False, indent=2, sort_keys=True)
    (folder / _CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

  def _check_characters(self, text):
    plain = text
    for special in self._specials:
      plain = plain.replace(special, "")
    for character in plain:
      if character not in self._vocabulary:
        raise ValueError(
          f"{character!r} (U+{ord(character):04X}) in {text[:60]!r} is not in the tokenizer's"
          " characters; a model that is trained from scratch has those of config.characters"
        )


def _from_sentencepiece(folder: Path, config: dict):
  """Return the tokenizer of `tokenizer.model` with its added tokens, and its config."""
  from tokenizers import AddedToken

  from mooer_jax.text import sentencepiece

  file = folder / _SENTENCEPIECE_FILE
  pieces = sentencepiece.read_model(file)
  try:
    model = sentencepiece.build_tokenizer(pieces, legacy=config.get("legacy") is not False)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
  added = {int(n): (token, False) for token, n in _read_config(folder / _ADDED_FILE).items()}
  for n, entry in config.get("added_tokens_decoder", {}).items():
    added[int(n)] = (_token_text(entry), isinstance(entry, dict) and bool(entry.get("special")))
  for index, (token, special) in sorted(added.items()):
    model.add_tokens([AddedToken(token, normalized=False, special=special)])
    if model.token_to_id(token) != index:
      raise ValueError(
        f"{folder}: the added token {token!r} must have the id {index}, but gets"
        f" {model.token_to_id(token)} after the {len(pieces.pieces)} pieces of"
        f" {_SENTENCEPIECE_FILE}; correct {_ADDED_FILE} or {_CONFIG_FILE}"
      )
  own = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": pieces.bos,
    "eos_token": pieces.eos,
    "add_bos_token": True,  # as transformers' LlamaTokenizer
  }
  return model, {**own, **config}


def _read_config(file: Path, *, needed: bool = False) -> dict:
  if not file.is_file():
    if needed:
      raise FileNotFoundError(
        f"{file}: not found, so the end-of-text token is unknown; add the file, or pass eos="
        f" (Qwen2: {QWEN2_EOS!r})"
      )
    return {}
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file}: not JSON: {error}") from error
  if not isinstance(config, dict):
    raise ValueError(f"{file}: must hold a JSON object, got {type(config).__name__}")
  return config


def _token_text(entry) -> str | None:
  return entry.get("content") if isinstance(entry, dict) else entry


def _check_added_tokens(model, config: dict, folder: Path) -> None:
  for index, entry in config.get("added_tokens_decoder", {}).items():
    token = _token_text(entry)
    if model.token_to_id(token) != int(index):
      raise ValueError(
        f"{folder}: token {token!r} has the id {index} in {_CONFIG_FILE}, but"
        f" {model.token_to_id(token)} in the tokenizer; save the folder again with transformers"
      )
