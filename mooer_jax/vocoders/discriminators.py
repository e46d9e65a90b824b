"""HiFi-GAN's discriminators, which tell recordings from generated waveforms; training needs them.

Each is a stack of convolutions over some view of the waveform. It returns the activations of all
its layers, the last of which are its scores: about 1 for a recording, about 0 for a generated one.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mooer_jax.nn.layers import check_sizes
from mooer_jax.vocoders.hifigan import SLOPE, Convolution

# (channels as a multiple of the width, taps, stride) of each layer but the last.
_OF_PERIOD = ((1, 5, 3), (4, 5, 3), (16, 5, 3), (32, 5, 3), (32, 5, 1))
# The same with the groups, over one scale.
_OF_SCALE = (
  (4, 15, 1, 1), (4, 41, 2, 4), (8, 41, 2, 16), (16, 41, 4, 16), (32, 41, 4, 16), (32, 41, 1, 16),
  (32, 5, 1, 1),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
  """Sizes of the discriminators; the defaults are those of HiFi-GAN, 70.7 M parameters.

  Attributes:
    width: channels of the narrowest layer; all others have multiples of it.
    periods: a discriminator for each sees every period-th sample in a row; primes overlap least.
    scales: number of discriminators that see the waveform, its means over 2 samples, over 4, …
  """

  kind: ClassVar[str] = "discriminators"
  width: int = 32
  periods: tuple[int, ...] = (2, 3, 5, 7, 11)
  scales: int = 3

  def __post_init__(self):
    check_sizes(self, "width")
    if self.scales < 0 or any(period < 1 for period in self.periods):
      raise ValueError(
        f"discriminators.periods={self.periods} must be at least 1, and scales={self.scales} not"
        " negative"
      )
    if not self.periods and not self.scales:
      raise ValueError("discriminators.periods and scales are empty; name at least one of them")

  def module(self) -> "Discriminators":
    return Discriminators(self)


class Discriminators(nn.Module):
  """All discriminators.

  `apply({"params": params}, waveform_BN)` takes float32 [B, N] and returns for each discriminator
  a list of the activations of its layers, float32 [B, …, channels]; the last are the scores. It
  runs in float32, without padding between rows: a row does not depend on others.

  Source: HiFi-GAN (Kong et al., 2020), multi-period and multi-scale discriminators. All layers are
  weight-normalised; the original normalises those of the first scale by their spectra instead.
  """

  config: DiscriminatorConfig = DiscriminatorConfig()

  @nn.compact
  def __call__(self, waveform_BN: jax.Array) -> list[list[jax.Array]]:
    c, found = self.config, []
    x_BN1 = waveform_BN.astype(jnp.float32)[..., None]
    for period in c.periods:
      found.append(_OfPeriod(period, c.width, name=f"period_{period}")(x_BN1))
    for number in range(c.scales):
      if number:
        x_BN1 = nn.avg_pool(x_BN1, (4,), (2,), padding=((2, 2),))
      found.append(_OfScale(c.width, name=f"scale_{number}")(x_BN1))
    return found


class _OfPeriod(nn.Module):
  """Convolutions along each of the `period` interleaved signals of a waveform [B, N, 1]."""

  period: int
  width: int

  @nn.compact
  def __call__(self, x_BN1: jax.Array) -> list[jax.Array]:
    rows, missing = len(x_BN1), -x_BN1.shape[1] % self.period
    x_BN1 = jnp.pad(x_BN1, ((0, 0), (0, missing), (0, 0)), mode="reflect")
    x = rearrange(x_BN1, "B (T P) C -> (B P) T C", P=self.period)
    layers = [
      functools.partial(Convolution, times * self.width, taps, jnp.float32, stride=stride)
      for times, taps, stride in _OF_PERIOD
    ]
    found = _run(x, layers)
    return [rearrange(x, "(B P) T C -> B T P C", B=rows) for x in found]


class _OfScale(nn.Module):
  """Convolutions with wide kernels over a waveform [B, N, 1]."""

  width: int

  @nn.compact
  def __call__(self, x_BN1: jax.Array) -> list[jax.Array]:
    layers, inputs = [], 1
    for times, taps, stride, groups in _OF_SCALE:
      groups = math.gcd(groups, inputs)  # a narrow layer has fewer
      layers.append(
        functools.partial(
          Convolution, times * self.width, taps, jnp.float32, stride=stride, groups=groups
        )
      )
      inputs = times * self.width
    return _run(x_BN1, layers)


def _run(x: jax.Array, layers) -> list[jax.Array]:
  """The activations of the layers, and of a last one with a single channel."""
  found = []
  for number, layer in enumerate(layers):
    x = nn.leaky_relu(layer(name=f"conv_{number}")(x), SLOPE)
    found.append(x)
  return [*found, Convolution(1, 3, jnp.float32, name="last")(x)]
