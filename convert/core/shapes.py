"""Shapes of the tensors of a source, and of the parameters of a module."""

import functools
import re

import jax
import jax.numpy as jnp

from mooer_jax import tree
from mooer_jax.connectors import Connector
from mooer_jax.encoders import Encoder
from mooer_jax.nn.compute import ExecutionConfig

from ..readers import Source
from .errors import ConversionError
from .rules import Table

SCAN = ExecutionConfig(scan=True)  # traces a module in the time of one layer


def shape_of(source: Source, name: str, axes: int) -> tuple[int, ...]:
  """Returns the shape of a tensor. Raises ConversionError if it is absent or has other axes."""
  if name not in source.tensors:
    raise ConversionError(f"{source.path}: {name} is missing")
  shape = source.tensors[name].shape
  if len(shape) != axes:
    raise ConversionError(f"{name} has shape {list(shape)}; it must have {axes} axes")
  return shape


def count_layers(source: Source, table: Table) -> int:
  """Returns the largest n of the paths with a part `layers_n`, plus one."""
  paths = [mapped[0] for name in source.tensors if (mapped := table.to_jax(name))]
  return max(
    (int(n[1]) + 1 for path in paths if (n := re.search(r"/layers_(\d+)/", path))), default=0
  )


def leaf_shapes(root: str, module, *, frames: int, width: int, method=None) -> dict[str, tuple]:
  """Returns path below `root` -> shape of the parameters of a module, per layer.

  The module is initialized on values [1, frames, width] and a mask [1, frames].
  """
  leaves = _leaf_shapes(module, frames=frames, width=width, method=method)
  return {f"{root}/{path}": shape for path, shape in leaves.items()}


@functools.cache
def _leaf_shapes(module, *, frames: int, width: int, method) -> dict[str, tuple[int, ...]]:
  init = functools.partial(module.init, method=method)
  x_BTD, valid_BT = jnp.zeros((1, frames, width)), jnp.ones((1, frames), bool)
  variables = jax.eval_shape(init, jax.random.key(0), x_BTD, valid_BT)
  leaves = tree.flatten(tree.unstack_layers(variables["params"]))
  return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def encoder_shapes(config: Encoder) -> dict[str, tuple[int, ...]]:
  """encoders/KIND/… -> shape."""
  frames, width = config.max_frames or 1024, config.input_width
  return leaf_shapes(f"encoders/{config.kind}", config.module(SCAN), frames=frames, width=width)


def connector_shapes(config: Connector, input_width: int, output_width: int) -> dict[str, tuple]:
  """connector/… -> shape, between frames and an LLM of these widths."""
  module = config.module(output_width, SCAN)
  return leaf_shapes("connector", module, frames=config.min_frames, width=input_width)
