"""Layers that several parts share, how they are sharded, and checks of their sizes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mooer_jax.kernels.arrays import precision

# Axes of the mesh: `data` splits the rows of a batch, `fsdp` the rows and the weights, `tensor` the
# hidden size of a layer.
DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
# Rules of a part: (pattern of a path below the part, spec of the trailing axes).
ShardingRules = tuple[tuple[str, P], ...]


# Rows up to which `Dense` computes the product with `weight` transposed; from about 100 on, that is
# slower.
_FEW_ROWS = 64


def _torch_uniform(key, shape, dtype=jnp.float32):
  """U(-1/sqrt(in), 1/sqrt(in)): the initial values of torch's Linear and PEFT's lora_A."""
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class Dense(nn.Module):
  """y = x W + b + scale * (dropout(x) A) B, with W [in, out], A [in, rank], B [rank, out].

  Rank 0 is a plain dense layer. The scale is an argument of the call, so that one batch can contain
  several. Dropout is applied to A's input if there is a "dropout" RNG. B starts with zeros.

  W is the param `kernel`. Params for decoding (`generation.weights`) may have it in another form:
  `weight` [out, in]; or `kernel_int8` [in, out], or `weight_int8` [out, in], and `kernel_scale`
  [out], whose product is W. With `weight_int8`, x is rounded to 16 bits (`times_int8`).

  y has `output_dtype`, by default `dtype`.

  Source: LoRA (Hu et al., 2021), in PEFT's layout.
  """

  features: int
  use_bias: bool = False
  rank: int = 0
  dropout: float = 0.0
  dtype: Any = jnp.float32
  output_dtype: Any = None
  kernel_init: Any = _torch_uniform

  @nn.compact
  def __call__(self, x: jax.Array, lora_scale: jax.Array | float = 1.0) -> jax.Array:
    """Map [..., in] to [..., features].

    lora_scale is a scalar, a value for each row [B], or one for each rank of each row [B, rank].
    """
    x = x.astype(self.dtype)
    y = self._times_kernel(x)
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
    if self.rank:
      lora_a = self.param("lora_a", _torch_uniform, (x.shape[-1], self.rank))
      lora_b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
      if self.dropout and self.has_rng("dropout"):
        x = self._dropped(x)
      scale = jnp.asarray(lora_scale, self.dtype)
      scale = scale.reshape(scale.shape[:1] + (1,) * (x.ndim - 2) + (scale.shape[1:] or (1,)))
      y = y + self._matmul(self._matmul(x, lora_a) * scale, lora_b)
    return y

  def _dropped(self, x):
    keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.dropout, x.shape)
    # The barrier keeps the generator out of the fused products, which XLA's TPU compiler takes ten
    # times as long for.
    keep = jax.lax.optimization_barrier(keep)
    return jnp.where(keep, x / (1 - self.dropout), 0)

  def _times_kernel(self, x):
    if self.has_variable("params", "weight"):
      weight_OI = self.get_variable("params", "weight").astype(self.dtype)
      if x.size > _FEW_ROWS * x.shape[-1]:
        return self._matmul(x, weight_OI.T, self.output_dtype)
      # XLA on CPU multiplies a large matrix by a few columns at up to twice the speed of a few rows
      # by a large matrix. Without the barrier, it folds the transposes into the latter.
      y_OB = self._matmul(weight_OI, x.reshape(-1, x.shape[-1]).T, self.output_dtype)
      return jax.lax.optimization_barrier(y_OB).T.reshape(*x.shape[:-1], self.features)
    if self.has_variable("params", "kernel_int8"):
      kernel = self.get_variable("params", "kernel_int8")
      y = self._matmul(x, kernel, jnp.float32) * self.get_variable("params", "kernel_scale")
      return y.astype(self.output_dtype or self.dtype)
    if self.has_variable("params", "weight_int8"):
      y = times_int8(x.reshape(-1, x.shape[-1]), self.get_variable("params", "weight_int8"))
      y = y.reshape(*x.shape[:-1], self.features) * self.get_variable("params", "kernel_scale")
      return y.astype(self.output_dtype or self.dtype)
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    return self._matmul(x, kernel, self.output_dtype)

  def _matmul(self, x, kernel, output_dtype=None):
    # Flattened: with two batch axes, XLA on CPU transposes copies for the kernel's gradient, and
    # forward and backward take twice as long.
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.matmul(
      rows,
      kernel.astype(self.dtype),
      precision=precision(self.dtype),
      preferred_element_type=output_dtype,
    )
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def times_int8(x_RI: jax.Array, weight_OI: jax.Array) -> jax.Array:
  """x W^T with int8 products, for CPUs.

  XLA on CPU first writes int8 weights as float32 if they are multiplied by floats, but has fast
  products of int8 by int8. So each row of x is rounded to multiples of its largest magnitude over
  32512, and these 16-bit integers are split into two of 8 bits, 256 * high + low.

  Args:
    x_RI: activations; not more than 2**17 a row, so that the sums fit into int32.
    weight_OI: int8.

  Returns:
    float32 [R, O]; apart from the rounding of x, and once of each sum, it is exact. NaN or infinite
    where the row of x has a value that is not finite.
  """
  x_RI = x_RI.astype(jnp.float32)
  unit_R1 = jnp.abs(x_RI).max(axis=1, keepdims=True) / 32512
  whole_RI = jnp.round(x_RI / jnp.where(unit_R1 == 0, 1, unit_R1)).astype(jnp.int32)
  high_RI = (whole_RI + 128) >> 8
  halves_2RI = jnp.concatenate([high_RI, whole_RI - 256 * high_RI]).astype(jnp.int8)
  products = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.int32)
  last = (((1,), (1,)), ((), ()))
  if len(x_RI) > _FEW_ROWS:
    sums_2RO = products(halves_2RI, weight_OI, last)
  else:  # as in `Dense._times_kernel`
    sums_2RO = jax.lax.optimization_barrier(products(weight_OI, halves_2RI, last)).T
  high_RO, low_RO = jnp.split(sums_2RO.astype(jnp.float32), 2)
  return (256 * high_RO + low_RO) * unit_R1


class FeedForward(nn.Module):
  """down(activation(up(x))) with biases: [..., D] to [..., D] through [..., intermediate_size]."""

  intermediate_size: int
  activation: Callable[[jax.Array], jax.Array]
  dtype: Any
  kernel_init: Any = _torch_uniform

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = functools.partial(Dense, use_bias=True, dtype=self.dtype, kernel_init=self.kernel_init)
    hidden = self.activation(dense(self.intermediate_size, name="up")(x))
    return dense(x.shape[-1], name="down")(hidden)


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, computed in float32 and returned in x's dtype.

  PyTorch's kernels do the same for every dtype. Computed in bfloat16, values in the negative tail
  have relative errors of 12 %.
  """
  return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


# Both compute in float32 and return `dtype`. The variance takes a second pass: the mean of squares
# minus the square of the mean cancels for inputs far from 0.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)
RMSNorm = nn.RMSNorm


def dense_sharding(*, outputs: str, inputs: str, whole: str | None = None) -> ShardingRules:
  """Sharding rules of pairs of dense layers, as in Megatron; arguments are patterns of paths.

  The first layer (`outputs`) splits its outputs over `tensor`, the second one its `inputs`; other
  leaves (`whole`) are replicated.
  """
  rules = (
    (f"({outputs})/kernel", P(None, TENSOR)),
    (f"({outputs})/bias", P(TENSOR)),
    (f"({inputs})/kernel", P(TENSOR, None)),
    (f"({inputs})/bias", P()),
  )
  return rules if whole is None else (*rules, (whole, P()))


def check_sizes(config: Any, *positive: str, divisible: Mapping[str, str] = {}) -> None:
  """Raises ValueError, naming the field, for a size or a float of a part that is out of range.

  Args:
    config: of the part; floats must be finite and not negative, dropouts in [0, 1).
    positive: names of fields that must be at least 1.
    divisible: {field: field that must divide it}.
  """
  kind = config.kind
  for name in positive:
    if getattr(config, name) < 1:
      raise ValueError(f"{kind}.{name}={getattr(config, name)} must be positive")
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    below = 1 if field.name.endswith("dropout") else math.inf
    if field.type is float and not 0 <= value < below:
      raise ValueError(f"{kind}.{field.name}={value} must be in [0, {below})")
  for name, divisor in divisible.items():
    value, by = getattr(config, name), getattr(config, divisor)
    if value % by:
      raise ValueError(f"{kind}.{name}={value} must be divisible by {kind}.{divisor}={by}")
