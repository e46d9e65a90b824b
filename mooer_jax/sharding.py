"""The device mesh, with the axes `data`, `fsdp` and `tensor`, and the sharding of all arrays.

Training, evaluation and transcription use the same mesh and rules.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mooer_jax import connectors, decoders, encoders, tree
from mooer_jax.decoders.llm import KVCache
from mooer_jax.nn.layers import AXES, DATA, FSDP, TENSOR
from mooer_jax.vocoders import SpeechOutputConfig

T = TypeVar("T")

# Leaves with fewer elements (in one layer) are not split over fsdp: gathering would cost more.
FSDP_MIN_SIZE = 2**16


def sharding_rules() -> tuple[tuple[str, P], ...]:
  """(pattern of a path, spec of the trailing axes) for the parameters of all parts.

  Encoders and connectors are not split over `fsdp`. They are small beside the LLM (0.3 GB in bf16),
  and XLA would keep their shards in place and send the activations of every row around instead.
  """
  parts = [(f"encoders/{encoder.kind}", encoder.SHARDING) for encoder in encoders.KINDS]
  parts += [("connector", connector.SHARDING) for connector in connectors.KINDS]
  parts += [("decoder", decoder.SHARDING) for decoder in decoders.KINDS]
  rules = [(f"{path}/({below})", spec) for path, table in parts for below, spec in table]
  others = ("frontend/.*", P()), (r"encoder_norms/\w+/(scale|bias)", P())
  return *others, *rules, *SpeechOutputConfig.SHARDING


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1, for the remaining devices."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  @classmethod
  def parse(cls, text: str) -> "MeshConfig":
    """Reads sizes such as "data=2,tensor=4"; axes that are not named have their defaults.

    Raises:
      ValueError: for an axis that is unknown or named twice, or a size that is no integer.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
      axis, _, size = part.strip().partition("=")
      if axis not in AXES or axis in sizes or not re.fullmatch(r"-?\d+", size):
        problem = f"{axis!r} is named twice" if axis in sizes else f"cannot read {part.strip()!r}"
        raise ValueError(
          f"mesh {text!r}: {problem}; give AXIS=SIZE, separated by commas, with the axes"
          f" {', '.join(AXES)}, as in data=2,tensor=4"
        )
      sizes[axis] = int(size)
    return cls(**sizes)


def make_mesh(
  *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Arrange devices (default: those of all processes) in a mesh; for the sizes see `MeshConfig`.

  Several TPU slices (Multislice) split `data`, whose gradient sums are all that then crosses the
  slow network between them.

  Raises:
    ValueError: if the product of the sizes is not the number of devices, a size does not fit their
      torus, or `data` is not divisible by the number of slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = {DATA: data, FSDP: fsdp, TENSOR: tensor}
  said = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
  known = [size for size in sizes.values() if size != -1]
  if len(known) < 2 or min(known) < 1:
    raise ValueError(f"{said}: sizes must be positive; one of them may be -1")
  rest = len(devices) // math.prod(known)
  shape = tuple(rest if size == -1 else size for size in sizes.values())
  if math.prod(shape) != len(devices):
    raise ValueError(
      f"{said}: the product must be the number of devices, {len(devices)}; set one size to -1 for"
      " the remaining devices"
    )
  types, slices = (AxisType.Auto,) * 3, _slices(devices)
  if len(slices) > 1 and devices[0].platform != "tpu":
    # JAX numbers hosts of GPUs as slices. They are in order; any axis may cross them.
    return Mesh(np.array(devices, object).reshape(shape), AXES, axis_types=types)
  if shape[0] % len(slices):
    raise ValueError(
      f"{said}: mesh.data ({shape[0]}) must be divisible by the number of TPU slices,"
      f" {len(slices)}, as only mesh.data may cross the slow network between them; raise mesh.data"
      " and lower mesh.fsdp or mesh.tensor"
    )
  chips = {len(of) for of in slices}
  if len(chips) > 1:
    raise ValueError(f"the TPU slices have {sorted(chips)} chips; use slices of one shape")
  inside = (shape[0] // len(slices), *shape[1:])
  try:
    meshes = [jax.make_mesh(inside, AXES, axis_types=types, devices=of) for of in slices]
  except NotImplementedError as error:  # a TPU torus that the sizes would cut across
    raise ValueError(
      f"{said} does not fit the torus of the {len(slices[0])} chips of a slice; each size must be a"
      " product of whole axes (of 8x8x8: 8, 64 or 512)"
    ) from error
  if len(meshes) == 1:
    return meshes[0]
  return Mesh(np.concatenate([mesh.devices for mesh in meshes]), AXES, axis_types=types)


def _slices(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
  """The devices of each slice; all of them, if the platform has no slices."""
  slices: dict[int, list[jax.Device]] = {}
  for device in devices:
    slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
  return [slices[index] for index in sorted(slices)]


def check_mesh(mesh: Mesh | None) -> None:
  """Raises ValueError if a mesh was not made by `make_mesh`: its axes have other names or types."""
  if mesh is None:
    return
  types = getattr(mesh, "axis_types", ())
  if getattr(mesh, "axis_names", ()) != AXES or any(kind is not AxisType.Auto for kind in types):
    raise ValueError(
      f"mesh={mesh!r}: must have the axes {', '.join(AXES)} of type Auto; make it with"
      " mooer_jax.make_mesh"
    )


def mesh_of(params: Mapping) -> Mesh | None:
  """The mesh that parameters are on; None without `NamedSharding`s, as on one device."""
  shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
  meshes = (x.mesh for x in shardings if isinstance(x, NamedSharding))
  return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)


def in_mesh(function: Callable[..., T]) -> Callable[..., T]:
  """Decorator: calls a function in the context of its keyword argument `mesh`, if that is given.

  In this context, attention kernels run on the rows and heads of each device.
  """

  @functools.wraps(function)
  def call(*arguments, mesh: Mesh | None = None, **options):
    check_mesh(mesh)
    context: contextlib.AbstractContextManager = contextlib.nullcontext()
    if mesh is not None:
      context = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with context:
      return function(*arguments, mesh=mesh, **options)

  return call


def param_shardings(
  mesh: Mesh,
  params: Mapping,
  *,
  rules: Iterable[tuple[str, P]] = (),
  fsdp_min_size: int | None = None,
) -> dict:
  """`NamedSharding`s of parameters, as a nested dict.

  Args:
    params: nested dict of arrays or `ShapeDtypeStruct`s, stacked or not; all or some of a model.
    rules: further (pattern, spec of the trailing axes), tried before those of the parts; each must
      be used.
    fsdp_min_size: overrides FSDP_MIN_SIZE.

  Raises:
    ValueError: if a path has no rule, one of `rules` is unused, or an axis of a leaf is not
      divisible by the mesh axes that split it.
  """
  own = sharding_rules()
  specs = tree.first_match((*rules, *own), params, optional=[pattern for pattern, _ in own])
  leaves = tree.flatten(params)
  least = FSDP_MIN_SIZE if fsdp_min_size is None else fsdp_min_size
  return tree.unflatten(
    {
      path: NamedSharding(
        mesh, _fit(mesh, path, leaves[path].shape, spec=spec, fsdp_min_size=least)
      )
      for path, spec in tree.flatten(specs).items()
    }
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch are split over `data` and `fsdp`."""
  return NamedSharding(mesh, P((DATA, FSDP)))


def row_parts(mesh: Mesh | None) -> int:
  """Number of parts into which the rows of a batch are split; 1 without a mesh."""
  return 1 if mesh is None else mesh.shape[DATA] * mesh.shape[FSDP]


def constrain_rows(arrays: T, mesh: Mesh | None) -> T:
  """Constrain the rows of all arrays in a pytree as in `batch_sharding`, inside `jit`.

  Scalars are replicated. Without a mesh, nothing is constrained.
  """
  if mesh is None:
    return arrays
  shardings = jax.tree.map(lambda x: _by_rows(x, mesh), arrays)
  return jax.lax.with_sharding_constraint(arrays, shardings)


def cache_shardings(cache: KVCache, kv_heads: int, mesh: Mesh) -> KVCache:
  """`NamedSharding`s of a KV cache: rows are split as those of a batch, heads over `tensor`.

  If `kv_heads` is not divisible by the size of `tensor`, keys and values are replicated over it.
  """
  heads = TENSOR if kv_heads % mesh.shape[TENSOR] == 0 else None
  layers = jax.tree.map(lambda x: NamedSharding(mesh, P((DATA, FSDP), None, heads)), cache.layers)
  return dataclasses.replace(jax.tree.map(lambda x: _by_rows(x, mesh), cache), layers=layers)


def constrain_cache(cache: KVCache, kv_heads: int, mesh: Mesh | None) -> KVCache:
  """Constrain a KV cache as in `cache_shardings`, inside `jit`; without a mesh, it is unchanged."""
  if mesh is None:
    return cache
  return jax.lax.with_sharding_constraint(cache, cache_shardings(cache, kv_heads, mesh))


def _by_rows(x, mesh: Mesh) -> NamedSharding:
  return batch_sharding(mesh) if x.ndim else NamedSharding(mesh, P())


def _fit(mesh, path, shape, *, spec, fsdp_min_size) -> P:
  """Align a spec with the trailing axes of a shape, without fsdp for small leaves."""
  if len(spec) > len(shape):
    raise ValueError(f"{path}: shape {shape} has fewer axes than its rule {spec}")
  trailing = shape[len(shape) - len(spec) :]
  small = math.prod(trailing) < fsdp_min_size
  fitted = []
  for size, names in zip(trailing, spec, strict=True):
    names = (names,) if names is None or isinstance(names, str) else names
    names = tuple(name for name in names if name and not (small and name == FSDP))
    ways = math.prod(mesh.shape[name] for name in names)
    if size % ways:
      axes = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in names)
      raise ValueError(
        f"{path}: an axis of {size} (shape {tuple(shape)}) is not divisible by {axes}; choose "
        "other mesh sizes or give a rule for this path"
      )
    fitted.append(names[0] if len(names) == 1 else names or None)
  return P(*[None] * (len(shape) - len(spec)), *fitted)
