"""SentencePiece models (`tokenizer.model`) as tokenizers of the package `tokenizers`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLANK = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2


@dataclass(frozen=True)
class Piece:
  """One entry of the vocabulary; its id is its place."""

  text: str
  score: float
  kind: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
  """What a SentencePiece model says about cutting text.

  Attributes:
    pieces: the vocabulary in the order of ids.
    algorithm: UNIGRAM or BPE.
    prefix_blank: whether a text is cut as if a blank stood before it.
    squeeze_blanks: whether blanks at the ends and repeated ones are dropped.
    charsmap: compiled table of character replacements; empty for none (LLaMA).
    bos, eos: texts of these control pieces, None where the model has none.
  """

  pieces: tuple[Piece, ...]
  algorithm: int = BPE
  prefix_blank: bool = True
  squeeze_blanks: bool = False
  charsmap: bytes = b""
  bos: str | None = None
  eos: str | None = None


def read_model(path: Path) -> SentencePieceModel:
  """Reads a `tokenizer.model`, a protocol buffer whose few fields of interest are parsed here.

  Raises:
    ValueError: if it is not one, or of a kind that is not supported (named).

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
      f"{path}: SentencePiece model of type {algorithm} with {len(pieces)} pieces; "
      f"read are unigram ({UNIGRAM}) and BPE ({BPE})"
    )
  if setting(trainer, 24, 0) or not setting(normalizer, 5, 1):
    raise ValueError(
      f"{path}: SentencePiece models that put blanks behind words or do not escape "
      "them are not supported"
    )
  return SentencePieceModel(
    pieces,
    algorithm,
    prefix_blank=bool(setting(normalizer, 3, 1)),
    squeeze_blanks=bool(setting(normalizer, 4, 1)),
    charsmap=setting(normalizer, 2, b""),
    bos=control(41, 1),
    eos=control(42, 2),
  )


def build_tokenizer(model: SentencePieceModel, *, legacy: bool = True) -> Any:
  """Makes a `tokenizers.Tokenizer` with the ids of a SentencePiece model.

  Control and unknown pieces written in a text become their ids, as in transformers (SentencePiece
  itself would spell them), and each stretch of text between such pieces is cut by itself.

  Args:
    model: the pieces; BPE's merges follow from their scores.
    legacy: every stretch gets the blank before it, as LLaMA and Vicuna were trained; False, as
      `"legacy": false` in a tokenizer_config.json: only the text's beginning does, and only if
      no blank stands there.

  Raises:
    ValueError: if there is not one unknown piece, or a piece stands twice.
  """
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
  from tokenizers import models as kinds

  pieces = model.pieces
  unknown = [i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN]
  ids = {piece.text: i for i, piece in enumerate(pieces)}
  if len(unknown) != 1 or len(ids) != len(pieces):
    raise ValueError(
      f"a SentencePiece vocabulary of {len(pieces)} pieces, {len(ids)} of them "
      f"distinct, with {len(unknown)} unknown pieces; one is needed"
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

  steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
  if model.squeeze_blanks:
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
  if legacy:
    steps += [normalizers.Prepend(BLANK)] if model.prefix_blank else []
    steps.append(normalizers.Replace(" ", BLANK))
  else:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
      BLANK, prepend_scheme="first" if model.prefix_blank else "never", split=False
    )
  if steps:
    tokenizer.normalizer = normalizers.Sequence(steps)
  back = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence(
    back + ([decoders.Strip(" ", 1, 0)] if model.prefix_blank else [])
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
  """Pairs in the order in which SentencePiece joins them: the best score of the result first."""
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
  """The values of each field of a message: whole numbers, or bytes to be read further."""
  found: dict[int, list] = {}
  for number, value in _messages(data):
    found.setdefault(number, []).append(value)
  return found


def _messages(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  position = 0
  while position < len(data):
    tag, position = _varint(data, position)
    kind = tag & 7
    if kind == 0:
      value, position = _varint(data, position)
      yield tag >> 3, value
      continue
    if kind == 2:
      length, position = _varint(data, position)
    elif kind in (1, 5):
      length = 8 if kind == 1 else 4
    else:
      raise ValueError(f"a field of wire type {kind} at byte {position}")
    if position + length > len(data):
      raise ValueError(f"cut short at byte {len(data)}")
    yield tag >> 3, data[position : position + length]
    position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 70, 7):
    if position >= len(data):
      raise ValueError(f"cut short at byte {position}")
    byte = data[position]
    position += 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      return value, position
  raise ValueError(f"a number without end at byte {position}")
