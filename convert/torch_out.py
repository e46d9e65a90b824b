"""Writes files of torch.save: a plain dict of tensors, as the original reads them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from .engine import Outgoing


def write_torch(path: Path, tensors: Sequence[Outgoing], arrays: Iterable[np.ndarray]) -> None:
  """Writes tensors as a state dict; all of them are in memory at once."""
  values = {tensor.name: to_torch(array) for tensor, array in zip(tensors, arrays, strict=True)}
  torch.save(values, path)


def to_torch(array: np.ndarray) -> torch.Tensor:
  """The same bits as a tensor; NumPy's bfloat16 is not one that torch knows."""
  array = np.array(array, order="C")  # an own one, which torch may write to
  if array.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(array)
