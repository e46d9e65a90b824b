"""The tokenizer inside a GGUF file."""

from pathlib import Path
from typing import Any

from mooer_jax.text import sentencepiece

from .gguf_header import GGUFHeader, read_header
from .source import ReadError

_LETTER_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pre-tokenization of the models: one digit at a time, or up to three.
_PATTERNS = {
  "qwen2": _LETTER_WORDS + r"\p{N}" + _REST,
  "llama-bpe": _LETTER_WORDS + r"\p{N}{1,3}" + _REST,
}
PRE_TOKENIZERS = (*_PATTERNS, "smollm", "gpt-2")
_NAMED_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def gguf_tokenizer(path: str | Path) -> tuple[Any, dict[str, Any]]:
  """Rebuilds the tokenizer of a GGUF file.

  Returns:
    A `tokenizers.Tokenizer`, and the content of Hugging Face's `tokenizer_config.json`.

  Raises:
    ReadError: if there is none, or it is inconsistent or unknown. Supported are byte-level BPE
      ("gpt2") with the pre-tokenizers in PRE_TOKENIZERS, and LLaMA's SentencePiece.
  """
  header = read_header(Path(path))
  kind = header.get("tokenizer.ggml.model", str)
  if kind not in ("gpt2", "llama"):
    raise ReadError(f"{path}: tokenizer of kind {kind!r}; supported are 'gpt2' and 'llama'")
  tokens = _texts(header, "tokenizer.ggml.tokens")
  kinds = header.get("tokenizer.ggml.token_type", list, [sentencepiece.NORMAL] * len(tokens))
  if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ReadError(
      f"{path}: {len(tokens)} tokens ({len(set(tokens))} distinct), {len(kinds)} token types"
    )
  try:
    make = _byte_level if kind == "gpt2" else _sentencepiece
    tokenizer = make(header, tokens, kinds)
  except ReadError:
    raise
  except Exception as error:  # the package `tokenizers` raises plain Exception
    raise ReadError(f"{path}: its vocabulary is not a tokenizer: {error}") from error
  return tokenizer, _config(header, tokens)


def _byte_level(header: GGUFHeader, tokens: list[str], kinds: list[int]):
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
  from tokenizers import pre_tokenizers as pre

  name = header.get("tokenizer.ggml.pre", str)
  if name not in PRE_TOKENIZERS:
    raise ReadError(
      f"{header.path}: pre-tokenizer {name!r} is unknown; known are {', '.join(PRE_TOKENIZERS)}"
    )
  pairs = _texts(header, "tokenizer.ggml.merges")
  if odd := [pair for pair in pairs if pair.count(" ") != 1]:
    raise ReadError(f"{header.path}: the merge {odd[0]!r} is not of two tokens")
  vocabulary = {
    token: i
    for i, (token, kind) in enumerate(zip(tokens, kinds))
    if not (kind == sentencepiece.UNUSED and token == f"[PAD{i}]")  # fills up the embedding
  }
  merges = [(first, second) for first, _, second in (pair.partition(" ") for pair in pairs)]
  # LLaMA 3's whole words are tokens even where no chain of merges leads to them.
  tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))
  if name == "qwen2":
    tokenizer.normalizer = normalizers.NFC()
  first: list[Any] = []
  if name in _PATTERNS:
    first = [pre.Split(Regex(_PATTERNS[name]), behavior="isolated")]
  elif name == "smollm":
    first = [pre.Digits(individual_digits=True)]
  spaced = header.get("tokenizer.ggml.add_space_prefix", bool, False)
  last = pre.ByteLevel(add_prefix_space=spaced, use_regex=name not in _PATTERNS)
  tokenizer.pre_tokenizer = pre.Sequence([*first, last])
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_tokens(
    [
      AddedToken(token, normalized=False, special=kind != sentencepiece.USER_DEFINED)
      for token, kind in zip(tokens, kinds)
      if kind in (sentencepiece.UNKNOWN, sentencepiece.CONTROL, sentencepiece.USER_DEFINED)
    ]
  )
  return tokenizer


def _sentencepiece(header: GGUFHeader, tokens: list[str], kinds: list[int]):
  scores = header.get("tokenizer.ggml.scores", list)
  if len(scores) != len(tokens):
    raise ReadError(f"{header.path}: {len(tokens)} tokens, {len(scores)} scores")
  return sentencepiece.build_tokenizer(
    sentencepiece.SentencePieceModel(
      tuple(map(sentencepiece.Piece, tokens, scores, kinds)),
      add_dummy_prefix=header.get("tokenizer.ggml.add_space_prefix", bool, True),
      remove_extra_whitespaces=header.get("tokenizer.ggml.remove_extra_whitespaces", bool, False),
    )
  )


def _config(header: GGUFHeader, tokens: list[str]) -> dict[str, Any]:
  config: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
  }
  for name, spelt in _NAMED_TOKENS.items():
    key = f"tokenizer.ggml.{spelt}_token_id"
    if key in header.metadata:
      index = header.get(key, int)
      if not 0 <= index < len(tokens):
        raise ReadError(f"{header.path}: {key} is {index}, of {len(tokens)} tokens")
      config[f"{name}_token"] = tokens[index]
  for name in ("add_bos_token", "add_eos_token"):
    if f"tokenizer.ggml.{name}" in header.metadata:
      config[name] = header.get(f"tokenizer.ggml.{name}", bool)
  if "tokenizer.chat_template" in header.metadata:
    config["chat_template"] = header.get("tokenizer.chat_template", str)
  return config


def _texts(header: GGUFHeader, key: str) -> list[str]:
  values = header.get(key, list)
  if not values or not all(isinstance(value, str) for value in values):
    raise ReadError(f"{header.path}: the metadata's {key!r} is not a list of texts")
  return values
