"""Whisper's encoder: two convolutions over log-mel features, then a pre-norm transformer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from mooer_jax import kernels
from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.kernels.arrays import precision
from mooer_jax.nn.compute import LAYER, ExecutionConfig, repeat_layer, run_layers
from mooer_jax.nn.layers import Dense, FeedForward, LayerNorm, check_sizes, dense_sharding, gelu
from mooer_jax.nn.positions import sinusoids

# Feature frames per output: the stride of the second convolution.
STRIDE = 2
# Feature of digital silence, and range of the features of a clip.
_SILENCE, _RANGE = -1.5, 2.0


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
  """Sizes of the encoder; the defaults are whisper-tiny.

  Attributes:
    input_width: mel bins.
    positions: length of the position table, in outputs of 20 ms; the largest context.
    context: number of outputs; clips are padded with silence. Less than `positions` is cheaper for
      short clips, but differs from the original, which attends to all 30 s.
    trim: whether only outputs of the clip itself are valid. SALMONN uses all of the context.
  """

  kind: ClassVar[str] = "whisper"
  RENAMED: ClassVar = {"width": "hidden_size", "mlp_width": "intermediate_size"}
  SIZES: ClassVar[Mapping[str, "WhisperConfig"]]
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ("context", "trim", "dropout")
  SHARDING: ClassVar = dense_sharding(
    outputs=rf"{LAYER}/(attention/[qkv]|mlp/up)",
    inputs=rf"{LAYER}/(attention/out|mlp/down)",
    whole=rf"conv[12]/(kernel|bias)|positions|({LAYER}/\w+|final)_norm/(scale|bias)",
  )
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
    sizes = ("input_width", "hidden_size", "layers", "heads", "intermediate_size", "context")
    check_sizes(self, *sizes, divisible={"hidden_size": "heads"})
    if self.hidden_size % 2 or self.hidden_size < 4:
      width = self.hidden_size
      raise ValueError(f"whisper.hidden_size={width} must be even and at least 4 (sinusoids)")
    if self.context > self.positions:
      limit = f"whisper.positions={self.positions}"
      raise ValueError(f"whisper.context={self.context} must be at most {limit}")

  @property
  def max_frames(self) -> int:
    return STRIDE * self.context

  def num_outputs(self, frames: int) -> int:
    return -(-frames // STRIDE) if self.trim else self.context

  def frontend(self) -> LogMelConfig:
    longest_s = self.max_frames * LogMelConfig.hop_ms / 1000
    return LogMelConfig(bins=self.input_width, chunk_s=longest_s)

  def module(self, compute: ExecutionConfig) -> "WhisperEncoder":
    return WhisperEncoder(self, compute)


def _size(width: int, layers: int, **changes: Any) -> WhisperConfig:
  sizes: Any = dict(layers=layers, heads=width // 64, intermediate_size=4 * width)
  return WhisperConfig(hidden_size=width, **sizes, **changes)


WhisperConfig.SIZES = {
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
      rearrange(dense(x_BTD), "B T (H C) -> B T H C", H=c.heads)
      for name in "qkv"
      for dense in [Dense(c.hidden_size, use_bias=name != "k", dtype=dtype, name=name)]
    )
    out_BTHC = kernels.attention(
      q_BTHC, k_BTHC, v_BTHC, valid_BS=valid_BT, **self.compute.attention_options
    )
    out_BTD = rearrange(out_BTHC, "B T H C -> B T (H C)")
    return Dense(c.hidden_size, use_bias=True, dtype=dtype, name="out")(out_BTD)


class WhisperLayer(nn.Module):
  """Pre-norm attention and feed-forward."""

  config: WhisperConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array, cache: None = None):
    c, dtype = self.config, self.compute.jnp_dtype
    dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
    normed = LayerNorm(c.norm_eps, dtype=dtype, name="attention_norm")(x_BTD)
    x_BTD = x_BTD + dropout(WhisperAttention(c, self.compute, name="attention")(normed, valid_BT))
    normed = LayerNorm(c.norm_eps, dtype=dtype, name="mlp_norm")(x_BTD)
    mlp = FeedForward(c.intermediate_size, gelu, dtype=dtype, name="mlp")
    return x_BTD + dropout(mlp(normed)), cache


class WhisperEncoder(nn.Module):
  """Log-mel features (`audio/logmel.py`) to one output per two frames.

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
    self.final_norm = LayerNorm(c.norm_eps, dtype=self.compute.jnp_dtype)

  def _convolution(self, stride: int = 1) -> nn.Conv:
    dtype = self.compute.jnp_dtype
    return nn.Conv(
      self.config.hidden_size, (3,), stride, padding=1, dtype=dtype, precision=precision(dtype)
    )

  def __call__(self, features_BTF: jax.Array, valid_BT: jax.Array):
    c = self.config
    features_BTF, valid_BT = fill_context(features_BTF, valid_BT, c)
    x_BTD = gelu(self.conv1(features_BTF.astype(self.compute.jnp_dtype)))
    x_BTD = gelu(self.conv2(x_BTD))
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
  """Replace invalid features by silence and pad them to the context.

  Float [B, T, F] and bool [B, T] become float32 [B, 2 * context, F] and bool [B, 2 * context].

  Raises:
    ValueError: if the features have another width, or are longer than the context.
  """
  batch, frames, width = features_BTF.shape
  longest = STRIDE * config.context
  if width != config.input_width:
    raise ValueError(f"whisper takes features of width {config.input_width}, got {width}")
  if frames > longest:
    raise ValueError(
      f"whisper got {frames} frames of features, but whisper.context={config.context} allows"
      f" {longest}; split the clips, or raise whisper.context (at most {config.positions})"
    )
  valid_BT1 = valid_BT[..., None]
  features_BTF = features_BTF.astype(jnp.float32)
  largest_B11 = features_BTF.max((1, 2), keepdims=True, where=valid_BT1, initial=_SILENCE)
  silence_B11 = jnp.maximum(largest_B11 - _RANGE, _SILENCE)
  features_BTF = jnp.where(valid_BT1, features_BTF, silence_B11)
  rest = jnp.broadcast_to(silence_B11, (batch, longest - frames, width))
  valid_BT = jnp.pad(valid_BT, ((0, 0), (0, longest - frames)))
  return jnp.concatenate([features_BTF, rest], axis=1), valid_BT
