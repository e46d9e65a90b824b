"""HiFi-GAN's discriminators in PyTorch, from their published structure.

They are functions of a state dict in the published names, made by `discriminator_state`.
"""

import torch
import torch.nn.functional as F

from mooer_jax.vocoders.discriminators import DiscriminatorConfig

PERIOD_STRIDES = (3, 3, 3, 3, 1)
SCALE_STRIDES = (1, 2, 2, 4, 4, 1, 1)
SCALE_TAPS = (15, 41, 41, 41, 41, 41, 5)


def scale_groups(width: int) -> tuple[int, ...]:
  """The published groups; a layer of fewer channels has a group for each."""
  channels = 4 * width
  return 1, min(4, channels), min(16, channels), min(16, 2 * channels), 16, 16, 1


def discriminator_state(c: DiscriminatorConfig, seed: int = 0) -> dict[str, torch.Tensor]:
  """Random weights of the discriminators, all of them weight-normalised."""
  generator, state = torch.Generator().manual_seed(seed), {}

  def normal(*shape):
    return torch.randn(shape, generator=generator)

  def convolution(name, *shape):
    state[f"{name}.weight_v"] = normal(*shape)
    gain = normal(shape[0]).abs() + 1
    state[f"{name}.weight_g"] = gain.reshape(-1, *[1] * (len(shape) - 1))
    state[f"{name}.bias"] = 0.1 * normal(shape[0])

  for number in range(len(c.periods)):
    inputs = 1
    for layer, times in enumerate((1, 4, 16, 32, 32)):
      convolution(f"mpd.{number}.convs.{layer}", times * c.width, inputs, 5, 1)
      inputs = times * c.width
    convolution(f"mpd.{number}.conv_post", 1, inputs, 3, 1)
  for number in range(c.scales):
    inputs = 1
    layers = zip((4, 4, 8, 16, 32, 32, 32), SCALE_TAPS, scale_groups(c.width), strict=True)
    for layer, (times, taps, groups) in enumerate(layers):
      convolution(f"msd.{number}.convs.{layer}", times * c.width, inputs // groups, taps)
      inputs = times * c.width
    convolution(f"msd.{number}.conv_post", 1, inputs, 3)
  return state


def discriminate(state, c: DiscriminatorConfig, waveform_BN) -> list[list[torch.Tensor]]:
  """The activations of all layers of each discriminator, [B, channels, …]; scores are last."""

  def run(name, x, convolve, strides, groups):
    found = []
    for layer, (stride, of_layer) in enumerate(zip(strides, groups, strict=True)):
      x = F.leaky_relu(convolve(f"{name}.convs.{layer}", x, stride, of_layer), 0.1)
      found.append(x)
    return [*found, convolve(f"{name}.conv_post", x, 1, 1)]

  def plane(name, x, stride, groups):
    kernel = _kernel(state, name)
    padding = kernel.shape[2] // 2
    return F.conv2d(x, kernel, state[f"{name}.bias"], (stride, 1), (padding, 0), groups=groups)

  def line(name, x, stride, groups):
    kernel = _kernel(state, name)
    padding = kernel.shape[2] // 2
    return F.conv1d(x, kernel, state[f"{name}.bias"], stride, padding, groups=groups)

  found, x_B1N = [], waveform_BN[:, None]
  for number, period in enumerate(c.periods):
    padded = F.pad(x_B1N, (0, -x_B1N.shape[2] % period), "reflect")
    plane_B1TP = padded.reshape(len(padded), 1, -1, period)
    found.append(run(f"mpd.{number}", plane_B1TP, plane, PERIOD_STRIDES, [1] * 5))
  for number in range(c.scales):
    if number:
      x_B1N = F.avg_pool1d(x_B1N, 4, 2, padding=2)
    found.append(run(f"msd.{number}", x_B1N, line, SCALE_STRIDES, scale_groups(c.width)))
  return found


def _kernel(state, name):
  return torch._weight_norm(state[f"{name}.weight_v"], state[f"{name}.weight_g"], 0)
