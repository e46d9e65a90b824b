"""Shapes, precision and placement of the arrays of an operation."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# Axes of a mesh that split rows and heads, if it has them.
ROWS, HEADS = ("data", "fsdp"), "tensor"


def precision(dtype: Any) -> jax.lax.Precision:
  """HIGHEST for float32, since GPUs use TF32 and TPUs bfloat16 by default."""
  return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def axes_to_split() -> dict[str, int]:
  """Axes of the mesh in the context with more than one device, but for those of `shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_types)
  names = (name for name, kind in kinds if kind is not AxisType.Manual)
  return {name: mesh.shape[name] for name in names if mesh.shape[name] > 1}


def on_mesh(function, in_specs, out_specs):
  """Runs a function on each device's part of its arguments, which XLA cannot split by itself.

  Without a mesh in the context (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`), or inside of
  `shard_map` and `pmap`, the function is called as it is.
  """
  names = axes_to_split()
  if not names:
    return function

  def known(spec):
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in spec]
    return P(*(tuple(name for name in of if name in names) or None for of in axes))

  in_specs, out_specs = jax.tree.map(
    known, (in_specs, out_specs), is_leaf=lambda x: isinstance(x, P)
  )
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def check_shapes(**arrays: jax.Array) -> dict[str, int]:
  """Checks that shapes fit the letters after the `_` of the names; returns the size of each.

  R is T + S - 1, the number of distances of T queries and S keys.

  Raises:
    ValueError: for a shape that does not fit; for a "valid" or "mask" that is not bool, or another
      array that is not of floats.
  """
  sizes: dict[str, int] = {}
  for name, x in arrays.items():
    kind, letters = name.rsplit("_", 1)
    if "R" in letters:
      sizes["R"] = sizes["T"] + sizes["S"] - 1
    known = zip(letters, x.shape)
    if x.ndim != len(letters) or any(sizes.get(letter, size) != size for letter, size in known):
      wanted = ", ".join(f"{n}={sizes[n]}" if n in sizes else n for n in letters)
      raise ValueError(f"{name} has shape {x.shape}; expected [{wanted}]")
    sizes |= zip(letters, x.shape)
    dtype = jnp.bool_ if kind in ("valid", "mask") else jnp.floating
    if not jnp.issubdtype(x.dtype, dtype):
      raise ValueError(f"{name} is {x.dtype}; expected {'bool' if dtype is jnp.bool_ else 'float'}")
  return sizes


def check_heads(heads: int, kv_heads: int, *, equal: bool = False) -> None:
  """Raises ValueError if the heads of the queries cannot share those of the keys."""
  if not kv_heads or heads % kv_heads or (equal and heads != kv_heads):
    rule = "equal to" if equal else "divisible by"
    raise ValueError(f"{heads} query heads must be {rule} {kv_heads} key-value heads")
