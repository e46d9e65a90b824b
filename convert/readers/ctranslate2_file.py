"""CTranslate2's model.bin, the format of faster-whisper."""

import math
from functools import partial
from pathlib import Path

import numpy as np

from .safetensors_file import read_span
from .source import (
  BFLOAT16,
  QUANTIZED,
  Cursor,
  ReadError,
  Source,
  Tensor,
  check_shape,
  open_cursor,
)

_VERSION = 6
_LARGEST_VERSION = 255  # files of torch.save begin with larger numbers
_MAX_DIMS = 8
_DTYPES = {
  0: np.dtype(np.float32),
  1: np.dtype(np.int8),
  2: np.dtype(np.int16),
  3: np.dtype(np.int32),
  4: np.dtype(np.float16),
  5: BFLOAT16,
}


def is_ctranslate2(path: Path) -> bool:
  """Whether a .bin file begins with a small number, the version, and is thus not of torch."""
  with path.open("rb") as file:
    start = file.read(4)
  return len(start) == 4 and 0 < int.from_bytes(start, "little") <= _LARGEST_VERSION


def open_ctranslate2(path: Path) -> Source:
  """Opens a file of binary format 6. Its aliases of tensors are in `ignored`.

  Raises:
    ReadError: if the file has another version, is cut short, inconsistent or quantized.

  Source: CTranslate2's ModelSpec.
  """
  with open_cursor(path) as cursor:
    version = cursor.one("I")
    if version != _VERSION:
      raise ReadError(
        f"{path}: CTranslate2 format {version}, supported is {_VERSION}; convert the model again"
        " with a newer CTranslate2"
      )
    spec, revision = _text(cursor), cursor.one("I")
    entries = []
    for _ in range(cursor.one("I")):
      tensor, offset = _read_entry(path, cursor)
      entries.append((tensor, partial(read_span, tensor, offset)))
    names = {tensor.name for tensor, _ in entries}
    aliases = []
    for _ in range(cursor.one("I")):
      alias, name = _text(cursor), _text(cursor)
      if name not in names or alias in names:
        raise ReadError(f"{path}: {alias!r} cannot be an alias of {name!r}; copy it again")
      aliases.append(f"{alias} (the same as {name})")
    if extra := cursor.size - cursor.position:
      raise ReadError(f"{path}: {extra} bytes after its end; copy it again")
    return Source(
      path, entries, ignored=aliases, notes=[f"{path.name}: {spec}, revision {revision}"]
    )


def _text(cursor: Cursor) -> str:
  """Reads a length, and a C string of that length including its zero."""
  text = cursor.text("H")
  if text[-1:] != "\0" or not text[:-1].isprintable() or not text[:-1]:
    raise ReadError(f"{cursor.path}: {text[:40]!r} is not a name; copy it again")
  return text[:-1]


def _read_entry(path: Path, cursor: Cursor) -> tuple[Tensor, int]:
  name = _text(cursor)
  where = f"{path}: tensor {name!r}"
  rank = cursor.one("B")
  if rank > _MAX_DIMS:
    raise ReadError(f"{where} has {rank} dimensions, more than {_MAX_DIMS}")
  shape = cursor.take("I", rank)
  number, nbytes = cursor.one("B"), cursor.one("I")
  if number not in _DTYPES:
    raise ReadError(f"{where} has the unknown type {number}")
  dtype = _DTYPES[number]
  tensor = Tensor(name, check_shape(where, shape, dtype), dtype, path)
  if tensor.nbytes != nbytes:
    raise ReadError(
      f"{where} of shape {list(shape)} ({dtype}) takes {tensor.nbytes} bytes, not {nbytes};"
      " copy it again"
    )
  if dtype.kind == "i" and math.prod(shape) > 1 and name.endswith("weight"):
    raise ReadError(f"{where} {QUANTIZED.format(dtype)}")
  end = cursor.position + nbytes
  if end > cursor.size:
    raise ReadError(
      f"{where} should end at byte {end}, the file ends at {cursor.size}; copy it again"
    )
  return tensor, cursor.skip(nbytes)
