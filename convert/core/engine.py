"""Maps sets of tensors by a table, and finds all misfits before any tensor is read."""

import dataclasses
import functools
import gc
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, LazyArray, read_leaves

from ..readers import Source
from .errors import Problems
from .rules import Table, Transform

# Dtypes of a checkpoint. Not float64, which JAX would round.
STORED = ("float16", "bfloat16", "float32")
GROUP_BYTES = 256 * 2**20  # of leaves that are read from a checkpoint at a time


@dataclasses.dataclass(frozen=True)
class Mapped:
  """The leaves (path -> leaf, not yet read) of a source, and the names of its other tensors."""

  leaves: dict[str, LazyArray]
  ignored: tuple[str, ...] = ()


def map_in(
  source: Source,
  table: Table,
  expected: Mapping[str, tuple[int, ...]],
  *,
  problems: Problems,
  ignored: Sequence[str] = (),
  names: Iterable[str] | None = None,
) -> Mapped:
  """Finds the tensor of every expected leaf (path -> shape), without reading one.

  Unmapped, missing, duplicate and mis-shaped tensors are problems. `names` are those to map
  (default: all), `ignored` regular expressions of others.
  """
  leaves: dict[str, LazyArray] = {}
  origin: dict[str, str] = {}
  dropped = []
  for name in source.tensors if names is None else names:
    tensor = source.tensors[name]
    if any(re.fullmatch(pattern, name) for pattern in ignored):
      dropped.append(name)
      continue
    mapped = table.to_jax(name)
    if mapped is None or mapped[0] not in expected:
      why = "the model has no such part" if mapped else "no rule knows this name"
      problems.add(f"{tensor.file.name}: {name} {list(tensor.shape)} is unmapped: {why}")
      continue
    path, transform = mapped
    if path in leaves:
      problems.add(f"{tensor.file.name}: {name} is a duplicate: {origin[path]} is also {path}")
      continue
    origin[path] = name
    read = functools.partial(_read, source, name, transform)
    leaves[path] = LazyArray(expected[path], tensor.dtype, read)
    wanted = transform.torch_shape(expected[path])
    if tensor.shape != wanted:
      problems.add(
        f"{tensor.file.name}: {name} has shape {list(tensor.shape)}, the model needs {list(wanted)}"
      )
    if tensor.dtype.name not in STORED:
      problems.add(
        f"{tensor.file.name}: {name} has dtype {tensor.dtype.name}; use {' or '.join(STORED)}"
      )
  for path in expected:
    if path not in leaves:
      found = table.to_torch(path)
      assert found is not None, f"no rule leads to {path}: the table does not cover the model"
      name, transform = found
      problems.add(f"{name} {list(transform.torch_shape(expected[path]))} is missing ({path})")
  return Mapped(leaves, tuple(dropped))


def _read(source: Source, name: str, transform: Transform) -> np.ndarray:
  return transform.to_jax(source.read(name))


def paths_of(about: Checkpoint, *roots: str) -> list[str]:
  """Lists the paths of the leaves of a checkpoint that begin with one of `roots`."""
  return [path for path in tree.flatten(about.params) if path.startswith(roots)]


@dataclasses.dataclass(frozen=True)
class Outgoing:
  """A tensor to write, and the leaf that supplies its values."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  path: str
  transform: Transform

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape)) * self.dtype.itemsize


def map_out(about: Checkpoint, table: Table, paths: Iterable[str]) -> list[Outgoing]:
  """Returns tensors in natural order of names. Raises ConversionError for leaves without a rule."""
  leaves, problems = tree.flatten(about.params), Problems()
  outgoing: dict[str, Outgoing] = {}
  for path in paths:
    found = table.to_torch(path)
    if found is None:
      problems.add(f"{path} is unmapped: no rule knows this leaf")
      continue
    name, transform = found
    leaf = leaves[path]
    shape = transform.torch_shape(leaf.shape)
    outgoing[name] = Outgoing(name, shape, np.dtype(leaf.dtype), path, transform)
  problems.check(str(about.folder))
  return [outgoing[name] for name in sorted(outgoing, key=natural)]


def natural(name: str) -> list:
  """Sort key that puts layers.2 before layers.10."""
  return [(0, int(s), "") if s.isdigit() else (1, 0, s) for s in re.split(r"(\d+)", name)]


def read_out(about: Checkpoint, tensors: Sequence[Outgoing]) -> Iterator[np.ndarray]:
  """Reads tensors in order, GROUP_BYTES at a time, as views in any memory order."""
  for group in grouped(tensors, GROUP_BYTES):
    arrays = read_leaves(about, {tensor.path for tensor in group})
    for tensor in group:
      yield tensor.transform.to_torch(arrays[tensor.path])
    arrays.clear()
    gc.collect()  # Orbax's futures are in reference cycles, and keep the arrays


def grouped(tensors: Sequence[Outgoing], limit_bytes: int) -> list[list[Outgoing]]:
  """Splits tensors into consecutive groups of at most this size, unless one tensor is larger."""
  groups: list[list[Outgoing]] = []
  size = math.inf
  for tensor in tensors:
    size += tensor.nbytes
    if size > limit_bytes:
      groups.append([])
      size = tensor.nbytes
    groups[-1].append(tensor)
  return groups
