"""Random weights of MooER-omni's vocoder and speaker encoder, in the released names."""

import torch

from mooer_jax.vocoders.hifigan import HiFiGANConfig
from mooer_jax.vocoders.speaker import SpeakerConfig


class _Random:
  """Tensors by name, of a size that keeps the variance of the signal; none is all 0 or 1."""

  def __init__(self, seed: int):
    self.generator = torch.Generator().manual_seed(seed)
    self.state: dict[str, torch.Tensor] = {}

  def normal(self, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=self.generator)

  def kernel(self, name: str, *shape: int, inputs: int) -> None:
    self.state[name] = self.normal(*shape) * inputs**-0.5

  def vector(self, name: str, size: int, *, around: float = 0.0) -> None:
    self.state[name] = around + 0.1 * self.normal(size)


def generator_state(c: HiFiGANConfig, seed: int = 0) -> dict[str, torch.Tensor]:
  """Random weights of a generator."""
  r = _Random(seed)

  def convolution(name, shape, bias, gain=1.0):
    r.state[f"{name}.weight_v"] = r.normal(*shape)
    r.vector(f"{name}.weight_g", shape[0], around=1)
    r.state[f"{name}.weight_g"] = gain * r.state[f"{name}.weight_g"][:, None, None]
    r.vector(f"{name}.bias", bias)

  convolution("conv_pre", (c.hidden_size, c.input_width, 7), c.hidden_size)
  r.kernel("cond_layer.weight", c.hidden_size, c.speaker_width, 1, inputs=1)
  r.vector("cond_layer.bias", c.hidden_size)
  number = 0
  for i, (rate, taps) in enumerate(zip(c.rates, c.taps, strict=True)):
    inputs, out = c.hidden_size >> i, c.hidden_size >> (i + 1)
    convolution(f"ups.{i}", (inputs, out, taps), out, gain=(rate / 2) ** 0.5)
    r.kernel(f"conds.{i}.weight", out, c.speaker_width, 1, inputs=1)
    r.vector(f"conds.{i}.bias", out)
    for block_taps in c.block_taps:
      for pair in range(len(c.dilations)):
        for half in ("convs1", "convs2"):
          name = f"resblocks.{number}.{half}.{pair}"
          convolution(name, (out, out, block_taps), out, gain=0.5)
      number += 1
  convolution("conv_post", (1, c.hidden_size >> len(c.taps), 7), 1, gain=0.3)
  return r.state


def speaker_state(c: SpeakerConfig, seed: int = 0) -> dict[str, torch.Tensor]:
  """Random weights of a speaker encoder."""
  r = _Random(seed)

  def batch_norm(name, size):
    for leaf, around in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
      r.vector(f"{name}.{leaf}", size, around=around)
    r.state[f"{name}.num_batches_tracked"] = torch.tensor(7)

  def plane(name, out, inputs, taps=3):
    r.kernel(f"{name}.weight", out, inputs, taps, taps, inputs=inputs * taps**2)

  def dense(name, out, inputs, *taps):
    r.kernel(f"{name}.weight", out, inputs, *taps, inputs=inputs)
    r.vector(f"{name}.bias", out)

  plane("conv1", c.channels[0], 1)
  r.vector("conv1.bias", c.channels[0])
  batch_norm("bn1", c.channels[0])
  inputs = c.channels[0]
  for stage, (blocks, out) in enumerate(zip(c.blocks, c.channels, strict=True), 1):
    for block in range(blocks):
      name = f"layer{stage}.{block}"
      plane(f"{name}.conv1", out, inputs)
      plane(f"{name}.conv2", out, out)
      batch_norm(f"{name}.bn1", out)
      batch_norm(f"{name}.bn2", out)
      dense(f"{name}.se.fc.0", out // c.reduction, out)
      dense(f"{name}.se.fc.2", out, out // c.reduction)
      if not block and (stage > 1 or inputs != out):
        plane(f"{name}.downsample.0", out, inputs, 1)
        batch_norm(f"{name}.downsample.1", out)
      inputs = out
  width = inputs * (c.bins >> (len(c.blocks) - 1))
  dense("attention.0", 128, width, 1)
  batch_norm("attention.2", 128)
  dense("attention.3", width, 128, 1)
  dense("fc", c.output_width, 2 * width)
  return r.state
