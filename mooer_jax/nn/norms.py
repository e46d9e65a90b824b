"""Normalisations, computed in float32 whatever the model's dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp


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
