"""Maps whole sets of tensors by a table: all that does not fit is found before anything is read."""

import dataclasses
import functools
import gc
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, Lazy, read_leaves

from ..readers import Source
from .errors import Problems
from .rules import Table, Transform

# What a checkpoint keeps as it is; float64 is not among them, for JAX would round it.
STORED = ("float16", "bfloat16", "float32")
GROUP_BYTES = 256 * 2**20  # leaves that are read from a checkpoint in one go


@dataclasses.dataclass(frozen=True)
class Mapped:
  """What a table made of a source.

  Attributes:
    leaves: path -> leaf, to be read later.
    ignored: names of the tensors that no leaf is made of.
  """

  leaves: dict[str, Lazy]
  ignored: tuple[str, ...] = ()


def map_in(
  source: Source,
  table: Table,
  expected: Mapping[str, tuple[int, ...]],
  problems: Problems,
  *,
  ignored: Sequence[str] = (),
  names: Iterable[str] | None = None,
) -> Mapped:
  """Gives every expected leaf its tensor, without reading one.

  Args:
    source: the tensors.
    table: which is which.
    expected: path -> shape of every leaf that must come out.
    problems: gets every unmapped, missing, duplicate and mis-shaped tensor.
    ignored: regular expressions of whole names that may be there and are not needed.
    names: those of the source's tensors that are meant; default: all.
  """
  leaves: dict[str, Lazy] = {}
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
      problems.add(f"{tensor.file.name}: {name} is a duplicate: {origin[path]} is {path} as well")
      continue
    origin[path] = name
    leaves[path] = Lazy(expected[path], tensor.dtype, _reader(source, name, transform))
    fits = transform.torch_ndim in (None, len(tensor.shape))
    if not fits or tuple(transform.shape(tensor.shape)) != tuple(expected[path]):
      wanted = list(transform.torch_shape(expected[path]))
      problems.add(
        f"{tensor.file.name}: {name} has shape {list(tensor.shape)}, the model needs {wanted}"
      )
    if tensor.dtype.name not in STORED:
      problems.add(
        f"{tensor.file.name}: {name} has dtype {tensor.dtype.name}; can be {', '.join(STORED)}"
      )
  for path in expected:
    if path not in leaves:
      name, transform = _counterpart(table, path)
      problems.add(f"{name} {list(transform.torch_shape(expected[path]))} is missing ({path})")
  return Mapped(leaves, tuple(dropped))


def _reader(source: Source, name: str, transform: Transform):
  return lambda: transform.to_jax(source.read(name))


def _counterpart(table: Table, path: str) -> tuple[str, Transform]:
  found = table.to_torch(path)
  if found is None:
    raise AssertionError(f"no rule leads to {path}: the table does not cover the model")
  return found


def leaf_shapes(module, *args, method=None) -> dict[str, tuple[int, ...]]:
  """path -> shape of the parameters that `module.init` would make of such arguments, per layer.

  With `compute.scan` the module is traced in the time of one layer, and each module only once.
  """
  return dict(_leaf_shapes(module, tuple((arg.shape, arg.dtype) for arg in args), method))


@functools.cache
def _leaf_shapes(module, inputs, method) -> dict[str, tuple[int, ...]]:
  args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
  init = functools.partial(module.init, method=method)
  variables = jax.eval_shape(init, jax.random.key(0), *args)
  leaves = tree.flatten(tree.unstack_layers(variables["params"]))
  return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def under(prefix: str, leaves: Mapping) -> dict:
  """The same leaves below a path."""
  return {f"{prefix}/{path}": leaf for path, leaf in leaves.items()}


@dataclasses.dataclass(frozen=True)
class Outgoing:
  """A tensor to be written: what it is called, and the leaf that it is made of."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  path: str
  transform: Transform

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape)) * self.dtype.itemsize


def map_out(
  about: Checkpoint, table: Table, paths: Iterable[str], problems: Problems
) -> list[Outgoing]:
  """The tensors that leaves of a checkpoint become, in natural order of their names."""
  leaves = tree.flatten(about.params)
  outgoing: dict[str, Outgoing] = {}
  for path in paths:
    found = table.to_torch(path)
    if found is None:
      problems.add(f"{path} is unmapped: no rule knows this leaf")
      continue
    name, transform = found
    leaf = leaves[path]
    outgoing[name] = Outgoing(
      name, tuple(transform.torch_shape(leaf.shape)), np.dtype(leaf.dtype), path, transform
    )
  return [outgoing[name] for name in sorted(outgoing, key=natural)]


def natural(name: str) -> list:
  """Sorts numbers in names by value: layers.2 before layers.10."""
  return [(0, int(s), "") if s.isdigit() else (1, 0, s) for s in re.split(r"(\d+)", name)]


def read_out(about: Checkpoint, tensors: Sequence[Outgoing]) -> Iterator[np.ndarray]:
  """Reads the tensors in their order, with a group of them, or one large one, in memory.

  They may be views that are not in C order (`transforms.row_blocks`).
  """
  for group in _groups(tensors):
    arrays = read_leaves(about, {tensor.path for tensor in group})
    for tensor in group:
      yield tensor.transform.to_torch(arrays[tensor.path])
    arrays.clear()
    gc.collect()  # Orbax's futures refer to themselves and hold on to what they read


def _groups(tensors: Sequence[Outgoing]) -> Iterator[list[Outgoing]]:
  group: list[Outgoing] = []
  for tensor in tensors:
    if group and sum(t.nbytes for t in group) + tensor.nbytes > GROUP_BYTES:
      yield group
      group = []
    group.append(tensor)
  if group:
    yield group
