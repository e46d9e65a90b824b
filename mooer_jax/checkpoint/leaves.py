"""Leaves of a checkpoint that are read on demand, and the errors of this package."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np


class SaveError(OSError):
  """A checkpoint could not be saved; existing files are unchanged."""


class CheckpointError(ValueError):
  """A folder is not a mooer_jax checkpoint, is damaged, or does not fit the request."""


@dataclasses.dataclass(frozen=True)
class LazyArray:
  """A leaf that is read when it is written, so that a model may exceed the memory.

  Attributes:
    shape, dtype: of the array.
    read: returns the array (NumPy, on the host); may be called more than once.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def as_lazy(leaf) -> LazyArray:
  """Wrap an array as a `LazyArray` leaf."""
  if isinstance(leaf, LazyArray):
    return leaf
  return LazyArray(tuple(leaf.shape), np.dtype(leaf.dtype), lambda: np.asarray(leaf))


def hash_file(file: Path) -> str:
  """SHA-256 (hex) of a file."""
  with file.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()
