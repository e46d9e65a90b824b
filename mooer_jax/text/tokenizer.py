"""The language model's tokenizer behind one small face."""

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


class Tokenizer:
  """Turns text into ids and back with a Hugging Face `tokenizer.json` or a `tokenizer.model`.

  Make one with `from_folder` or `from_characters`. It can be pickled, so data workers may hold it.
  """

  def __init__(self, model, config: dict, eos: str):
    # A folder saved after padded or truncated calls keeps those settings; here they would cut
    # transcripts without a word.
    model.no_truncation()
    model.no_padding()
    self._model = model
    self._config = {**config, "eos_token": eos}
    self._vocabulary = model.get_vocab(with_added_tokens=True)
    self._known = frozenset(self._vocabulary.values())
    self._vocab_size = max(self._known) + 1
    self._specials = [t.content for t in model.get_added_tokens_decoder().values()]
    # A word-level model has no bytes to fall back to, so each character must be in it.
    self._per_character = type(model.model).__name__ == "WordLevel"
    self.eos_id = self.token_id(eos)

  def __reduce__(self):
    return Tokenizer, (self._model, self._config, self._config["eos_token"])

  @classmethod
  def from_folder(cls, path: str | Path, *, eos: str | None = None) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face model folder or of a checkpoint's `tokenizer/`.

    Args:
      path: folder with `tokenizer.json` and `tokenizer_config.json`; or with LLaMA's
        `tokenizer.model` (SentencePiece), where those two and `added_tokens.json` may be absent.
      eos: token that ends an answer; by default `eos_token` of `tokenizer_config.json`, which is
        then needed (`<|im_end|>` in Qwen2-Instruct; a `tokenizer.model` names its own).
        `generation_config.json` plays no part: it lists further ids which do not end an answer in
        MooER.

    Raises:
      FileNotFoundError: if the folder or a needed file is missing.
      ValueError: if a file cannot be read, names no eos, or the two files disagree on an id.
    """
    import tokenizers

    folder = Path(path)
    if not folder.is_dir():
      raise FileNotFoundError(f"{folder}: no such tokenizer folder")
    config_file, file = folder / _CONFIG_FILE, folder / _TOKENIZER_FILE
    if file.is_file():
      config = _read_config(config_file, needed=eos is None)
      try:
        model = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
      except Exception as error:  # the package raises plain Exception for whatever is wrong
        raise ValueError(f"{file}: not a tokenizer.json that can be read: {error}") from error
    elif (folder / _SENTENCEPIECE_FILE).is_file():
      model, config = _from_sentencepiece(folder, _read_config(config_file, needed=False))
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
    """Makes a small tokenizer with one token a character, for tiny models and tests.

    Ids: the distinct characters in code point order from 0, then the specials as given. It has no
    bytes and no unknown token, so `encode` refuses a character it does not hold.

    Args:
      characters: the characters; those of the prompt template belong in it too.
      specials: tokens found whole in a text before it is cut into characters.
      eos: one of the specials.

    Raises:
      ValueError: if an item is not a single character, a special is given twice or is itself a
        character, or eos is not a special.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Model

    letters = sorted(set(characters))
    if wrong := [item for item in letters if len(item) != 1]:
      raise ValueError(f"characters must be one character each, got {wrong[0]!r}")
    names = [*letters, *specials]
    if len(set(names)) != len(names) or "" in names:
      raise ValueError(
        f"specials {tuple(specials)} must be distinct and no single character of the vocabulary"
      )
    if eos not in specials:
      raise ValueError(f"eos {eos!r} is not among the specials {tuple(specials)}")
    model = Model(models.WordLevel({name: i for i, name in enumerate(names)}))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), behavior="isolated")
    model.decoder = decoders.Fuse()
    model.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return cls(model, {"tokenizer_class": "PreTrainedTokenizerFast"}, eos)

  @property
  def vocab_size(self) -> int:
    """The greatest id plus one; an embedding needs at least so many rows (it may have more)."""
    return self._vocab_size

  @property
  def bos_ids(self) -> list[int]:
    """What leads every text: [the BOS of LLaMA], or nothing in Qwen2.

    `add_bos_token` of the config says so; without it, the tokenizer's own post-processor.
    """
    bos = _token_text(self._config.get("bos_token"))
    added = self._config.get("add_bos_token")
    if added is None:
      bos_id = None if bos is None else self._vocabulary.get(bos)
      return [i for i in self._model.encode("", add_special_tokens=True).ids if i == bos_id]
    return [self.token_id(bos)] if added and bos else []

  def vocabulary(self) -> dict[str, int]:
    """Token to id, the special ones included."""
    return dict(self._vocabulary)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`; special tokens written in it become their ids, none is added.

    Raises:
      ValueError: if a character-level tokenizer lacks a character.
    """
    if self._per_character:
      self._check_characters(text)
    return self._model.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Returns the text of `ids`.

    An id that the embedding has but the vocabulary lacks (Qwen2 pads its table) and bytes that are
    not UTF-8 become U+FFFD, so that they are seen rather than lost.

    Raises:
      ValueError: if an id is negative, which is how this library marks padding.
    """
    pieces, run = [], []
    for i in (int(i) for i in ids):
      if i < 0:
        raise ValueError(f"token id {i} is padding, not a token; cut it off before decoding")
      if i in self._known:
        run.append(i)
      else:
        pieces += [self._model.decode(run, skip_special_tokens=skip_special), REPLACEMENT]
        run = []
    return "".join(pieces) + self._model.decode(run, skip_special_tokens=skip_special)

  def token_id(self, token: str) -> int:
    """Returns the id of one token, spelt as in the vocabulary.

    Raises:
      ValueError: if the vocabulary has no such token.
    """
    if token not in self._vocabulary:
      raise ValueError(
        f"token {token!r} is not in the vocabulary of {len(self._vocabulary)} "
        f"tokens; its special tokens are {self._specials[:8]}"
      )
    return self._vocabulary[token]

  def save(self, folder: str | Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which `from_folder` reads back."""
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
          f"character {character!r} (U+{ord(character):04X}) in {text[:60]!r} is "
          "not in this character tokenizer; make it with that character as well"
        )


def _from_sentencepiece(folder: Path, config: dict):
  """The tokenizer of `tokenizer.model` with the tokens that were added later, and its config."""
  from tokenizers import AddedToken

  from mooer_jax.text import sentencepiece

  file = folder / _SENTENCEPIECE_FILE
  pieces = sentencepiece.read_model(file)
  try:
    model = sentencepiece.build_tokenizer(pieces, legacy=config.get("legacy") is not False)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
  added = {
    int(index): (token, False)
    for token, index in _read_config(folder / _ADDED_FILE, needed=False).items()
  }
  for index, entry in config.get("added_tokens_decoder", {}).items():
    added[int(index)] = (_token_text(entry), isinstance(entry, dict) and bool(entry.get("special")))
  for index, (token, special) in sorted(added.items()):
    model.add_tokens([AddedToken(token, normalized=False, special=special)])
    if model.token_to_id(token) != index:
      raise ValueError(
        f"{folder}: the added token {token!r} should get the id {index}, but comes "
        f"to {model.token_to_id(token)} after the {len(pieces.pieces)} pieces of "
        f"{_SENTENCEPIECE_FILE}"
      )
  own = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": pieces.bos,
    "eos_token": pieces.eos,
    "add_bos_token": True,  # as transformers' LlamaTokenizer
  }
  return model, {**own, **config}


def _read_config(file: Path, *, needed: bool) -> dict:
  if not file.is_file():
    if needed:
      raise FileNotFoundError(
        f"{file}: not found, so the token that ends an answer is unknown; add the file or pass "
        f"eos= (Qwen2: {QWEN2_EOS!r})"
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
        f"{folder}: {_CONFIG_FILE} gives {token!r} the id {index}, {_TOKENIZER_FILE} "
        f"{model.token_to_id(token)}; save the folder again with transformers"
      )
