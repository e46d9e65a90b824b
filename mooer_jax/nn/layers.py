"""A dense layer with an explicit low-rank update."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mooer_jax.kernels.attention import precision


def _torch_uniform(key, shape, dtype=jnp.float32):
  """U(-1/sqrt(in), 1/sqrt(in)): what torch's Linear and PEFT's lora_A start from."""
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class Dense(nn.Module):
  """y = x W + b + scale * (dropout(x) A) B, with W [in, out], A [in, rank], B [rank, out].

  Rank 0 is a plain dense layer. The scale is an argument of the call, not a parameter, so that a
  sweep over scales is one batch. Dropout acts on A's input and only when the call carries a
  "dropout" RNG. A starts as torch's uniform, B as zeros.

  Source: LoRA (Hu et al., 2021), as PEFT lays it out.
  """

  features: int
  use_bias: bool = False
  rank: int = 0
  dropout: float = 0.0
  dtype: Any = jnp.float32
  kernel_init: Any = _torch_uniform

  @nn.compact
  def __call__(self, x: jax.Array, lora_scale: jax.Array | float = 1.0) -> jax.Array:
    """Maps [..., in] to [..., features]; lora_scale is a scalar or one value per row, [B]."""
    x = x.astype(self.dtype)
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    y = self._matmul(x, kernel)
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
    if self.rank:
      lora_a = self.param("lora_a", _torch_uniform, (x.shape[-1], self.rank))
      lora_b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
      if self.dropout and self.has_rng("dropout"):
        x = self._dropped(x)
      scale = jnp.asarray(lora_scale, self.dtype)
      scale = scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))
      y = y + self._matmul(self._matmul(x, lora_a) * scale, lora_b)
    return y

  def _dropped(self, x):
    keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.dropout, x.shape)
    # A value of its own: fused into the products, the generator's rounds make XLA's TPU compiler
    # take ten times as long.
    keep = jax.lax.optimization_barrier(keep)
    return jnp.where(keep, x / (1 - self.dropout), 0)

  def _matmul(self, x, kernel):
    # As one matrix: with two batch axes XLA on CPU transposes copies for the kernel's gradient, and
    # forward and backward take twice as long.
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.matmul(rows, kernel.astype(self.dtype), precision=precision(self.dtype))
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(var + eps) * scale + bias over the last axis; two passes, float32."""

  eps: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
    centered = x.astype(jnp.float32)
    centered = centered - centered.mean(-1, keepdims=True)
    variance = jnp.square(centered).mean(-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32."""

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
    x_float32 = x.astype(jnp.float32)
    mean_square = jnp.square(x_float32).mean(-1, keepdims=True)
    return (x_float32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)
