"""Files of torch.save: read as weights only and never executed."""

from __future__ import annotations

import pickletools
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

# Where training programs put the weights, beside their optimizer's state.
KNOWN_PARTS = ("state_dict", "model_state_dict", "model", "module", "generator", "speaker_encoder")
_NOT_WEIGHTS = ("optimizer", "optimizer_state_dict", "optim", "scheduler", "lr_scheduler", "scaler")
# Magic number, protocol, machine, content, keys of the storages.
_PICKLES_IN_OLD_FILE = 5
_SAVE_AGAIN = (
  "load it where it was made and save its state dict alone: torch.save(model.state_dict(), ...)"
)
_ZIP_START = b"PK\x03\x04"
_RENEW_AFTER_BYTES = 256 << 20
_DTYPES = {
  torch.bool: np.dtype(np.bool_),
  torch.uint8: np.dtype(np.uint8),
  torch.int8: np.dtype(np.int8),
  torch.int16: np.dtype(np.int16),
  torch.int32: np.dtype(np.int32),
  torch.int64: np.dtype(np.int64),
  torch.float16: np.dtype(np.float16),
  torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
  torch.float32: np.dtype(np.float32),
  torch.float64: np.dtype(np.float64),
}


# torch.load builds only the classes it is given. DeepSpeed's files name classes of that package for
# values that a converter has no use for; these stubs are built in their place, so that DeepSpeed
# need not be installed and nothing of it runs.
class Stub:
  """Takes any arguments and any state and does nothing with them."""

  def __init__(self, *args):
    pass

  def __setstate__(self, state):
    pass


class Stage(int):
  """The number that DeepSpeed's enumeration of ZeRO's stages stands for."""


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
    part: keys joined by "." of the dict to take; "" for all of the file; None to find it: all of
      the file if tensors stand at its top, else the one dict in it that holds weights.

  Raises:
    ReadError: if the file is broken, holds more than weights, or `part` is missing or needed.
  """
  file = TorchFile(path)
  keys = _find_part(path, file.content(), part)
  chosen = _descend(path, file.content(), keys)
  entries, ignored = [], _others(file.content(), keys)
  for names, value in _leaves(chosen):
    name = ".".join(names)
    if isinstance(value, torch.Tensor):
      tensor = describe(path, name, value)
      entries.append((tensor, partial(file.read, (*keys, *names), tensor)))
    else:
      ignored.append(f"{'.'.join([*map(str, keys), name])} ({type(value).__name__})")
  if not entries:
    raise ReadError(f"{path}: no tensors in it; at its top are {_listed(file.content())}")
  found = ".".join(map(str, keys))
  notes = [f"{path.name}: took the part {found!r}"] if found and part is None else []
  if not file.mapped:
    notes.append(f"{path.name}: saved by torch before 1.6, so all of it is held in memory")
  return Source(path, entries, part=found, ignored=ignored, notes=notes)


class TorchFile:
  """The content of a file of torch.save, its tensors mapped from disk where the format allows."""

  def __init__(self, path: Path, remedy: str = _SAVE_AGAIN):
    check_file(path)
    self.path, self._remedy = path, remedy
    with path.open("rb") as file:
      self.mapped = file.read(4) == _ZIP_START
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
    """The tensor under `keys`, still in the file, of which `nbytes` are going to be read."""
    # Pages once touched stay resident as long as the file is mapped, so the map is made anew.
    self._touched += nbytes
    if self.mapped and self._touched > _RENEW_AFTER_BYTES:
      self._content, self._touched = None, nbytes
    value = self.content()
    for key in keys:
      value = _children(value)[key] if isinstance(value, dict) else value[key]
    return value

  def _check_storages(self):
    """A storage longer than its record would be filled with bytes of the next ones."""
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
        f"{self.path}: a tensor wants {next(iter(lost))} bytes, but no record in it has that size"
      )


def load_weights_only(path: Path, *, mmap: bool, remedy: str = _SAVE_AGAIN) -> Any:
  """torch.load restricted to weights; what it refuses becomes a ReadError that says why.

  Args:
    path: the file.
    mmap: whether the tensors stay in the file until they are used.
    remedy: ends the error about a file that needs more.
  """
  try:
    with torch.serialization.safe_globals(list(PICKLE_STUBS)):
      return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
  except Exception as error:  # a broken or hostile pickle can raise anything
    allowed = {name for _, name in PICKLE_STUBS}
    if needed := [name for name in _classes_needed(path) if name not in allowed]:
      raise ReadError(
        f"{path}: needs {', '.join(needed)} to be run or built; files are read as weights only, "
        f"nothing in them is executed. If you trust the file, {remedy}"
      ) from error
    # The message's first part recommends to switch the protection off.
    reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())[:300]
    raise ReadError(
      f"{path}: not a file of torch.save, or cut short: {reason}; copy it again"
    ) from error


def describe(path: Path, name: str, tensor: torch.Tensor) -> Tensor:
  """What the file says about a tensor, once it is known to be a plain one."""
  where = f"{path}: tensor {name!r}"
  if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
    raise ReadError(
      f"{where} is {tensor.layout}, {tensor.dtype}, on {tensor.device}; only plain "
      "dense tensors are read"
    )
  if tensor.dtype not in _DTYPES:
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
    raise ReadError(f"{where} has dtype {tensor.dtype}; read are {allowed}")
  found = Tensor(name, tuple(tensor.shape), _DTYPES[tensor.dtype], path)
  if found.nbytes > path.stat().st_size:
    raise ReadError(f"{where} of shape {list(found.shape)} is larger than the file")
  return found


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
  """A copy in C order with the same bits; NumPy knows bfloat16 only through ml_dtypes."""
  tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _check_zip(path: Path) -> Counter:
  """Returns how many data records there are of each size, after a look at the directory."""
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
        raise ReadError(f"{path}: a record stands in it twice")
      for info in infos:
        if "/data/" not in info.filename:
          archive.read(info)  # compares the checksum; the tensors' own are left to the disk
      return Counter(info.file_size for info in infos if "/data/" in info.filename)
  except ReadError:
    raise
  except Exception as error:  # zipfile raises its own, struct's, OS and value errors
    raise ReadError(f"{path}: broken or cut short: {error}; copy it again") from error


def _classes_needed(path: Path) -> list[str]:
  """Names what a pickle wants beyond weights, by looking through it without loading it."""
  try:
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
  except Exception:  # not a zip file, or a pickle too odd to list
    pass
  needed: list[str] = []
  texts: list[str] = []
  try:
    with path.open("rb") as file:
      for _ in range(_PICKLES_IN_OLD_FILE):
        for opcode, argument, _ in pickletools.genops(file):
          if opcode.name in ("GLOBAL", "INST"):
            needed.append(str(argument).replace(" ", "."))
          elif opcode.name == "STACK_GLOBAL":
            needed.append(".".join(texts[-2:]))
          elif isinstance(argument, str):
            texts.append(argument)
  except Exception:  # whatever else is wrong with it, torch.load has told already
    pass
  return sorted({name for name in needed if not name.startswith(("torch", "collections."))})


def _children(value) -> dict:
  """A dict's entries by the key's text."""
  return {str(key): child for key, child in value.items()}


def _leaves(value, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  if isinstance(value, dict):
    for key, child in _children(value).items():
      yield from _leaves(child, (*names, key))
  else:
    yield names, value


def _find_part(path: Path, content, part: str | None) -> tuple[str, ...]:
  if part is not None:
    return _named_part(path, content, part)
  keys: tuple[str, ...] = ()
  while isinstance(content, dict):
    children = _children(content)
    if any(isinstance(child, torch.Tensor) for child in children.values()):
      break
    holding = [
      key
      for key, child in children.items()
      if isinstance(child, dict)
      and any(isinstance(leaf, torch.Tensor) for _, leaf in _leaves(child))
      and key not in _NOT_WEIGHTS
    ]
    known = [key for key in holding if key in KNOWN_PARTS]
    choices = known or holding
    if len(choices) > 1:
      raise ReadError(f"{path}: several parts hold tensors: {', '.join(choices)}; name one of them")
    if not choices:
      break
    keys, content = (*keys, choices[0]), children[choices[0]]
  return keys


def _named_part(path: Path, content, part: str) -> tuple[str, ...]:
  """The keys of a part; a key may itself hold dots, so the longest that fits is taken."""
  keys: tuple[str, ...] = ()
  rest = part
  while rest:
    children = _children(content) if isinstance(content, dict) else {}
    fitting = [key for key in children if rest == key or rest.startswith(f"{key}.")]
    if not fitting or not isinstance(children[max(fitting, key=len)], dict):
      raise ReadError(f"{path}: no part {part!r}; at that place are {_listed(content)}")
    key = max(fitting, key=len)
    keys, content, rest = (*keys, key), children[key], rest[len(key) + 1 :]
  return keys


def _descend(path: Path, content, keys: tuple[str, ...]):
  for key in keys:
    content = _children(content)[key]
  if not isinstance(content, dict):
    raise ReadError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
  return content


def _others(content, keys: tuple[str, ...]) -> list[str]:
  """What stands beside the chosen part, on every level down to it."""
  found = []
  for depth, key in enumerate(keys):
    children = _children(content)
    found += [".".join([*keys[:depth], name]) for name in children if name != key]
    content = children[key]
  return found


def _listed(content) -> str:
  if not isinstance(content, dict):
    return f"a {type(content).__name__}"
  names = [f"{key!r} ({type(child).__name__})" for key, child in _children(content).items()]
  return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") or "nothing"
