"""The header of a GGUF file: metadata, and the place of every tensor.

`gguf.GGUFReader` is not used: it never returns on a file with a wrong count of array items, and it
takes 15 s for a vocabulary of 150,000 tokens.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType as Type

from .source import ReadError, check_file

_VERSIONS = (2, 3)
_SCALARS: dict[int, str] = {
  Type.UINT8: "B",
  Type.INT8: "b",
  Type.UINT16: "H",
  Type.INT16: "h",
  Type.UINT32: "I",
  Type.INT32: "i",
  Type.FLOAT32: "f",
  Type.BOOL: "?",
  Type.UINT64: "Q",
  Type.INT64: "q",
  Type.FLOAT64: "d",
}
_MAX_NESTED = 4
_MAX_DIMS = 4  # of GGML


@dataclass(frozen=True)
class GGUFTensor:
  """A tensor: `shape` outermost first (reversed in the file), `offset` from the file's start."""

  name: str
  shape: tuple[int, ...]
  kind: gguf.GGMLQuantizationType
  offset: int
  nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
  """The content of a GGUF file except the data."""

  path: Path
  metadata: dict[str, Any]
  tensors: tuple[GGUFTensor, ...]

  def get(self, key: str, kind: type, default: Any = None) -> Any:
    """Returns the metadata under `key`. Raises ReadError if they are absent or of another type."""
    value = self.metadata.get(key, default)
    if value is None:
      raise ReadError(f"{self.path}: the metadata lack {key!r}")
    if not isinstance(value, kind):
      raise ReadError(f"{self.path}: the metadata's {key!r} is a {type(value).__name__}")
    return value


def read_header(path: Path) -> GGUFHeader:
  """Reads and checks the header; no data of tensors are read.

  Raises:
    ReadError: if the file is not GGUF version 2 or 3, is cut short or one of several parts, has
      values of unknown types, or tensors that overlap or exceed the file.

  Source: the GGUF specification in ggml's documentation.
  """
  check_file(path)
  size = path.stat().st_size
  with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    if data[:4] != b"GGUF":
      raise ReadError(f"{path}: not a GGUF file (it begins with {data[:4]!r}); copy it again")
    try:
      header = _parse(path, _Cursor(data))
    except struct.error as error:
      raise ReadError(f"{path}: cut short within its header; copy it again") from error
    except UnicodeDecodeError as error:
      raise ReadError(f"{path}: a name or text in it is not UTF-8: {error}") from error
  _check_spans(header, size)
  return header


class _Cursor:
  """Reads values from a buffer in order; struct.error at its end."""

  def __init__(self, data):
    self.data, self.position = data, 4

  def take(self, code: str, count: int = 1) -> tuple:
    nbytes = count * struct.calcsize(f"<{code}")
    self._advance(nbytes)
    return struct.unpack_from(f"<{count}{code}", self.data, self.position - nbytes)

  def one(self, code: str) -> Any:
    return self.take(code)[0]

  def text(self) -> str:
    length = self.one("Q")
    self._advance(length)
    return self.data[self.position - length : self.position].decode("utf-8")

  def _advance(self, nbytes: int) -> None:
    if nbytes > len(self.data) - self.position:
      raise struct.error("end of the buffer")
    self.position += nbytes


def _value(path: Path, cursor: _Cursor, kind: int, depth: int = 0) -> Any:
  if kind in _SCALARS:
    return cursor.one(_SCALARS[kind])
  if kind == Type.STRING:
    return cursor.text()
  if kind != Type.ARRAY or depth == _MAX_NESTED:
    raise ReadError(f"{path}: metadata of the unknown type {kind}")
  item, count = cursor.one("I"), cursor.one("Q")
  if item in _SCALARS:
    return list(cursor.take(_SCALARS[item], count))
  # Each item takes bytes, so a wrong count ends at the end of the file.
  return [_value(path, cursor, item, depth + 1) for _ in range(count)]


def _parse(path: Path, cursor: _Cursor) -> GGUFHeader:
  version = cursor.one("I")
  if version not in _VERSIONS:
    big = " (big-endian)" if version & 0xFFFF == 0 else ""
    raise ReadError(f"{path}: GGUF version {version}{big}; supported are 2 and 3, little-endian")
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
  alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
  if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
    raise ReadError(f"{path}: general.alignment is {alignment!r}, not a power of two")
  rows = [_parse_tensor(path, cursor, alignment) for _ in range(n_tensors)]
  start = -(-cursor.position // alignment) * alignment
  tensors = [
    GGUFTensor(name, shape, kind, start + offset, nbytes)
    for name, shape, kind, offset, nbytes in rows
  ]
  return GGUFHeader(path, metadata, tuple(tensors))


def _parse_tensor(path: Path, cursor: _Cursor, alignment: int) -> tuple:
  """(name, shape, kind, offset in the data, bytes)."""
  name = cursor.text()
  where, n_dims = f"{path}: tensor {name!r}", cursor.one("I")
  if n_dims > _MAX_DIMS:
    raise ReadError(f"{where} has {n_dims} dimensions, more than {_MAX_DIMS}")
  shape = cursor.take("Q", n_dims)[::-1]
  number, offset = cursor.one("I"), cursor.one("Q")
  if number not in {*gguf.GGMLQuantizationType}:
    raise ReadError(f"{where} has the unknown type {number}")
  kind = gguf.GGMLQuantizationType(number)
  block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  if (shape[-1] if shape else 1) % block:
    raise ReadError(f"{where} of shape {list(shape)} cannot be cut into blocks of {block}")
  if offset % alignment:
    raise ReadError(f"{where} begins at {offset}, not a multiple of the alignment {alignment}")
  return name, shape, kind, offset, math.prod(shape) // block * block_bytes


def _check_spans(header: GGUFHeader, size: int) -> None:
  end = 0
  for tensor in sorted(header.tensors, key=lambda t: (t.offset, t.nbytes)):
    where = f"{header.path}: tensor {tensor.name!r}"
    if tensor.offset < end and tensor.nbytes:
      raise ReadError(f"{where} overlaps the one before it")
    end = max(end, tensor.offset + tensor.nbytes)
    if end > size:
      raise ReadError(f"{where} should end at byte {end}, the file ends at {size}; copy it again")
