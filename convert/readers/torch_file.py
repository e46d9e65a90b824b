"""Files of torch.save, read as weights only: nothing in them is executed."""

import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from .source import ReadError, Source, Tensor, check_file

# Keys under which training programs save the weights.
KNOWN_PARTS = ("state_dict", "model_state_dict", "model", "module", "generator", "speaker_encoder")
_NOT_WEIGHTS = ("optimizer", "optimizer_state_dict", "optim", "scheduler", "lr_scheduler", "scaler")
_SAVE_AGAIN = (
  "load it where it was made, and save its state dict: torch.save(model.state_dict(), ...)"
)
_RENEW_AFTER_BYTES = 256 << 20
_NAMES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64"
_DTYPES = {getattr(torch, name): np.dtype(name) for name in _NAMES.split()}  # with ml_dtypes


# Stubs of classes that DeepSpeed's files name for values that are not needed here, so that no code
# of DeepSpeed runs.
class Stub:
  """Accepts any arguments and any state, and ignores them."""

  def __init__(self, *args):
    pass

  def __setstate__(self, state):
    pass


class Stage(int):
  """A stage of ZeRO, an enumeration in DeepSpeed."""


PICKLE_STUBS: tuple[tuple[type, str], ...] = (
  (Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
  (Stub, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
  (Stub, "deepspeed.runtime.fp16.loss_scaler.LossScalerBase"),
  (Stub, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
  (Stub, "deepspeed.utils.tensor_fragment.fragment_address"),
)


def open_torch(path: Path, part: str | None = None) -> Source:
  """Opens a file of torch.save.

  Args:
    path: a zip file (torch 1.6 and later; mapped, not loaded) or an older one (loaded whole).
    part: key of the dict to open. Default: the whole file if it has tensors at its top level, else
      the only dict in it with weights.

  Raises:
    ReadError: if the file is damaged, holds more than weights, or `part` is missing or needed.
  """
  file = TorchFile(path)
  keys = _find_part(path, file.content()) if part is None else (part,)
  chosen, ignored = _descend(path, file.content(), keys)
  entries = []
  for names, value in _leaves(chosen):
    name = ".".join(names)
    if isinstance(value, torch.Tensor):
      tensor = describe(path, name, value)
      entries.append((tensor, partial(file.read, (*keys, *names), tensor)))
    else:
      ignored.append(f"{'.'.join([*map(str, keys), name])} ({type(value).__name__})")
  if not entries:
    raise ReadError(f"{path}: no tensors in it; its top level has {_listed(file.content())}")
  found = ".".join(map(str, keys))
  notes = [f"{path.name}: opened the part {found!r}"] if found and part is None else []
  if not file.mapped:
    notes.append(f"{path.name}: saved by torch before 1.6, so it is loaded as a whole")
  return Source(path, entries, ignored=ignored, notes=notes)


def read_dict(path: Path, key: str) -> dict | None:
  """Returns the dict under a key of a file of torch.save; None if there is none."""
  content = TorchFile(path).content()
  value = content.get(key) if isinstance(content, dict) else None
  return value if isinstance(value, dict) else None


class TorchFile:
  """The content of a file of torch.save; tensors are mapped if the format allows it."""

  def __init__(self, path: Path, remedy: str = _SAVE_AGAIN):
    check_file(path)
    self.path, self._remedy = path, remedy
    with path.open("rb") as file:
      self.mapped = file.read(4) == b"PK\x03\x04"  # a zip file
    self._records = _check_zip(path) if self.mapped else Counter()
    self._content: Any = None
    self._touched = 0

  def content(self) -> Any:
    if self._content is None:
      self._content = load_weights_only(self.path, mmap=self.mapped, remedy=self._remedy)
      if self.mapped:
        self._check_storages()
    return self._content

  def read(self, keys: tuple, tensor: Tensor) -> np.ndarray:
    return to_numpy(self.tensor(keys, tensor.nbytes))

  def tensor(self, keys: tuple, nbytes: int) -> torch.Tensor:
    """Returns the mapped tensor under `keys`, of which the caller reads `nbytes`."""
    # Pages that were read stay resident until the file is mapped anew.
    self._touched += nbytes
    if self.mapped and self._touched > _RENEW_AFTER_BYTES:
      self._content, self._touched = None, nbytes
    value = self.content()
    for key in keys:
      value = _children(value)[key] if isinstance(value, dict) else value[key]
    return value

  def _check_storages(self):
    """A storage that is longer than its record would have bytes of the next ones."""
    storages = [
      leaf.untyped_storage()
      for _, leaf in _leaves(self._content)
      if isinstance(leaf, torch.Tensor)
      and leaf.layout == torch.strided
      and leaf.device.type == "cpu"
    ]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    if lost := Counter(sizes.values()) - self._records:
      raise ReadError(
        f"{self.path}: a tensor needs {next(iter(lost))} bytes, which no record has; copy it again"
      )


def load_weights_only(path: Path, *, mmap: bool, remedy: str = _SAVE_AGAIN) -> Any:
  """Runs torch.load restricted to weights. Raises ReadError for anything that torch refuses."""
  try:
    with torch.serialization.safe_globals(list(PICKLE_STUBS)):
      return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
  except Exception as error:  # a broken or hostile pickle can raise anything
    allowed = {name for _, name in PICKLE_STUBS}
    if needed := [name for name in _classes_needed(path, error) if name not in allowed]:
      raise ReadError(
        f"{path}: needs {', '.join(needed)}; only weights are read, and no code in a file is"
        f" executed. If you trust the file, {remedy}"
      ) from error
    # The first part of the message recommends to switch the protection off.
    reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())[:300]
    raise ReadError(
      f"{path}: not a file of torch.save, or cut short: {reason}; copy it again"
    ) from error


def describe(path: Path, name: str, tensor: torch.Tensor) -> Tensor:
  """Returns name, shape and dtype of a tensor. Raises ReadError if it is not plain and dense."""
  where = f"{path}: tensor {name!r}"
  if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
    raise ReadError(
      f"{where} is {tensor.layout}, {tensor.dtype}, on {tensor.device}; it must be plain and dense"
    )
  if tensor.dtype not in _DTYPES:
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
    raise ReadError(f"{where} has dtype {tensor.dtype}; supported are {allowed}")
  found = Tensor(name, tuple(tensor.shape), _DTYPES[tensor.dtype], path)
  if found.nbytes > path.stat().st_size:
    raise ReadError(f"{where} of shape {list(found.shape)} is larger than the file")
  return found


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
  """Copies a tensor in C order, with the same bits."""
  tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _check_zip(path: Path) -> Counter:
  """Checks the records of a zip file. Returns the number of data records of each size."""
  try:
    with zipfile.ZipFile(path) as archive:
      infos = archive.infolist()
      if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise ReadError(
          f"{path}: a TorchScript program, not weights; save its state_dict() with torch.save"
        )
      if packed := [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]:
        raise ReadError(f"{path}: the record {packed[0]!r} is compressed; torch.save never does so")
      if len({info.filename for info in infos}) != len(infos):
        raise ReadError(f"{path}: has the same record twice; copy it again")
      for info in infos:
        if "/data/" not in info.filename:
          archive.read(info)  # compares the checksum; those of the tensors would take too long
      return Counter(info.file_size for info in infos if "/data/" in info.filename)
  except ReadError:
    raise
  except Exception as error:  # zipfile raises its own, struct's, OS and value errors
    raise ReadError(f"{path}: damaged or cut short: {error}; copy it again") from error


def _classes_needed(path: Path, error: Exception) -> list[str]:
  """Names of the classes and functions that a pickle needs beyond weights."""
  try:
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
  except Exception:  # not a zip file, or an odd pickle; torch's own error names the first class
    return re.findall(r"GLOBAL (\S+)", str(error))


def _children(value) -> dict:
  """Entries of a dict by the text of their keys."""
  return {str(key): child for key, child in value.items()}


def _leaves(value, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  if isinstance(value, dict):
    for key, child in _children(value).items():
      yield from _leaves(child, (*names, key))
  else:
    yield names, value


def _find_part(path: Path, content) -> tuple[str, ...]:
  """Keys of the innermost dict with all weights, from the outside in."""
  children = _children(content) if isinstance(content, dict) else {}
  if any(isinstance(child, torch.Tensor) for child in children.values()):
    return ()
  holding = [
    key
    for key, child in children.items()
    if isinstance(child, dict)
    and any(isinstance(leaf, torch.Tensor) for _, leaf in _leaves(child))
    and key not in _NOT_WEIGHTS
  ]
  choices = [key for key in holding if key in KNOWN_PARTS] or holding
  if len(choices) > 1:
    raise ReadError(
      f"{path}: several parts hold tensors: {', '.join(choices)}; save the one to convert to a file"
      " of its own with torch.save"
    )
  return (choices[0], *_find_part(path, children[choices[0]])) if choices else ()


def _descend(path: Path, content, keys: tuple[str, ...]) -> tuple[dict, list[str]]:
  """Returns the part under `keys`, and the names of the entries beside it on every level."""
  others = []
  for depth, key in enumerate(keys):
    children = _children(content) if isinstance(content, dict) else {}
    if key not in children:
      raise ReadError(f"{path}: no part {key!r} in it; it has {_listed(content)}")
    others += [".".join([*keys[:depth], name]) for name in children if name != key]
    content = children[key]
  if not isinstance(content, dict):
    raise ReadError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
  return content, others


def _listed(content) -> str:
  if not isinstance(content, dict):
    return f"a {type(content).__name__}"
  names = [f"{key!r} ({type(child).__name__})" for key, child in _children(content).items()]
  return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") or "nothing"
