"""HiFi-GAN: a vocoder that turns hidden states of the LLM into a waveform in a given voice."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mooer_jax import tree
from mooer_jax.kernels.arrays import precision
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.nn.layers import Dense, check_sizes

SLOPE = 0.1  # of the leaky ReLUs before all convolutions but the last
LAST_SLOPE = 0.01
EDGE_TAPS = 7  # of the first and the last convolution


@dataclasses.dataclass(frozen=True)
class HiFiGANConfig:
  """Sizes of the generator; the defaults are those of MooER-omni, 27.0 M parameters.

  Attributes:
    input_width: width of the LLM's hidden states.
    speaker_width: width of a speaker vector.
    hidden_size: channels before the first stage; each stage halves them.
    stretch: vocoder frames per input frame, interpolated linearly.
    rates: factor by which each stage increases the sample rate.
    taps: taps of the transposed convolution of each stage; a multiple of its rate.
    block_taps: taps of the residual blocks of a stage, whose mean is its output.
    dilations: dilations of the convolutions of a residual block.
    sample_rate_hz: of the waveform.
  """

  kind: ClassVar[str] = "hifigan"
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ()
  input_width: int = 3584
  speaker_width: int = 512
  hidden_size: int = 512
  stretch: int = 4
  rates: tuple[int, ...] = (8, 8, 2, 2)
  taps: tuple[int, ...] = (16, 16, 4, 4)
  block_taps: tuple[int, ...] = (3, 7, 11)
  dilations: tuple[int, ...] = (1, 3, 5)
  sample_rate_hz: int = 22050

  def __post_init__(self):
    check_sizes(self, "input_width", "speaker_width", "hidden_size", "stretch", "sample_rate_hz")
    for name in ("rates", "block_taps", "dilations"):
      values = getattr(self, name)
      if not values or min(values) < 1:
        raise ValueError(f"hifigan.{name}={values} must have one or more positive numbers")
    if len(self.taps) != len(self.rates):
      raise ValueError(f"hifigan.taps={self.taps} must have as many numbers as rates={self.rates}")
    for taps, rate in zip(self.taps, self.rates, strict=True):
      if taps < rate or taps % rate or (taps - rate) % 2:
        raise ValueError(
          f"hifigan.taps={self.taps}: {taps} must be a multiple of its rate {rate} and exceed it by"
          " an even number"
        )
    if even := [taps for taps in self.block_taps if taps % 2 == 0]:
      raise ValueError(f"hifigan.block_taps={self.block_taps}: {even[0]} must be odd")
    if self.hidden_size % 2 ** len(self.rates):
      raise ValueError(
        f"hifigan.hidden_size={self.hidden_size} must be divisible by {2 ** len(self.rates)}: each"
        " stage halves it"
      )

  @property
  def samples_per_frame(self) -> int:
    """Samples of the waveform for each input frame."""
    return self.stretch * math.prod(self.rates)

  @property
  def context(self) -> int:
    """Input frames before and after the frame of a sample that may affect the sample."""
    reach = EDGE_TAPS // 2  # in samples at the rate of the layer, from the last layer to the first
    for rate, taps in zip(reversed(self.rates), reversed(self.taps), strict=True):
      reach += max(self.block_taps) // 2 * (sum(self.dilations) + len(self.dilations))
      cut = (taps - rate) // 2
      reach = -(-(reach + max(cut, taps - 1 - cut)) // rate)
    return -(-(reach + EDGE_TAPS // 2) // self.stretch) + 1

  def module(self, compute: ExecutionConfig = ExecutionConfig()) -> "HiFiGAN":
    return HiFiGAN(self, compute)


class _Normalised(nn.Module):
  """A convolution over time whose weights are normalised: kernel = g * v / |v|.

  Its params are `v` [taps, in, out], `g`, the norm of the kernel for each output channel, and
  `bias` [out]. Params for inference (`fold`) have the product as `kernel` instead of v and g.

  Source: Weight Normalization (Salimans and Kingma, 2016).
  """

  features: int
  taps: int
  dtype: Any
  dilation: int = 1

  norm_axes: ClassVar[tuple[int, int]] = (0, 1)
  fan_in_axis: ClassVar[int] = -2  # PyTorch's, whose initial range is 1 / sqrt(fan in)

  def weights(self, inputs: int) -> tuple[jax.Array, jax.Array]:
    """(kernel [taps, in, out], bias [out]) in the dtype of the layer."""
    kernel_KIO: jax.Array
    if self.has_variable("params", "kernel"):
      kernel_KIO = self.get_variable("params", "kernel")
    else:
      shape = (self.taps, inputs, self.features)
      init = nn.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", in_axis=self.fan_in_axis, out_axis=-3 - self.fan_in_axis
      )
      v_KIO = self.param("v", init, shape)
      g = self.param("g", lambda _: _norm(v_KIO, self.norm_axes))
      kernel_KIO = _product(v_KIO, g, self.norm_axes)
    bias_O = self.param("bias", nn.initializers.zeros, (self.features,))
    return kernel_KIO.astype(self.dtype), bias_O.astype(self.dtype)


class Convolution(_Normalised):
  """Convolution with zero padding, [B, T, in] to [B, ceil(T / stride), out]; taps must be odd.

  With groups, each group of outputs takes its part of the inputs; `v` is [taps, in / groups, out].
  """

  stride: int = 1
  groups: int = 1

  @nn.compact
  def __call__(self, x_BTI: jax.Array) -> jax.Array:
    kernel_KIO, bias_O = self.weights(x_BTI.shape[-1] // self.groups)
    reach = (self.taps - 1) * self.dilation // 2
    options = dict(stride=self.stride, dilation=self.dilation, groups=self.groups)
    return _convolve(x_BTI, kernel_KIO, reach, **options) + bias_O


class Upsampling(_Normalised):
  """Transposed convolution with a stride, [B, T, in] to [B, T * rate, out].

  Equal to PyTorch's ConvTranspose1d with padding (taps - rate) / 2; taps must be a multiple of the
  rate. As there, `g` has a norm for each input channel.
  """

  rate: int = 1

  norm_axes: ClassVar[tuple[int, int]] = (0, 2)
  fan_in_axis: ClassVar[int] = -1  # as there, where a transposed kernel is [in, out, taps]

  @nn.compact
  def __call__(self, x_BTI: jax.Array) -> jax.Array:
    kernel_KIO, bias_O = self.weights(x_BTI.shape[-1])
    # Sample b * rate + r before the cut is the sum over j of x[b - j] times tap j * rate + r: a
    # convolution with taps / rate taps, whose outputs are the phases r of all channels.
    phases_JIP = rearrange(kernel_KIO, "(J R) I O -> J I (R O)", R=self.rate)[::-1]
    y_BTP = _convolve(x_BTI, phases_JIP, len(phases_JIP) - 1)
    y_BTO = rearrange(y_BTP, "B T (R O) -> B (T R) O", R=self.rate)
    cut = (self.taps - self.rate) // 2
    return y_BTO[:, cut : cut + x_BTI.shape[1] * self.rate] + bias_O


def _convolve(
  x_BTI, kernel_KIO, padding: int, *, stride: int = 1, dilation: int = 1, groups: int = 1
) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x_BTI.astype(kernel_KIO.dtype),
    kernel_KIO,
    window_strides=(stride,),
    padding=[(padding, padding)],
    rhs_dilation=(dilation,),
    dimension_numbers=("NWC", "WIO", "NWC"),
    feature_group_count=groups,
    precision=precision(kernel_KIO.dtype),
  )


def _norm(v_KIO, axes) -> jax.Array:
  return jnp.sqrt(jnp.square(v_KIO.astype(jnp.float32)).sum(axes))


def _product(v_KIO, g, axes) -> jax.Array:
  v_KIO = v_KIO.astype(jnp.float32)
  return v_KIO * jnp.expand_dims(g.astype(jnp.float32) / _norm(v_KIO, axes), axes)


def fold(params: Mapping) -> dict:
  """Params for inference: `kernel` in float32 instead of the `v` and `g` of each convolution."""
  leaves = dict(tree.flatten(params))
  for path in [path.removesuffix("/v") for path in leaves if path.endswith("/v")]:
    kind = Upsampling if path.rpartition("/")[2].startswith("up_") else Convolution
    v_KIO, g = leaves.pop(f"{path}/v"), leaves.pop(f"{path}/g")
    leaves[f"{path}/kernel"] = _product(v_KIO, g, kind.norm_axes)
  return tree.unflatten(leaves)


def stretched(x_BTC: jax.Array, factor: int, frames_B: jax.Array) -> jax.Array:
  """Linear interpolation over time, [B, T, C] to [B, T * factor, C].

  Outputs lie at the centres of `factor` equal parts of each frame; before the centre of the first
  frame and after that of the last valid one, they repeat it (PyTorch's interpolate, "linear",
  align_corners=False).
  """
  T = x_BTC.shape[1]
  place_BT = jnp.minimum(jnp.arange(T), jnp.maximum(frames_B[:, None], 1) - 1)
  x_BTC = jnp.take_along_axis(x_BTC, place_BT[..., None], axis=1)
  before = jnp.concatenate([x_BTC[:, :1], x_BTC[:, :-1]], axis=1)
  after = jnp.concatenate([x_BTC[:, 1:], x_BTC[:, -1:]], axis=1)
  places = (np.arange(factor) + 0.5) / factor - 0.5  # of the outputs, from the centre of the frame
  parts = [
    x_BTC * (1 - abs(place)) + (before if place < 0 else after) * abs(place) for place in places
  ]
  return rearrange(jnp.stack(parts, axis=2), "B T R C -> B (T R) C").astype(x_BTC.dtype)


class _ResidualBlock(nn.Module):
  """Pairs of a dilated and a plain convolution, each pair with a residual connection."""

  taps: int
  dilations: tuple[int, ...]
  dtype: Any

  @nn.compact
  def __call__(self, x_BTC: jax.Array, valid_BT1: jax.Array) -> jax.Array:
    kind = functools.partial(Convolution, x_BTC.shape[-1], self.taps, self.dtype)
    for number, dilation in enumerate(self.dilations):
      inner = nn.leaky_relu(x_BTC, SLOPE)
      inner = kind(dilation, name=f"dilated_{number}")(jnp.where(valid_BT1, inner, 0))
      inner = nn.leaky_relu(inner, SLOPE)
      x_BTC = x_BTC + kind(name=f"plain_{number}")(jnp.where(valid_BT1, inner, 0))
    return x_BTC


class HiFiGAN(nn.Module):
  """Hidden states of an LLM to a waveform, in the voice of a speaker vector.

  `apply({"params": params}, states_BTD, frames_B, speaker_BE)` takes the states, floats
  [B, T, input_width], the number of valid frames of each row, int32 [B], and speaker vectors
  [B, speaker_width] (`speaker.SpeakerEncoder`). It returns float32
  [B, T * samples_per_frame] in [-1, 1], zero after the end of a row. A row does not depend on its
  padding or on other rows.

  Source: HiFi-GAN (Kong et al., 2020), with the speaker conditioning of MooER-omni.
  """

  config: HiFiGANConfig = HiFiGANConfig()
  compute: ExecutionConfig = ExecutionConfig()

  @nn.compact
  def __call__(self, states_BTD: jax.Array, frames_B: jax.Array, speaker_BE: jax.Array):
    c, dtype = self.config, self.compute.jnp_dtype
    if states_BTD.shape[-1] != c.input_width or speaker_BE.shape[-1] != c.speaker_width:
      raise ValueError(
        f"hifigan takes states of width {c.input_width} and speaker vectors of {c.speaker_width},"
        f" got {states_BTD.shape[-1]} and {speaker_BE.shape[-1]}"
      )

    def valid(x_BTC, per_frame: int):
      return (jnp.arange(x_BTC.shape[1]) < frames_B[:, None] * per_frame)[..., None]

    def conditioned(name: str, x_BTC):
      dense = Dense(x_BTC.shape[-1], use_bias=True, dtype=dtype, name=name)
      return x_BTC + dense(speaker_BE)[:, None]

    x_BTC = stretched(states_BTD.astype(dtype), c.stretch, frames_B)
    per_frame, channels = c.stretch, c.hidden_size
    x_BTC = jnp.where(valid(x_BTC, per_frame), x_BTC, 0)
    x_BTC = conditioned("speaker", Convolution(channels, EDGE_TAPS, dtype, name="first")(x_BTC))
    for number, (rate, taps) in enumerate(zip(c.rates, c.taps, strict=True)):
      x_BTC = jnp.where(valid(x_BTC, per_frame), nn.leaky_relu(x_BTC, SLOPE), 0)
      per_frame, channels = per_frame * rate, channels // 2
      x_BTC = Upsampling(channels, taps, dtype, rate=rate, name=f"up_{number}")(x_BTC)
      x_BTC = conditioned(f"speaker_{number}", x_BTC)
      is_valid = valid(x_BTC, per_frame)
      blocks = [
        _ResidualBlock(n, c.dilations, dtype, name=f"block_{i}")(x_BTC, is_valid)
        for i, n in enumerate(c.block_taps, number * len(c.block_taps))
      ]
      x_BTC = functools.reduce(jnp.add, blocks) / len(blocks)
    x_BTC = jnp.where(valid(x_BTC, per_frame), nn.leaky_relu(x_BTC, LAST_SLOPE), 0)
    waveform_BN = Convolution(1, EDGE_TAPS, dtype, name="last")(x_BTC)[..., 0]
    waveform_BN = jnp.tanh(waveform_BN.astype(jnp.float32))
    return jnp.where(valid(x_BTC, per_frame)[..., 0], waveform_BN, 0)
