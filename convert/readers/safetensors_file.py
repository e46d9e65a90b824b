"""Safetensors files, by the package `safetensors`; each tensor is mapped by itself."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from .source import BFLOAT16, ReadError, Source, Tensor, check_shape

_MAPPED_BYTES = 8 << 20
_DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype("<u1"),
  "I8": np.dtype("<i1"),
  "U16": np.dtype("<u2"),
  "I16": np.dtype("<i2"),
  "U32": np.dtype("<u4"),
  "I32": np.dtype("<i4"),
  "U64": np.dtype("<u8"),
  "I64": np.dtype("<i8"),
  "F16": np.dtype("<f2"),
  "BF16": BFLOAT16,
  "F32": np.dtype("<f4"),
  "F64": np.dtype("<f8"),
}


def open_safetensors(path: Path) -> Source:
  """Opens one safetensors file.

  Raises:
    ReadError: if the package refuses its header, or a dtype is not supported.
  """
  try:
    # Checks sizes, offsets, gaps and overlaps, but does not show the offsets.
    with safe_open(path, framework="numpy"), path.open("rb") as file:
      start = 8 + int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(start - 8))
  except SafetensorError as error:
    raise ReadError(
      f"{path}: not a safetensors file, or cut short: {error}; copy it again"
    ) from error
  header.pop("__metadata__", None)
  entries = []
  for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
    where = f"{path}: tensor {name!r}"
    if entry["dtype"] not in _DTYPES:
      supported = ", ".join(_DTYPES)
      raise ReadError(f"{where} has dtype {entry['dtype']}; supported are {supported}")
    dtype = _DTYPES[entry["dtype"]]
    tensor = Tensor(name, check_shape(where, entry["shape"], dtype), dtype, path)
    entries.append((tensor, partial(read_span, tensor, start + entry["data_offsets"][0])))
  return Source(path, entries)


def read_span(tensor: Tensor, offset: int) -> np.ndarray:
  """Reads the bytes of a tensor that begin at `offset` in its file.

  The package's own `get_tensor` copies. Large tensors are mapped one by one instead, so that their
  pages are released with the array. The mapping is private: arrays are writable, files unchanged.
  """
  if not tensor.nbytes:
    return np.empty(tensor.shape, tensor.dtype)
  try:
    data = (
      np.memmap(tensor.file, np.uint8, "c", offset, (tensor.nbytes,)).view(np.ndarray)
      if tensor.nbytes >= _MAPPED_BYTES
      else np.fromfile(tensor.file, np.uint8, tensor.nbytes, offset=offset)
    )
  except ValueError:  # the file is now shorter than its header
    data = np.empty(0, np.uint8)
  if data.size < tensor.nbytes:
    raise ReadError(f"{tensor.file}: cut short within tensor {tensor.name!r}; copy it again")
  return data.view(tensor.dtype).reshape(tensor.shape)
