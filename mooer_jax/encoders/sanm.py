"""SAN-M, Paraformer's speech encoder: self-attention with a convolutional memory."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mooer_jax import kernels
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.nn.compute import LAYER, ExecutionConfig, repeat_layer, run_layers
from mooer_jax.nn.layers import Dense, FeedForward, LayerNorm, check_sizes, dense_sharding
from mooer_jax.nn.positions import sinusoids

_LAYER = f"(first_layer|{LAYER})"


@dataclasses.dataclass(frozen=True)
class SANMConfig:
  """Sizes of the encoder; the defaults are Paraformer-large, 157.98 M parameters."""

  kind: ClassVar[str] = "sanm"
  RENAMED: ClassVar = {"width": "hidden_size", "mlp_width": "intermediate_size"}
  SIZES: ClassVar[Mapping[str, "SANMConfig"]]
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ("dropout",)
  SHARDING: ClassVar = dense_sharding(
    outputs=rf"{_LAYER}/(attention/qkv|feed_forward/up)",
    inputs=rf"{_LAYER}/(attention/out|feed_forward/down)",
    whole=rf"({_LAYER}/norm[12]|after_norm)/(scale|bias)|{_LAYER}/attention/fsmn/kernel",
  )
  input_width: int = 560
  hidden_size: int = 512
  layers: int = 50
  heads: int = 4
  intermediate_size: int = 2048
  memory_kernel: int = 11
  norm_eps: float = 1e-12
  dropout: float = 0.0

  def __post_init__(self):
    sizes = ("input_width", "hidden_size", "heads", "intermediate_size")
    check_sizes(self, *sizes, divisible={"hidden_size": "heads"})
    if self.input_width % 2 or self.input_width < 4:
      raise ValueError(
        f"sanm.input_width={self.input_width} must be even and at least 4 (sinusoids)"
      )
    if self.memory_kernel % 2 == 0 or self.memory_kernel < 1:
      raise ValueError(f"sanm.memory_kernel={self.memory_kernel} must be odd and positive")
    if self.layers < 2:
      raise ValueError(f"sanm.layers={self.layers} must be at least 2")

  @property
  def max_frames(self) -> None:
    return None

  def num_outputs(self, frames: int) -> int:
    return frames

  def frontend(self) -> FrontendConfig:
    return FrontendConfig()

  def module(self, compute: ExecutionConfig) -> "SANMEncoder":
    return SANMEncoder(self, compute)


SANMConfig.SIZES = {"sanm_large": SANMConfig()}


@jax.custom_vjp
def convolve(x_BTD: jax.Array, kernel_KD: jax.Array) -> jax.Array:
  """Depthwise convolution over time, K odd, zero padding: [B, T, D] to [B, T, D].

  Shifted multiply-adds, which fuse into one loop. A grouped convolution with one channel a group is
  slow on every backend, and so is automatic differentiation of the shifts (45 instead of 5 ms on
  CPU for 64 clips of 48 frames), so the gradient is a convolution too.
  """
  return sum(shifted * tap for shifted, tap in zip(_shifts(x_BTD, kernel_KD), kernel_KD))


def _shifts(x_BTD, kernel_KD):
  taps, frames = kernel_KD.shape[0], x_BTD.shape[1]
  padded = jnp.pad(x_BTD, ((0, 0), (taps // 2, taps // 2), (0, 0)))
  return [padded[:, k : k + frames] for k in range(taps)]


def _convolve_forward(x_BTD, kernel_KD):
  return convolve(x_BTD, kernel_KD), (x_BTD, kernel_KD)


def _convolve_backward(saved, dy_BTD):
  x_BTD, kernel_KD = saved
  dkernel = [jnp.sum(x * dy_BTD, (0, 1), jnp.float32) for x in _shifts(x_BTD, kernel_KD)]
  return convolve(dy_BTD, kernel_KD[::-1]), jnp.stack(dkernel).astype(kernel_KD.dtype)


convolve.defvjp(_convolve_forward, _convolve_backward)


class Memory(nn.Module):
  """FSMN memory: a depthwise convolution over time, plus its input."""

  kernel_size: int

  @nn.compact
  def __call__(self, v_BTD: jax.Array, valid_BT: jax.Array) -> jax.Array:
    kernel_KD = self.param(
      "kernel", nn.initializers.normal(self.kernel_size**-0.5), (self.kernel_size, v_BTD.shape[-1])
    ).astype(v_BTD.dtype)
    v_BTD = jnp.where(valid_BT[..., None], v_BTD, 0)
    memory_BTD = convolve(v_BTD, kernel_KD)
    return jnp.where(valid_BT[..., None], memory_BTD + v_BTD, 0)


class SANMAttention(nn.Module):
  """Multi-head self-attention over the valid frames, plus the memory of the values."""

  config: SANMConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> jax.Array:
    c, dtype = self.config, self.compute.jnp_dtype
    qkv = Dense(3 * c.hidden_size, use_bias=True, dtype=dtype, name="qkv")(x_BTD)
    q_BTD, k_BTD, v_BTD = jnp.split(qkv, 3, axis=-1)
    memory_BTD = Memory(c.memory_kernel, name="fsmn")(v_BTD, valid_BT)
    q_BTHC, k_BTHC, v_BTHC = (
      rearrange(x, "B T (H C) -> B T H C", H=c.heads) for x in (q_BTD, k_BTD, v_BTD)
    )
    out_BTHC = kernels.attention(
      q_BTHC, k_BTHC, v_BTHC, valid_BS=valid_BT, **self.compute.attention_options
    )
    out_BTD = rearrange(out_BTHC, "B T H C -> B T (H C)")
    return Dense(c.hidden_size, use_bias=True, dtype=dtype, name="out")(out_BTD) + memory_BTD


class SANMLayer(nn.Module):
  """Pre-norm attention and feed-forward; the first layer's attention has no residual connection."""

  config: SANMConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array, cache: None = None):
    c, dtype = self.config, self.compute.jnp_dtype
    dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
    normed = LayerNorm(c.norm_eps, dtype=dtype, name="norm1")(x_BTD)
    out_BTD = dropout(SANMAttention(c, self.compute, name="attention")(normed, valid_BT))
    x_BTD = x_BTD + out_BTD if x_BTD.shape[-1] == c.hidden_size else out_BTD  # else input_width
    normed = LayerNorm(c.norm_eps, dtype=dtype, name="norm2")(x_BTD)
    mlp = FeedForward(c.intermediate_size, jax.nn.relu, dtype=dtype, name="feed_forward")
    return x_BTD + dropout(mlp(normed)), cache


class SANMEncoder(nn.Module):
  """Normalized low-frame-rate features to the same number of encoder frames.

  `apply({"params": params}, features_BTF, valid_BT)` takes float features [B, T, input_width] after
  CMVN and bool valid_BT, and returns ([B, T, hidden_size], valid_BT), undefined at invalid frames.
  Dropout is active only if a "dropout" RNG is given.

  Source: SAN-M (Gao et al., 2020); Paraformer (Gao et al., 2022).
  """

  config: SANMConfig = SANMConfig()
  compute: ExecutionConfig = ExecutionConfig()

  def setup(self):
    c = self.config
    self.first_layer = SANMLayer(c, self.compute)
    self.layers = repeat_layer(SANMLayer, c.layers - 1, self.compute)(c, self.compute)
    self.after_norm = LayerNorm(c.norm_eps, dtype=self.compute.jnp_dtype)

  def __call__(self, features_BTF: jax.Array, valid_BT: jax.Array):
    c = self.config
    if features_BTF.shape[-1] != c.input_width:
      raise ValueError(
        f"sanm takes features of width {c.input_width}, got {features_BTF.shape[-1]}"
      )
    x_BTF = features_BTF.astype(jnp.float32) * c.hidden_size**0.5
    x_BTF = x_BTF + sinusoids(features_BTF.shape[1], c.input_width)
    x_BTD, _ = self.first_layer(x_BTF.astype(self.compute.jnp_dtype), valid_BT)
    x_BTD, _ = run_layers(self.layers, x_BTD, valid_BT)
    return self.after_norm(x_BTD), valid_BT
