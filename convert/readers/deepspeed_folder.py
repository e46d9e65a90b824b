"""DeepSpeed's training checkpoints (ZeRO 1, 2 and 3), read without DeepSpeed.

The file of every rank has a slice of the trained float32 weights; the model file has names and
shapes, and frozen weights. ZeRO 1 and 2 split the concatenated weights of a group into equal
slices, ZeRO 3 splits every weight.

Source: zero_to_fp32.py of microsoft/DeepSpeed.
"""

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .source import ReadError, Source, Tensor, check_shape
from .torch_file import TorchFile, describe, to_numpy

_REMEDY = "run the zero_to_fp32.py in that folder, and convert the file that it writes"
_SLICE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt", re.ASCII)
_STATE = "optimizer_state_dict"
_GROUPS = {
  1: "single_partition_of_fp32_groups",
  2: "single_partition_of_fp32_groups",
  3: "fp32_flat_groups",
}


class _Slice(NamedTuple):
  """Elements [start, start + length) of a flat tensor in one rank's file."""

  file: TorchFile
  keys: tuple
  start: int
  length: int


def is_deepspeed(path: Path) -> bool:
  """Whether a folder is a DeepSpeed checkpoint, or has a file `latest` that names one."""
  return (path / "latest").is_file() or any(path.glob("*_optim_states.pt"))


def open_deepspeed(path: Path) -> Source:
  """Opens a checkpoint folder (`global_step*`), or the latest one of the folder above.

  Trained weights are the optimizer's, in float32; buffers and frozen weights are as stored.

  Raises:
    ReadError: if a file is missing or damaged, the files disagree, the model was split by tensor
      parallelism, or a file needs other classes than PICKLE_STUBS.
  """
  folder = _tagged_folder(path)
  try:
    return _open_zero(path, folder)
  except ReadError:
    raise
  except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
    raise ReadError(f"{folder}: not a layout of DeepSpeed ({error}); {_REMEDY}") from error


def _open_zero(path: Path, folder: Path) -> Source:
  ranks = _rank_files(folder)
  states = [_dict(file, file.content(), _STATE) for file in ranks]
  stage = states[0].get("zero_stage")
  if stage not in _GROUPS:
    raise ReadError(f"{ranks[0].path}: ZeRO stage {stage!r}; supported are 1, 2 and 3")
  counts = [state.get("partition_count") for state in states]
  if any((max(c) if isinstance(c, list) and c else c) != len(ranks) for c in counts):
    raise ReadError(
      f"{folder}: {len(ranks)} files *_optim_states.pt, but partition_count is {counts[0]}; if one"
      " is missing, copy it too"
    )
  pieces = [_flat_groups(file, state, _GROUPS[stage]) for file, state in zip(ranks, states)]
  models = _model_files(folder, len(ranks) if stage == 3 else 1)
  content = models[0].content()
  shapes = content.get("param_shapes")
  if not isinstance(shapes, list) or not all(isinstance(group, dict) for group in shapes):
    raise ReadError(f"{models[0].path}: no param_shapes with the names of the weights; {_REMEDY}")
  cut = _cut_each if stage == 3 else _cut_joined
  entries = []
  for name, shape, slices in cut(folder, pieces, shapes):
    file = slices[0].file.path if slices else models[0].path
    tensor = Tensor(str(name), tuple(shape), np.dtype(np.float32), file)
    entries.append((tensor, partial(_read_joined, tensor, slices)))
  entries += _frozen(models, stage)
  entries += _buffers(models[0])
  entries += _shared(models[0], {tensor.name: (tensor, read) for tensor, read in entries})
  names = {tensor.name for tensor, _ in entries}
  left = [f"module.{name}" for name in content.get("module") or {} if name not in names]
  notes = [
    f"{folder.name}: ZeRO stage {int(stage)} of {len(ranks)} ranks, trained weights in float32"
  ]
  return Source(path, entries, notes=notes, ignored=left)


def _tagged_folder(path: Path) -> Path:
  if any(path.glob("*_optim_states.pt")):
    return path
  tag = (path / "latest").read_text("utf-8", errors="replace").strip()
  if not tag or Path(tag).name != tag or "\\" in tag or tag == "..":
    raise ReadError(f"{path / 'latest'}: names {tag[:80]!r}, which is not a folder beside it")
  if not (path / tag).is_dir() or not any((path / tag).glob("*_optim_states.pt")):
    raise ReadError(
      f"{path / 'latest'}: names {tag!r}, which is not a ZeRO checkpoint (no *_optim_states.pt);"
      " without ZeRO, give the file mp_rank_00_model_states.pt"
    )
  return path / tag


def _rank_files(folder: Path) -> list[TorchFile]:
  ranks = {}
  for file in folder.glob("*_optim_states.pt"):
    match = _SLICE.fullmatch(file.name)
    if not match or int(match[2]) or int(match[1]) in ranks:
      raise ReadError(
        f"{file}: not a plain ZeRO checkpoint (tensor and expert parallelism are not supported);"
        f" {_REMEDY}"
      )
    ranks[int(match[1])] = file
  if missing := sorted(set(range(max(ranks) + 1)) - set(ranks)):
    raise ReadError(f"{folder}: the file of rank {missing[0]} is missing; copy it too")
  return [TorchFile(ranks[i], _REMEDY) for i in range(len(ranks))]


def _model_files(folder: Path, count: int) -> list[TorchFile]:
  paths = [folder / f"zero_pp_rank_{i}_mp_rank_00_model_states.pt" for i in range(count)]
  if count == 1 and (whole := folder / "mp_rank_00_model_states.pt").is_file():
    paths = [whole]
  for path in paths:
    if not path.is_file():
      raise ReadError(f"{path}: missing; copy it too")
  files = [TorchFile(path, _REMEDY) for path in paths]
  for file in files:
    if not isinstance(file.content(), dict):
      raise ReadError(f"{file.path}: holds a {type(file.content()).__name__}, not a dict")
  return files


def _dict(file: TorchFile, content: Any, key: str) -> dict:
  value = content.get(key) if isinstance(content, dict) else None
  if not isinstance(value, dict):
    raise ReadError(f"{file.path}: no dict {key!r} in it")
  return value


def _flat_groups(file: TorchFile, state: dict, key: str) -> list[_Slice]:
  groups = state.get(key)
  if not isinstance(groups, list) or not all(
    isinstance(g, torch.Tensor) and g.ndim == 1 and g.dtype == torch.float32 for g in groups
  ):
    raise ReadError(f"{file.path}: {key!r} is not a list of flat float32 tensors")
  for i, group in enumerate(groups):
    describe(file.path, f"{key}[{i}]", group)
  return [_Slice(file, (_STATE, key, i), 0, group.numel()) for i, group in enumerate(groups)]


def _elements(where: str, shape: Any) -> int:
  if not isinstance(shape, (torch.Size, tuple, list)) or not all(type(n) is int for n in shape):
    raise ReadError(f"{where} has the shape {shape!r}")
  return math.prod(check_shape(where, shape, np.dtype(np.float32)))


def _slices(pieces: list[_Slice], start: int, count: int) -> list[_Slice]:
  """Returns the parts of concatenated pieces that have the elements [start, start + count)."""
  found, begin = [], 0
  for piece in pieces:
    first, end = max(start, begin), min(start + count, begin + piece.length)
    if first < end:
      found.append(piece._replace(start=first - begin, length=end - first))
    begin += piece.length
  return found


def _cut_joined(folder: Path, pieces: list[list[_Slice]], shapes) -> Iterator:
  """ZeRO 1 and 2: the concatenated weights of a group, split into the slices of ranks."""
  if any(len(of_rank) != len(shapes) for of_rank in pieces):
    raise ReadError(f"{folder}: {len(shapes)} groups of names, {len(pieces[0])} of weights")
  for i, group in enumerate(shapes):
    of_group = [of_rank[i] for of_rank in pieces]
    position, held = 0, sum(piece.length for piece in of_group)
    for name, shape in group.items():
      count = _elements(f"{folder}: tensor {name!r}", shape)
      yield name, shape, _slices(of_group, position, count)
      position += count
    # The end is padded to a multiple of twice the ranks, differently in different releases.
    align = 2 * len(pieces)
    if not position <= held or -(-position // align) != -(-held // align):
      raise ReadError(
        f"{folder}: group {i} has {position} values by its names, {held} in its files; {_REMEDY}"
      )


def _cut_each(folder: Path, pieces: list[list[_Slice]], shapes) -> Iterator:
  """ZeRO 3: every weight split into equal slices, the last one padded."""
  position = 0
  for name, shape in (item for group in shapes for item in group.items()):
    count = _elements(f"{folder}: tensor {name!r}", shape)
    share = -(-count // len(pieces))
    slices = []
    for rank, of_rank in enumerate(pieces):
      slices += _slices(of_rank, position, min(share, max(0, count - rank * share)))
    yield name, shape, slices
    position += share
  held = sorted({sum(piece.length for piece in of_rank) for of_rank in pieces})
  if held != [position]:
    raise ReadError(
      f"{folder}: a rank has {position} values by the names, {held} in the files; {_REMEDY}"
    )


def _read_joined(tensor: Tensor, slices: list[_Slice]) -> np.ndarray:
  values = np.empty(math.prod(tensor.shape), tensor.dtype)
  if sum(piece.length for piece in slices) != values.size:
    raise ReadError(f"{tensor.file}: tensor {tensor.name!r} is incomplete in the files")
  position = 0
  for piece in slices:
    flat = piece.file.tensor(piece.keys, piece.length * tensor.dtype.itemsize).reshape(-1)
    part = flat[piece.start : piece.start + piece.length]
    values[position : position + piece.length] = to_numpy(part)
    position += piece.length
  return values.reshape(tensor.shape)


def _frozen(models: list[TorchFile], stage: int) -> list:
  """Weights that were not trained: in ZeRO 2's model file, or split over all of ZeRO 3's."""
  shapes = models[0].content().get("frozen_param_shapes") or {}
  keys, found = "frozen_param_fragments", []
  for name, shape in shapes.items() if isinstance(shapes, dict) else ():
    pieces = [_dict(file, file.content(), keys).get(name) for file in models]
    kinds = [
      describe(file.path, name, piece)
      for file, piece in zip(models, pieces)
      if isinstance(piece, torch.Tensor)
    ]
    if len(kinds) != len(models):
      raise ReadError(f"{models[0].path}: the frozen tensor {name!r} is missing")
    count = _elements(f"{models[0].path}: tensor {name!r}", shape)
    held = sum(math.prod(kind.shape) for kind in kinds)
    if held != count if stage < 3 else not count <= held < count + len(models):
      raise ReadError(f"{models[0].path}: tensor {name!r} of shape {list(shape)} has {held} values")
    tensor = Tensor(str(name), tuple(shape), kinds[0].dtype, models[0].path)
    whole = [_Slice(file, (keys, name), 0, math.prod(k.shape)) for file, k in zip(models, kinds)]
    found.append((tensor, partial(_read_joined, tensor, _slices(whole, 0, count))))
  return found


def _buffers(model: TorchFile) -> list:
  names = model.content().get("buffer_names") or []
  module = _dict(model, model.content(), "module")
  found = []
  for name in names:
    if isinstance(module.get(name), torch.Tensor):
      tensor = describe(model.path, name, module[name])
      found.append((tensor, partial(model.read, ("module", name), tensor)))
  return found


def _shared(model: TorchFile, entries: dict) -> list:
  """Second names of weights, such as a head tied to the embedding."""
  pairs = model.content().get("shared_params") or {}
  found = []
  for name, first in dict(pairs).items():
    if first in entries and name not in entries:
      tensor, read = entries[first]
      found.append((Tensor(str(name), tensor.shape, tensor.dtype, tensor.file), read))
  return found
