"""SentencePiece models (`tokenizer.model`) as tokenizers of the package `tokenizers`.

The few fields that matter are parsed here. The parser in the package `sentencepiece` 0.2.3 refuses
protobuf runtimes before 7.36.1, a requirement that the package does not declare.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2


@dataclass(frozen=True)
class Piece:
  """One entry of the vocabulary; its id is its position."""

  text: str
  score: float
  kind: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
  """Vocabulary and normalization of a SentencePiece model."""

  pieces: tuple[Piece, ...]  # in the order of ids
  algorithm: int = BPE  # or UNIGRAM
  add_dummy_prefix: bool = True  # a space is prepended to a text
  remove_extra_whitespaces: bool = False  # leading, trailing and repeated ones
  precompiled_charsmap: bytes = b""  # compiled table of character replacements; LLaMA: none
  bos: str | None = None  # text of the control piece; None if the model has none
  eos: str | None = None


def read_model(path: Path) -> SentencePieceModel:
  """Read a `tokenizer.model`.

  Raises ValueError if it is not a SentencePiece model, or of a kind that is not supported.

  Source: sentencepiece_model.proto of google/sentencepiece.
  """
  try:
    model = _fields(path.read_bytes())
    pieces = tuple(_piece(_fields(raw)) for raw in model.get(1, []))
    trainer, normalizer = (_fields(model.get(n, [b""])[-1]) for n in (2, 3))
  except (ValueError, TypeError, AttributeError, struct.error) as error:
    raise ValueError(f"{path}: not a SentencePiece model: {error}") from error

  def setting(message, number, default):
    return message.get(number, [default])[-1]

  def control(number, default):
    index = setting(trainer, number, default)
    return pieces[index].text if index < len(pieces) else None  # -1 comes as a huge number

  algorithm = setting(trainer, 3, UNIGRAM)
  if not pieces or algorithm not in (UNIGRAM, BPE):
    raise ValueError(
      f"{path}: SentencePiece model of type {algorithm} with {len(pieces)} pieces; supported are"
      f" unigram ({UNIGRAM}) and BPE ({BPE}) models with at least one piece"
    )
  if setting(trainer, 24, 0) or not setting(normalizer, 5, 1):
    raise ValueError(
      f"{path}: SentencePiece models with treat_whitespace_as_suffix or without escape_whitespaces"
      " are not supported"
    )
  return SentencePieceModel(
    pieces,
    algorithm,
    add_dummy_prefix=bool(setting(normalizer, 3, 1)),
    remove_extra_whitespaces=bool(setting(normalizer, 4, 1)),
    precompiled_charsmap=setting(normalizer, 2, b""),
    bos=control(41, 1),
    eos=control(42, 2),
  )


def build_tokenizer(model: SentencePieceModel, *, legacy: bool = True) -> Any:
  """Build a `tokenizers.Tokenizer` with the ids of a SentencePiece model.

  Control and unknown pieces in a text become their ids, as in transformers (SentencePiece itself
  would spell them). The segments between such pieces are tokenized separately.

  Args:
    model: the merges of BPE follow from the scores of its pieces.
    legacy: prepend the space to every segment, as LLaMA and Vicuna were trained; False, as
      `"legacy": false` in a tokenizer_config.json: only to the beginning of the text, unless it
      starts with a space.

  Raises:
    ValueError: unless the pieces are distinct and exactly one is the unknown piece.
  """
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
  from tokenizers import models as kinds

  pieces = model.pieces
  unknown = [i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN]
  ids = {piece.text: i for i, piece in enumerate(pieces)}
  if len(unknown) != 1 or len(ids) != len(pieces):
    raise ValueError(
      f"the SentencePiece vocabulary has {len(pieces)} pieces, {len(ids)} of them distinct, and"
      f" {len(unknown)} unknown pieces; all must be distinct, and one must be the unknown piece"
    )
  byte_fallback = any(piece.kind == BYTE for piece in pieces)
  if model.algorithm == BPE:
    core: Any = kinds.BPE(
      vocab=ids,
      merges=_merges(pieces, ids),
      unk_token=pieces[unknown[0]].text,
      fuse_unk=True,
      byte_fallback=byte_fallback,
    )
  else:
    core = kinds.Unigram(
      [(piece.text, piece.score) for piece in pieces], unknown[0], byte_fallback=byte_fallback
    )
  tokenizer = Tokenizer(core)

  charsmap = model.precompiled_charsmap
  steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
  if model.remove_extra_whitespaces:
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
  if legacy:
    steps += [normalizers.Prepend(SPACE)] if model.add_dummy_prefix else []
    steps.append(normalizers.Replace(" ", SPACE))
  else:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
      SPACE, prepend_scheme="first" if model.add_dummy_prefix else "never", split=False
    )
  if steps:
    tokenizer.normalizer = normalizers.Sequence(steps)
  back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence(
    back + ([decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else [])
  )
  tokenizer.add_tokens(
    [
      AddedToken(piece.text, normalized=False, special=piece.kind != USER_DEFINED)
      for piece in pieces
      if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
  )
  return tokenizer


def _merges(pieces: tuple[Piece, ...], ids: dict[str, int]) -> list[tuple[str, str]]:
  """Pairs in the order in which SentencePiece merges them: by falling score of the result."""
  joinable = {piece.text for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)}
  ranked = []
  for piece in pieces:
    if piece.kind == NORMAL:
      halves = ((piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text)))
      ranked += [
        (-piece.score, ids[a], ids[b], (a, b)) for a, b in halves if a in joinable and b in joinable
      ]
  return [pair for *_, pair in sorted(ranked)]


def _piece(fields: dict[int, list]) -> Piece:
  (score,) = struct.unpack("<f", fields.get(2, [b"\0\0\0\0"])[-1])
  return Piece(fields.get(1, [b""])[-1].decode("utf-8"), score, fields.get(3, [NORMAL])[-1])


def _fields(data: bytes) -> dict[int, list]:
  """Values of each field of a message: integers, or bytes that may be messages themselves."""
  found: dict[int, list] = {}
  position = 0
  while position < len(data):
    tag, position = _varint(data, position)
    kind = tag & 7
    value: Any
    if kind == 0:
      value, position = _varint(data, position)
    else:
      length = {1: 8, 5: 4}.get(kind)
      if kind == 2:
        length, position = _varint(data, position)
      if length is None:
        raise ValueError(f"unknown wire type {kind} at byte {position}")
      if position + length > len(data):
        raise ValueError(f"truncated at byte {len(data)}")
      value, position = data[position : position + length], position + length
    found.setdefault(tag >> 3, []).append(value)
  return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 70, 7):
    if position >= len(data):
      raise ValueError(f"truncated at byte {position}")
    byte = data[position]
    position += 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      return value, position
  raise ValueError(f"a number of more than 10 bytes at byte {position}")
