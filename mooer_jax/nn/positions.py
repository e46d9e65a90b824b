"""Sinusoidal and rotary positions; angles in float32, constants in float64."""

import jax
import jax.numpy as jnp
import numpy as np


def sinusoids(length: int, depth: int, *, first: int = 1) -> np.ndarray:
  """Position table, float32 [length, depth]: sines in the first half, cosines in the second.

  The timescales are 10000^(-i / (depth/2 - 1)). Row 0 is position `first`; Paraformer counts from
  1, Whisper from 0.
  """
  half = depth // 2
  rates = 10000.0 ** (-np.arange(half) / (half - 1))
  angles = np.arange(first, first + length)[:, None] * rates[None]
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def rope_angles(positions_BS: jax.Array, channels: int, theta: float) -> jax.Array:
  """Rotation angles, float32 [B, S, channels / 2], for integer positions [B, S]."""
  rates = (1.0 / theta ** (np.arange(0, channels, 2) / channels)).astype(np.float32)
  return positions_BS[..., None].astype(jnp.float32) * rates


def rotate(x_BSHC: jax.Array, angles_BSC: jax.Array) -> jax.Array:
  """Rotate channel pairs (i, i + C/2), the layout of Hugging Face's LLaMA and Qwen2.

  Source: RoFormer (Su et al., 2021).
  """
  cos = jnp.cos(angles_BSC)[:, :, None]
  sin = jnp.sin(angles_BSC)[:, :, None]
  first, second = jnp.split(x_BSHC.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BSHC.dtype)
