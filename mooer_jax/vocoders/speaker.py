"""The speaker encoder: a voice prompt to the vector that conditions the vocoder."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mooer_jax.nn.layers import Dense, check_sizes

EPS = 1e-5  # of the norms and the variance
POOL_SIZE = 128


@dataclasses.dataclass(frozen=True)
class SpeakerConfig:
  """Sizes of the encoder; the defaults are those of MooER-omni.

  Attributes:
    bins: mel bins of the input (`audio.speaker_mel`); a multiple of 8.
    blocks, channels: residual blocks and channels of each stage. All stages but the first halve
      time and frequency.
    reduction: factor by which the squeeze-and-excite layers narrow the channels.
    output_width: width of the vector.
  """

  kind: ClassVar[str] = "speaker"
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ()
  bins: int = 64
  blocks: tuple[int, ...] = (3, 4, 6, 3)
  channels: tuple[int, ...] = (32, 64, 128, 256)
  reduction: int = 8
  output_width: int = 512

  def __post_init__(self):
    check_sizes(self, "bins", "reduction", "output_width")
    if len(self.blocks) != len(self.channels) or not self.blocks or min(self.blocks) < 1:
      raise ValueError(
        f"speaker.blocks={self.blocks} must have a positive number for each of"
        f" channels={self.channels}"
      )
    if narrow := [n for n in self.channels if n % self.reduction]:
      raise ValueError(
        f"speaker.channels={self.channels}: {narrow[0]} must be divisible by"
        f" reduction={self.reduction}"
      )
    if self.bins % 2 ** (len(self.blocks) - 1):
      raise ValueError(f"speaker.bins={self.bins} must be divisible by the strides of the stages")

  def module(self) -> "SpeakerEncoder":
    return SpeakerEncoder(self)


class BatchNorm(nn.Module):
  """Batch norm with fixed statistics: (x - mean) / sqrt(var + eps) * scale + bias.

  They are those of the original's training; gradients do not change them.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape, zeros, ones = x.shape[-1:], nn.initializers.zeros, nn.initializers.ones
    mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
    mean, var = jax.lax.stop_gradient((mean, var))
    scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
    return (x - mean) * (scale / jnp.sqrt(var + EPS)) + bias


def _convolution(
  features: int, name: str, *, taps: int = 3, stride: int = 1, use_bias: bool = False
) -> nn.Conv:
  """Convolution with zero padding: [B, F, T, in] to [B, F / stride, T / stride, out]."""
  return nn.Conv(
    features,
    (taps, taps),
    (stride, stride),
    padding=taps // 2,
    use_bias=use_bias,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    precision=jax.lax.Precision.HIGHEST,
    name=name,
  )


class _Block(nn.Module):
  """Residual block with squeeze and excite; in it, ReLU stands before the batch norm."""

  features: int
  stride: int
  reduction: int

  @nn.compact
  def __call__(self, x_BFTC: jax.Array) -> jax.Array:
    y = jax.nn.relu(_convolution(self.features, "conv1", stride=self.stride)(x_BFTC))
    y = _convolution(self.features, "conv2")(BatchNorm(name="norm1")(y))
    y = BatchNorm(name="norm2")(y)
    squeezed = Dense(self.features // self.reduction, use_bias=True, name="squeeze")(y.mean((1, 2)))
    gate = Dense(self.features, use_bias=True, name="excite")(jax.nn.relu(squeezed))
    y = y * jax.nn.sigmoid(gate)[:, None, None]
    if self.stride != 1 or x_BFTC.shape[-1] != self.features:
      shortcut = _convolution(self.features, "shortcut", taps=1, stride=self.stride)
      x_BFTC = BatchNorm(name="shortcut_norm")(shortcut(x_BFTC))
    return jax.nn.relu(x_BFTC + y)


class SpeakerEncoder(nn.Module):
  """Log-mel features of a voice to a vector of length 1.

  `apply({"params": params}, mel_BTF)` takes features float32 [B, T, bins] (`audio.speaker_mel`),
  without padding, and returns float32 [B, output_width].

  Source: the ResNet speaker encoder of Heo et al., 2020 (Clova baseline for VoxCeleb), in the
  layout of coqui-TTS, with attentive statistics pooling (Okabe et al., 2018).
  """

  config: SpeakerConfig = SpeakerConfig()

  @nn.compact
  def __call__(self, mel_BTF: jax.Array) -> jax.Array:
    c = self.config
    if mel_BTF.shape[-1] != c.bins:
      raise ValueError(f"speaker takes features of width {c.bins}, got {mel_BTF.shape[-1]}")
    x = mel_BTF.astype(jnp.float32)
    x = (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + EPS)
    x = rearrange(x, "B T F -> B F T 1")
    x = jax.nn.relu(_convolution(c.channels[0], "conv1", use_bias=True)(x))
    x = BatchNorm(name="norm1")(x)
    for stage, (blocks, channels) in enumerate(zip(c.blocks, c.channels, strict=True), 1):
      for number in range(blocks):
        stride = 2 if stage > 1 and not number else 1
        x = _Block(channels, stride, c.reduction, name=f"block_{stage}_{number}")(x)
    x_BTC = rearrange(x, "B F T C -> B T (C F)")
    hidden = jax.nn.relu(Dense(POOL_SIZE, use_bias=True, name="pool1")(x_BTC))
    scores_BTC = Dense(x_BTC.shape[-1], use_bias=True, name="pool2")(
      BatchNorm(name="pool_norm")(hidden)
    )
    weights_BTC = jax.nn.softmax(scores_BTC, axis=1)
    mean_BC = (x_BTC * weights_BTC).sum(1)
    square_BC = (x_BTC**2 * weights_BTC).sum(1)
    spread_BC = jnp.sqrt(jnp.maximum(square_BC - mean_BC**2, EPS))
    pooled_BC = jnp.concatenate([mean_BC, spread_BC], axis=-1)
    vector_BE = Dense(c.output_width, use_bias=True, name="output")(pooled_BC)
    length_B1 = jnp.linalg.norm(vector_BE, axis=-1, keepdims=True)
    return vector_BE / jnp.maximum(length_B1, 1e-12)
