"""Safetensors files: the header is checked in full, then each tensor is read by itself."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np

from .source import BFLOAT16, ReadError, Source, Tensor, check_shape, parse_object

_MAX_HEADER_BYTES = 100_000_000
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
    ReadError: if the header is not one, or disagrees with itself or with the file's size: the data
      must be covered by the tensors from its first to its last byte, without gap or overlap.

  Source: the format's description in huggingface/safetensors.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
      raise ReadError(
        f"{path}: not a safetensors file or cut short: its header should take {length} bytes, the "
        f"file has {size} (a header may take {_MAX_HEADER_BYTES})"
      )
    text = file.read(length)
  header = parse_object(f"{path}: header", text)
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise ReadError(f"{path}: header: __metadata__ must map names to strings")

  start = 8 + length
  spans = []
  for name, entry in header.items():
    tensor, (begin, end) = _check_entry(path, name, entry)
    spans.append((begin, end, tensor))
  spans.sort(key=lambda span: span[:2])
  position = 0
  for begin, end, tensor in spans:
    if begin != position:
      what = "overlaps the one before" if begin < position else "leaves a gap before it"
      raise ReadError(
        f"{path}: tensor {tensor.name!r} begins at byte {begin}, not {position}: it {what}"
      )
    position = end
  if start + position != size:
    raise ReadError(
      f"{path}: the header tells of {position} bytes of data, the file has {size - start}; it is "
      "cut short or has something behind; copy it again"
    )
  return Source(
    path,
    [(tensor, partial(read_span, tensor, start + begin)) for begin, _, tensor in spans],
  )


def read_span(tensor: Tensor, offset: int) -> np.ndarray:
  """Reads the bytes of `tensor` from `offset` in its file on."""
  if tensor.nbytes >= _MAPPED_BYTES and tensor.file.stat().st_size >= offset + tensor.nbytes:
    # Mapped on its own, and privately, so that its pages go with the array; fresh memory for a
    # copy would cost more than the reading.
    mapped = np.memmap(tensor.file, np.uint8, "c", offset, (tensor.nbytes,))
    return mapped.view(np.ndarray).view(tensor.dtype).reshape(tensor.shape)
  data = np.empty(tensor.nbytes, np.uint8)
  with tensor.file.open("rb", buffering=0) as file:
    file.seek(offset)
    done = 0
    while done < data.size and (got := file.readinto(data.data[done:])):
      done += got
  if done < data.size:
    raise ReadError(f"{tensor.file}: tensor {tensor.name!r} ends after {done} bytes of {data.size}")
  return data.view(tensor.dtype).reshape(tensor.shape)


def _check_entry(path: Path, name: str, entry) -> tuple[Tensor, tuple[int, int]]:
  where = f"{path}: tensor {name!r}"
  if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
    raise ReadError(f"{where} needs dtype, shape and data_offsets, got {str(entry)[:80]}")
  dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
  if dtype is None:
    raise ReadError(f"{where} has dtype {entry['dtype']!r}; read are {', '.join(_DTYPES)}")
  shape, offsets = entry["shape"], entry["data_offsets"]
  if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
    raise ReadError(
      f"{where} has shape {shape!r} and data_offsets {offsets!r}; these must be "
      "lists of whole numbers, none negative, and two offsets"
    )
  shape = check_shape(where, shape, dtype)
  begin, end = offsets
  if end - begin != math.prod(shape) * dtype.itemsize:
    raise ReadError(
      f"{where} of shape {list(shape)} and dtype {dtype} takes "
      f"{math.prod(shape) * dtype.itemsize} bytes, but its data_offsets {offsets} span "
      f"{end - begin}"
    )
  return Tensor(name, shape, dtype, path), (begin, end)


def _is_sizes(value) -> bool:
  return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
