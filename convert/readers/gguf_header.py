"""The part of a GGUF file before its data: metadata and where each tensor lies."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .source import ReadError, check_file

_VERSIONS = (2, 3)
_SCALARS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_NESTED = 4
_MAX_DIMS = 4  # GGML has no more
_ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFTensor:
  """One tensor: `shape` outermost first (reversed in the file), `offset` from the file's start."""

  name: str
  shape: tuple[int, ...]
  kind: str
  offset: int
  nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
  """Everything of a GGUF file but the data."""

  path: Path
  metadata: dict[str, Any]
  tensors: tuple[GGUFTensor, ...]

  def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """The metadata under `key`, which must be of `kind`; without `default` it must be there."""
    value = self.metadata.get(key, default)
    if value is None:
      raise ReadError(f"{self.path}: the metadata lack {key!r}")
    if not isinstance(value, kind):
      raise ReadError(f"{self.path}: the metadata's {key!r} is a {type(value).__name__}")
    return value


def read_header(path: Path) -> GGUFHeader:
  """Reads and checks the header; no tensor's data are touched.

  Raises:
    ReadError: if it is not GGUF version 2 or 3, is cut short, one of several parts, has a type of
      values that is unknown, or tensors that overlap or leave the file.

  Source: the GGUF specification in ggml's documentation.
  """
  check_file(path)
  size = path.stat().st_size
  with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    if data[:4] != b"GGUF":
      raise ReadError(f"{path}: not a GGUF file; it begins with {data[:4]!r}")
    try:
      header = _parse(path, _Cursor(data))
    except struct.error as error:
      raise ReadError(
        f"{path}: cut short within its header ({size} bytes); copy it again"
      ) from error
    except UnicodeDecodeError as error:
      raise ReadError(f"{path}: a name or text in it is not UTF-8: {error}") from error
  _check_spans(header, size)
  return header


class _Cursor:
  """Takes values from the front of a buffer; struct.error at its end."""

  def __init__(self, data):
    self.data, self.position = data, 4

  def take(self, code: str, count: int = 1) -> tuple:
    if count * struct.calcsize(f"<{code}") > len(self.data) - self.position:
      raise struct.error("behind the end")
    values = struct.unpack_from(f"<{count}{code}", self.data, self.position)
    self.position += struct.calcsize(f"<{count}{code}")
    return values

  def one(self, code: str) -> Any:
    return self.take(code)[0]

  def text(self) -> str:
    length = self.one("Q")
    if length > len(self.data) - self.position:
      raise struct.error("behind the end")
    self.position += length
    return self.data[self.position - length : self.position].decode("utf-8")


def _value(path: Path, cursor: _Cursor, kind: int, depth: int = 0) -> Any:
  if kind in _SCALARS:
    return cursor.one(_SCALARS[kind])
  if kind == _STRING:
    return cursor.text()
  if kind != _ARRAY or depth == _MAX_NESTED:
    raise ReadError(f"{path}: metadata of the unknown type {kind}")
  item, count = cursor.one("I"), cursor.one("Q")
  if item in _SCALARS:
    return list(cursor.take(_SCALARS[item], count))
  # Each item takes bytes, so a count that lies ends at the end of the file.
  return [_value(path, cursor, item, depth + 1) for _ in range(count)]


def _parse(path: Path, cursor: _Cursor) -> GGUFHeader:
  version = cursor.one("I")
  if version not in _VERSIONS:
    big = " (big-endian)" if version & 0xFFFF == 0 else ""
    raise ReadError(f"{path}: GGUF version {version}{big}; read are {_VERSIONS}, little-endian")
  n_tensors, n_entries = cursor.take("Q", 2)
  metadata: dict[str, Any] = {}
  for _ in range(n_entries):
    key = cursor.text()
    if key in metadata:
      raise ReadError(f"{path}: the metadata have {key!r} twice")
    metadata[key] = _value(path, cursor, cursor.one("I"))
  if metadata.get("split.count", 1) not in (0, 1):
    raise ReadError(
      f"{path}: one of {metadata['split.count']} parts; join them first with "
      "llama.cpp's `llama-gguf-split --merge`"
    )
  alignment = metadata.get("general.alignment", _ALIGNMENT)
  if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
    raise ReadError(f"{path}: general.alignment is {alignment!r}, not a power of two")

  sizes, name_of = _block_sizes()
  rows = []
  for _ in range(n_tensors):
    name = cursor.text()
    n_dims = cursor.one("I")
    if n_dims > _MAX_DIMS:
      raise ReadError(f"{path}: tensor {name!r} has {n_dims} dimensions, more than {_MAX_DIMS}")
    shape = tuple(reversed(cursor.take("Q", n_dims)))
    rows.append((name, shape, cursor.one("I"), cursor.one("Q")))
  start = -(-cursor.position // alignment) * alignment
  tensors = []
  for name, shape, number, offset in rows:
    where = f"{path}: tensor {name!r}"
    if number not in name_of:
      raise ReadError(f"{where} has the unknown type {number}")
    kind = name_of[number]
    block, block_bytes = sizes(number)
    row = shape[-1] if shape else 1
    if row % block:
      raise ReadError(f"{where} has rows of {row}, which {kind} cannot cut into blocks of {block}")
    nbytes = math.prod(shape) // block * block_bytes
    if offset % alignment:
      raise ReadError(f"{where} begins at {offset}, not a multiple of the alignment {alignment}")
    tensors.append(GGUFTensor(name, shape, kind, start + offset, nbytes))
  return GGUFHeader(path, metadata, tuple(tensors))


def _block_sizes() -> tuple[Callable[[int], tuple[int, int]], dict[int, str]]:
  import gguf

  kinds = {kind.value: kind for kind in gguf.GGMLQuantizationType}
  return lambda number: gguf.GGML_QUANT_SIZES[kinds[number]], {n: k.name for n, k in kinds.items()}


def _check_spans(header: GGUFHeader, size: int):
  position = 0
  for tensor in sorted(header.tensors, key=lambda t: (t.offset, t.nbytes)):
    where = f"{header.path}: tensor {tensor.name!r}"
    if tensor.offset < position and tensor.nbytes:
      raise ReadError(f"{where} overlaps the one before it")
    position = max(position, tensor.offset + tensor.nbytes)
    if position > size:
      raise ReadError(
        f"{where} should end at byte {position}, the file ends at {size}; it is cut "
        "short, copy it again"
      )
