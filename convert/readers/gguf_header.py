"""The header of a GGUF file: metadata, and the place of every tensor.

`gguf.GGUFReader` is not used: it never returns on a file with a wrong count of array items, and it
takes 15 s for a vocabulary of 150,000 tokens.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType as Type

from .source import Cursor, ReadError, check_file, open_cursor

_VERSIONS = (2, 3)
# Types of metadata -> codes of `struct`.
_SCALARS: dict[int, str] = {
  Type.UINT8: "B", Type.INT8: "b", Type.UINT16: "H", Type.INT16: "h", Type.UINT32: "I",
  Type.INT32: "i", Type.FLOAT32: "f", Type.BOOL: "?", Type.UINT64: "Q", Type.INT64: "q",
  Type.FLOAT64: "d",
}  # fmt: skip
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
  with open_cursor(path) as cursor:
    magic = bytes(cursor.take("B", 4))
    if magic != b"GGUF":
      raise ReadError(f"{path}: not a GGUF file (it begins with {magic!r}); copy it again")
    version = cursor.one("I")
    if version not in _VERSIONS:
      big = " (big-endian)" if version & 0xFFFF == 0 else ""
      raise ReadError(f"{path}: GGUF version {version}{big}; supported are 2 and 3, little-endian")
    n_tensors, n_entries = cursor.take("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(n_entries):
      key = cursor.text("Q")
      if key in metadata:
        raise ReadError(f"{path}: the metadata have {key!r} twice")
      metadata[key] = _value(path, cursor, cursor.one("I"))
    if metadata.get("split.count", 1) not in (0, 1):
      raise ReadError(
        f"{path}: one of {metadata['split.count']} parts; join them with llama.cpp's"
        " `llama-gguf-split --merge`"
      )
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
      raise ReadError(f"{path}: general.alignment is {alignment!r}, not a power of two")
    tensors = [_parse_tensor(path, cursor, alignment) for _ in range(n_tensors)]
    start = -(-cursor.position // alignment) * alignment
    moved = (replace(tensor, offset=start + tensor.offset) for tensor in tensors)
    header = GGUFHeader(path, metadata, tuple(moved))
  _check_spans(header, path.stat().st_size)
  return header


def _value(path: Path, cursor: Cursor, kind: int, *, depth: int = 0) -> Any:
  if kind in _SCALARS:
    return cursor.one(_SCALARS[kind])
  if kind == Type.STRING:
    return cursor.text("Q")
  if kind != Type.ARRAY or depth == _MAX_NESTED:
    raise ReadError(f"{path}: metadata of the unknown type {kind}")
  item, count = cursor.one("I"), cursor.one("Q")
  if item in _SCALARS:
    return list(cursor.take(_SCALARS[item], count))
  # Each item takes bytes, so a wrong count ends at the end of the file.
  return [_value(path, cursor, item, depth=depth + 1) for _ in range(count)]


def _parse_tensor(path: Path, cursor: Cursor, alignment: int) -> GGUFTensor:
  """A tensor whose offset is that in the data, not in the file."""
  name = cursor.text("Q")
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
  return GGUFTensor(name, shape, kind, offset, math.prod(shape) // block * block_bytes)


def _check_spans(header: GGUFHeader, size: int) -> None:
  end = 0
  for tensor in sorted(header.tensors, key=lambda t: (t.offset, t.nbytes)):
    where = f"{header.path}: tensor {tensor.name!r}"
    if tensor.offset < end and tensor.nbytes:
      raise ReadError(f"{where} overlaps the one before it")
    end = max(end, tensor.offset + tensor.nbytes)
    if end > size:
      raise ReadError(f"{where} should end at byte {end}, the file ends at {size}; copy it again")
