"""Safetensors files, by the package `safetensors`; each tensor is mapped by itself."""

import json
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from .source import BFLOAT16, ReadError, Source, Tensor, check_shape

_MAPPED_BYTES = 8 << 20
_NUMBERS = "U8 U16 U32 U64 I8 I16 I32 I64 F16 F32 F64".split()
DTYPES = {
  "BOOL": np.dtype(bool),
  "BF16": BFLOAT16,
  **{code: np.dtype(f"<{code[0].lower()}{int(code[1:]) // 8}") for code in _NUMBERS},
}


def open_safetensors(path: Path) -> Source:
  """Opens a file. Raises ReadError if its header is damaged, or a dtype is not supported."""
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
    if entry["dtype"] not in DTYPES:
      supported = ", ".join(DTYPES)
      raise ReadError(f"{where} has dtype {entry['dtype']}; supported are {supported}")
    dtype = DTYPES[entry["dtype"]]
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
