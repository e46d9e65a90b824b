"""Leaves of a checkpoint that are read on demand, and the errors of this package."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


class SaveError(OSError):
  """A checkpoint could not be saved; existing files are unchanged."""


class CheckpointError(ValueError):
  """A folder is not a mooer_jax checkpoint, is damaged, or does not fit the request."""


@dataclasses.dataclass(frozen=True)
class LazyArray:
  """A leaf that is read when it is written, so that a model may exceed the memory."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]  # on the host; may be called more than once

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def as_lazy(leaf) -> LazyArray:
  """Wrap an array as a `LazyArray` leaf."""
  if isinstance(leaf, LazyArray):
    return leaf
  return LazyArray(tuple(leaf.shape), np.dtype(leaf.dtype), lambda: np.asarray(leaf))
