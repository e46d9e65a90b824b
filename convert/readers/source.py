"""Tensors in files, read one at a time."""

import contextlib
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mooer_jax.files import LFS_POINTER, LFS_REMEDY, read_json_object

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# All ones in the exponent mean NaN or infinity; for these dtypes, isfinite is slower.
_EXPONENTS = {np.dtype(np.float16): 0x7C00, BFLOAT16: 0x7F80}
_CHECKED_VALUES = 1 << 22  # at a time
_MAX_DIMS = 32
_WEIGHT_NAMES = ("weight", "qweight", "qzeros", "scales", "weight_packed")
QUANTIZED = (
  "is a weight of dtype {}, so the file is quantized, which is not supported; use the float16,"
  " bfloat16 or float32 release"
)


class ReadError(ValueError):
  """A weight file that cannot be read; names the file, the reason and the tensor."""


@dataclass(frozen=True)
class Tensor:
  """Description of a tensor in a file. bfloat16 is the dtype of the package ml_dtypes."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  file: Path

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class Source:
  """Tensors by name; only `read` reads their data.

  Attributes:
    path: the opened file or folder.
    tensors: descriptions, in the order of the files.
    ignored: other entries of the files.
    notes: sentences for the user.
  """

  def __init__(
    self,
    path: Path,
    entries: Iterable[tuple[Tensor, Callable[[], np.ndarray]]],
    *,
    ignored: Sequence[str] = (),
    notes: Sequence[str] = (),
  ):
    self.path, self.ignored, self.notes = path, tuple(ignored), tuple(notes)
    self.tensors: dict[str, Tensor] = {}
    self._readers: dict[str, Callable[[], np.ndarray]] = {}
    for tensor, reader in entries:
      if tensor.name in self.tensors:
        first = self.tensors[tensor.name].file
        again = "twice" if first == tensor.file else f"also in {first.name}"
        raise ReadError(f"{tensor.file}: tensor {tensor.name!r} is there {again}")
      where = f"{tensor.file}: tensor {tensor.name!r}"
      check_shape(where, tensor.shape, tensor.dtype)
      # An integer tensor under one of these names is a quantized weight; others are plain buffers.
      if tensor.dtype.kind in "iu" and tensor.name.rpartition(".")[2] in _WEIGHT_NAMES:
        raise ReadError(f"{where} {QUANTIZED.format(tensor.dtype)}")
      self.tensors[tensor.name] = tensor
      self._readers[tensor.name] = reader

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor into a writable array in the stored shape and dtype, bit for bit.

    Raises:
      KeyError: if there is no such tensor.
      ReadError: if the file was cut, or a value is NaN or infinite.
    """
    if name not in self.tensors:
      raise KeyError(f"{self.path}: no tensor {name!r} among {len(self.tensors)}")
    tensor = self.tensors[name]
    array = self._readers[name]()
    assert array.shape == tensor.shape and array.dtype == tensor.dtype, (tensor, array.shape)
    if bad := _count_not_finite(array):
      raise ReadError(
        f"{tensor.file}: tensor {name!r} has {bad} of {array.size} values that are NaN or infinite"
      )
    return array

  def equal(self, a: str, b: str) -> bool:
    """Whether two tensors have the same shape, dtype and values."""
    described = [(self.tensors[name].shape, self.tensors[name].dtype) for name in (a, b)]
    return described[0] == described[1] and np.array_equal(self.read(a), self.read(b))


def join_sources(path: Path, sources: Sequence[Source], notes: Sequence[str] = ()) -> Source:
  """Joins the sources of several files. Raises ReadError for a tensor in two of them."""
  return Source(
    path,
    [(source.tensors[n], source._readers[n]) for source in sources for n in source.tensors],
    ignored=[name for source in sources for name in source.ignored],
    notes=list(dict.fromkeys([*notes, *(note for source in sources for note in source.notes)])),
  )


def check_shape(where: str, shape: Sequence[int], dtype: np.dtype) -> tuple[int, ...]:
  """Returns `shape` as a tuple. Raises ReadError (beginning with `where`) if it is impossible."""
  if len(shape) > _MAX_DIMS or any(size < 0 for size in shape):
    raise ReadError(f"{where} has the impossible shape {list(shape)[:_MAX_DIMS]}")
  if math.prod(size for size in shape if size) * dtype.itemsize >= 1 << 62:
    raise ReadError(f"{where} has the impossible shape {list(shape)}")
  return tuple(int(size) for size in shape)


def _count_not_finite(array: np.ndarray) -> int:
  exponent = _EXPONENTS.get(array.dtype)
  if exponent is None and array.dtype.kind != "f":
    return 0
  flat, bad = array.reshape(-1), 0
  for start in range(0, flat.size, _CHECKED_VALUES):
    values = flat[start : start + _CHECKED_VALUES]
    if exponent is None:
      bad += values.size - int(np.count_nonzero(np.isfinite(values)))
    else:
      bad += int(np.count_nonzero(values.view(np.uint16) & exponent == exponent))
  return bad


class Cursor:
  """Reads little-endian values in order. Raises ReadError at the end, and for text not in UTF-8."""

  def __init__(self, path: Path, data: bytes | mmap.mmap):
    self.path, self.position, self.size = path, 0, len(data)
    self._data = data

  def take(self, code: str, count: int = 1) -> tuple:
    """Reads values of one of the types of `struct`."""
    start = self.skip(count * struct.calcsize(f"<{code}"))
    return struct.unpack_from(f"<{count}{code}", self._data, start)

  def one(self, code: str) -> Any:
    return self.take(code)[0]

  def text(self, code: str) -> str:
    """Reads a length of this type, then that number of bytes as UTF-8."""
    length = self.one(code)
    start = self.skip(length)
    try:
      return self._data[start : start + length].decode("utf-8")
    except UnicodeDecodeError as error:
      raise ReadError(f"{self.path}: a name or text in it is not UTF-8: {error}") from error

  def skip(self, nbytes: int) -> int:
    """Skips bytes and returns their offset."""
    start = self.position
    if start + nbytes > self.size:
      raise ReadError(f"{self.path}: cut short at byte {self.size}; copy it again")
    self.position += nbytes
    return start


@contextlib.contextmanager
def open_cursor(path: Path) -> Iterator[Cursor]:
  """Maps a file that is not empty."""
  with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    yield Cursor(path, data)


def read_object(path: Path) -> dict:
  """Reads a JSON object. Raises as `check_file`, and ReadError if it is not JSON or no object."""
  check_file(path)
  try:
    return read_json_object(path)
  except ValueError as error:
    raise ReadError(str(error)) from error


def check_file(path: Path) -> None:
  """Raises FileNotFoundError without such a file, ReadError if it is empty or a Git LFS pointer."""
  with path.open("rb") as file:
    start = file.read(len(LFS_POINTER))
  if not start:
    raise ReadError(f"{path}: empty, 0 bytes; copy it again")
  if start == LFS_POINTER:
    raise ReadError(f"{path}: {LFS_REMEDY}")
