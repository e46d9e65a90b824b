"""Whisper's encoder: two convolutions over log-mel features, then a pre-norm transformer."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from mooer_jax import kernels
from mooer_jax.kernels.attention import precision
from mooer_jax.nn.compute import ExecutionConfig, repeat_layer, run_layers
from mooer_jax.nn.layers import Dense, LayerNorm
from mooer_jax.nn.positions import sinusoids

# Log-mel features to one output: the stride of the second convolution.
STRIDE = 2
# The feature of digital silence, and how far below a clip's largest feature the lowest can lie.
_SILENCE, _RANGE = -1.5, 2.0


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
  """Sizes of the encoder; the defaults are whisper-tiny.

  Attributes:
    input_width: mel bins.
    positions: length of the stored position table, 20 ms each; the longest context.
    context: outputs that are computed, for a clip filled up with silence. Less than `positions` is
      cheaper for short clips, and not what the original computes: its frames see all 30 s.
    trim: False: all of the context is valid output, as SALMONN takes it. True: only the outputs
      that the clip itself reaches are.
  """

  kind: ClassVar[str] = "whisper"
  RENAMED: ClassVar = {"width": "hidden_size", "mlp_width": "intermediate_size"}
  input_width: int = 80
  hidden_size: int = 384
  layers: int = 4
  heads: int = 6
  intermediate_size: int = 1536
  positions: int = 1500
  context: int = 1500
  trim: bool = False
  norm_eps: float = 1e-5
  dropout: float = 0.0

  def __post_init__(self):
    for name in ("input_width", "hidden_size", "layers", "heads", "intermediate_size", "context"):
      if getattr(self, name) < 1:
        raise ValueError(f"whisper.{name}={getattr(self, name)} must be positive")
    if self.hidden_size % self.heads:
      raise ValueError(
        f"whisper.hidden_size={self.hidden_size} does not divide into whisper.heads={self.heads}"
      )
    if self.hidden_size % 2 or self.hidden_size < 4:
      raise ValueError(f"whisper.hidden_size={self.hidden_size} must be even: sines and cosines")
    if self.context > self.positions:
      raise ValueError(
        f"whisper.context={self.context} is more than whisper.positions={self.positions}"
      )

  @property
  def max_frames(self) -> int:
    """Feature frames that it takes at most."""
    return STRIDE * self.context

  def num_outputs(self, frames: int) -> int:
    """Encoder frames that so many feature frames become."""
    return -(-frames // STRIDE) if self.trim else self.context


def _size(hidden_size: int, layers: int, input_width: int = 80) -> WhisperConfig:
  return WhisperConfig(
    input_width=input_width,
    hidden_size=hidden_size,
    layers=layers,
    heads=hidden_size // 64,
    intermediate_size=4 * hidden_size,
  )


WHISPER_SIZES = {
  "whisper_tiny": _size(384, 4),
  "whisper_base": _size(512, 6),
  "whisper_small": _size(768, 12),
  "whisper_medium": _size(1024, 24),
  "whisper_large": _size(1280, 32),  # and large-v2
  "whisper_large_v3": _size(1280, 32, input_width=128),
}


class WhisperAttention(nn.Module):
  """Multi-head self-attention over the whole context; keys have no bias."""

  config: WhisperConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> jax.Array:
    c, dtype = self.config, self.compute.jnp_dtype
    q_BTHC, k_BTHC, v_BTHC = (
      rearrange(
        Dense(c.hidden_size, use_bias=name != "k", dtype=dtype, name=name)(x_BTD),
        "B T (H C) -> B T H C",
        H=c.heads,
      )
      for name in ("q", "k", "v")
    )
    out_BTHC = kernels.attention(
      q_BTHC, k_BTHC, v_BTHC, valid_BS=valid_BT, implementation=self.compute.attention
    )
    out_BTD = rearrange(out_BTHC, "B T H C -> B T (H C)")
    return Dense(c.hidden_size, use_bias=True, dtype=dtype, name="out")(out_BTD)


class WhisperMLP(nn.Module):
  """Linear, GELU, linear."""

  config: WhisperConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    dtype = self.compute.jnp_dtype
    hidden = _gelu(
      Dense(self.config.intermediate_size, use_bias=True, dtype=dtype, name="up")(x_BTD)
    )
    return Dense(self.config.hidden_size, use_bias=True, dtype=dtype, name="down")(hidden)


class WhisperLayer(nn.Module):
  """Pre-norm attention and feed-forward."""

  config: WhisperConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array, cache: None = None):
    c = self.config
    dropout = nn.Dropout(c.dropout, deterministic=not (c.dropout and self.has_rng("dropout")))
    normed = LayerNorm(c.norm_eps, name="attention_norm")(x_BTD)
    x_BTD = x_BTD + dropout(WhisperAttention(c, self.compute, name="attention")(normed, valid_BT))
    normed = LayerNorm(c.norm_eps, name="mlp_norm")(x_BTD)
    return x_BTD + dropout(WhisperMLP(c, self.compute, name="mlp")(normed)), cache


class WhisperEncoder(nn.Module):
  """Log-mel features in (`audio/logmel.py`), one output for two of them.

  `apply({"params": params}, features_BTF, valid_BT)` takes float features [B, T, input_width], T at
  most 2 * context, and bool valid_BT, and returns ([B, context, hidden_size], valid [B, context]).
  Invalid features, up to the end of the context, are replaced by the clip's silence, so that the
  output depends on the clip's length, as in the original. A row without a valid feature has no
  valid output. Dropout is active only if a "dropout" RNG is given.

  Source: Whisper (Radford et al., 2022).
  """

  config: WhisperConfig = WhisperConfig()
  compute: ExecutionConfig = ExecutionConfig()

  def setup(self):
    c = self.config
    self.conv1 = self._convolution()
    self.conv2 = self._convolution(STRIDE)
    self.positions = self.param(
      "positions", lambda key: jnp.asarray(sinusoids(c.positions, c.hidden_size, first=0))
    )
    self.layers = repeat_layer(WhisperLayer, c.layers, self.compute)(c, self.compute)
    self.final_norm = LayerNorm(c.norm_eps)

  def _convolution(self, stride: int = 1) -> nn.Conv:
    dtype = self.compute.jnp_dtype
    return nn.Conv(
      self.config.hidden_size,
      kernel_size=(3,),
      strides=stride,
      padding=1,
      dtype=dtype,
      precision=precision(dtype),
    )

  def __call__(self, features_BTF: jax.Array, valid_BT: jax.Array):
    c = self.config
    features_BTF, valid_BT = fill_context(features_BTF, valid_BT, c)
    x_BTD = _gelu(self.conv1(features_BTF.astype(self.compute.jnp_dtype)))
    x_BTD = _gelu(self.conv2(x_BTD))
    x_BTD = x_BTD + self.positions[: c.context].astype(x_BTD.dtype)
    every_BT = jnp.ones(x_BTD.shape[:2], bool)
    x_BTD, _ = run_layers(self.layers, x_BTD, every_BT)
    reached_BT = reduce(valid_BT, "B (T stride) -> B T", "any", stride=STRIDE)
    if not c.trim:
      reached_BT = every_BT & reached_BT.any(-1, keepdims=True)
    return self.final_norm(x_BTD), reached_BT


def fill_context(
  features_BTF: jax.Array, valid_BT: jax.Array, config: WhisperConfig
) -> tuple[jax.Array, jax.Array]:
  """Silence wherever a feature is not valid, up to the end of the context.

  Args:
    features_BTF: float [B, T, input_width].
    valid_BT: bool [B, T].
    config: WhisperConfig.

  Returns:
    float32 [B, 2 * context, input_width] and bool [B, 2 * context].

  Raises:
    ValueError: if the features are of another width, or longer than the context.
  """
  batch, frames, width = features_BTF.shape
  longest = STRIDE * config.context
  if width != config.input_width:
    raise ValueError(f"whisper takes features of width {config.input_width}, got {width}")
  if frames > longest:
    raise ValueError(
      f"whisper got {frames} frames of features, but whisper.context={config.context} holds "
      f"{longest}; cut the clips, or raise whisper.context (at most {config.positions})"
    )
  valid_BT1 = valid_BT[..., None]
  features_BTF = features_BTF.astype(jnp.float32)
  largest_B11 = features_BTF.max((1, 2), keepdims=True, where=valid_BT1, initial=_SILENCE)
  silence_B11 = jnp.maximum(largest_B11 - _RANGE, _SILENCE)
  features_BTF = jnp.where(valid_BT1, features_BTF, silence_B11)
  rest = jnp.broadcast_to(silence_B11, (batch, longest - frames, width))
  valid_BT = jnp.pad(valid_BT, ((0, 0), (0, longest - frames)))
  return jnp.concatenate([features_BTF, rest], axis=1), valid_BT


def _gelu(x: jax.Array) -> jax.Array:
  return jax.nn.gelu(x, approximate=False)
