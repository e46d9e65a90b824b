"""Writes safetensors, and files of torch.save.

The writer of the package `safetensors` needs all tensors of a file in memory; this one needs one.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from ..readers.safetensors_file import DTYPES
from .engine import Outgoing, grouped
from .rules import row_blocks

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_shards(
  folder: Path,
  tensors: Sequence[Outgoing],
  arrays: Iterable[np.ndarray],
  *,
  shard_bytes: int,
  stem: str = "model",
) -> None:
  """Writes `stem.safetensors`, or numbered shards with an index, in Hugging Face's layout.

  Args:
    tensors, arrays: descriptions and values, in the same order; values are consumed one by one.
    shard_bytes: maximum size of a file, unless one tensor is larger.
  """
  shards = grouped(tensors, shard_bytes)
  count = len(shards)
  names = [f"{stem}-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
  names = names if count > 1 else [f"{stem}.safetensors"]
  values = iter(arrays)
  for name, shard in zip(names, shards):
    _write_file(folder / name, shard, values)
  if count > 1:
    index = {
      "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
      "weight_map": {t.name: name for name, shard in zip(names, shards) for t in shard},
    }
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_file(path: Path, tensors: Sequence[Outgoing], values) -> None:
  header: dict = {"__metadata__": {"format": "pt"}}
  end = 0
  for tensor in tensors:
    start, end = end, end + tensor.nbytes
    header[tensor.name] = {
      "dtype": _CODES[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # aligns the data
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
      array = next(values)
      assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), tensor.name
      for block in row_blocks(array):
        file.write(block.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
      del array  # before the next one is read


def write_torch(path: Path, tensors: Sequence[Outgoing], arrays: Iterable[np.ndarray]) -> None:
  """Writes tensors as a state dict, which is in memory as a whole."""
  torch.save(state_dict(tensors, arrays), path)


def state_dict(
  tensors: Sequence[Outgoing], arrays: Iterable[np.ndarray]
) -> dict[str, torch.Tensor]:
  return {tensor.name: to_torch(array) for tensor, array in zip(tensors, arrays, strict=True)}


def to_torch(array: np.ndarray) -> torch.Tensor:
  """Copies an array, bit for bit. NumPy's bfloat16 is not a dtype that torch accepts."""
  array = np.array(array, order="C")
  if array.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(array)
