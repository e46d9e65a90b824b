"""How a PyTorch tensor becomes one of our arrays, and back, bit for bit."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

Shape = tuple[int, ...]
# Rows that are copied at a time: a cache holds one line of each (1.5 GB/s against 0.5 in one go).
_BAND = 128


@dataclasses.dataclass(frozen=True)
class Transform:
  """A reordering of an array's elements and its inverse.

  Attributes:
    ndim, torch_ndim: axes on our side and on PyTorch's.
    shape, torch_shape: shape on our side from PyTorch's, and back.
    to_jax, to_torch: the same for an array, as views: what writes them copies them anyway.
  """

  ndim: int | None
  torch_ndim: int | None
  shape: Callable[[Shape], Shape]
  torch_shape: Callable[[Shape], Shape]
  to_jax: Callable[[np.ndarray], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]


def transposed(x_RC: np.ndarray) -> np.ndarray:
  """The transpose of a matrix, in C order."""
  out_CR = np.empty(x_RC.shape[::-1], x_RC.dtype)
  for row in range(0, len(x_RC), _BAND):
    out_CR[:, row : row + _BAND] = x_RC[row : row + _BAND].T
  return out_CR


IDENTITY = Transform(None, None, tuple, tuple, lambda x: x, lambda x: x)

# nn.Linear keeps [out, in], our kernels are [in, out].
TRANSPOSE = Transform(2, 2, lambda s: s[::-1], lambda s: s[::-1], np.transpose, np.transpose)

# A depthwise nn.Conv1d keeps [channels, 1, taps], our kernel is [taps, channels].
DEPTHWISE = Transform(
  2,
  3,
  lambda s: (s[2], s[0]) if s[1] == 1 else s,
  lambda s: (s[1], 1, s[0]),
  lambda x_D1K: x_D1K[:, 0].T,
  lambda x_KD: x_KD.T[:, None],
)

# nn.Conv1d keeps [out, in, taps], our kernels are [taps, in, out]; in is that of a group.
CONVOLUTION = Transform(
  3, 3, lambda s: s[::-1], lambda s: s[::-1], np.transpose, np.transpose
)  # fmt: skip

_BLOCK = 1024


def row_blocks(x: np.ndarray) -> Iterator[np.ndarray]:
  """An array in C order, in pieces of its rows; of a transposed one, no whole copy is made."""
  if x.flags.c_contiguous:
    yield x
  elif x.ndim == 2:
    for row in range(0, len(x), _BLOCK):
      yield transposed(x[row : row + _BLOCK].T)
  else:
    yield np.ascontiguousarray(x)
