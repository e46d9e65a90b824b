"""MooER-omni's vocoder and speaker encoder in PyTorch, from their published structure.

Both are functions of a state dict in the released names, made by `generator_state` and
`speaker_state`.
"""

import torch
import torch.nn.functional as F

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


def _normalised(state, name):
  return torch._weight_norm(state[f"{name}.weight_v"], state[f"{name}.weight_g"], 0)


def generate(state, c: HiFiGANConfig, states_BTD, speaker_BE):
  """The waveform [B, N] of hidden states, all of the same length."""

  def convolution(name, x, dilation=1):
    kernel = _normalised(state, name)
    reach = dilation * (kernel.shape[2] - 1) // 2
    return F.conv1d(x, kernel, state[f"{name}.bias"], padding=reach, dilation=dilation)

  def voice(name, x):
    return x + F.conv1d(speaker_BE[..., None], state[f"{name}.weight"], state[f"{name}.bias"])

  x = F.interpolate(states_BTD.mT, scale_factor=c.stretch, mode="linear")
  x = voice("cond_layer", convolution("conv_pre", x))
  for i, (rate, taps) in enumerate(zip(c.rates, c.taps, strict=True)):
    kernel, bias = _normalised(state, f"ups.{i}"), state[f"ups.{i}.bias"]
    x = F.conv_transpose1d(F.leaky_relu(x, 0.1), kernel, bias, rate, padding=(taps - rate) // 2)
    x, total = voice(f"conds.{i}", x), 0
    for block in range(i * len(c.block_taps), (i + 1) * len(c.block_taps)):
      y = x
      for pair, dilation in enumerate(c.dilations):
        name = f"resblocks.{block}.convs{{}}.{pair}"
        inner = convolution(name.format(1), F.leaky_relu(y, 0.1), dilation)
        y = y + convolution(name.format(2), F.leaky_relu(inner, 0.1))
      total = total + y
    x = total / len(c.block_taps)
  return torch.tanh(convolution("conv_post", F.leaky_relu(x, 0.01)))[:, 0]


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


def speaker_vector(state, c: SpeakerConfig, mel_BFT):
  """The vector [B, output_width] of log-mel features."""

  def norm(name, x):
    parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *parts, eps=1e-5)

  def plane(name, x, stride=1):
    kernel = state[f"{name}.weight"]
    return F.conv2d(
      x, kernel, state.get(f"{name}.bias"), stride=stride, padding=kernel.shape[-1] // 2
    )

  def dense(name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

  x = norm("bn1", plane("conv1", F.instance_norm(mel_BFT)[:, None]).relu())
  for stage, blocks in enumerate(c.blocks, 1):
    for block in range(blocks):
      name, stride = f"layer{stage}.{block}", 2 if stage > 1 and not block else 1
      y = norm(f"{name}.bn1", plane(f"{name}.conv1", x, stride).relu())
      y = norm(f"{name}.bn2", plane(f"{name}.conv2", y))
      gate = dense(f"{name}.se.fc.2", dense(f"{name}.se.fc.0", y.mean((2, 3))).relu()).sigmoid()
      if f"{name}.downsample.0.weight" in state:
        x = norm(f"{name}.downsample.1", plane(f"{name}.downsample.0", x, stride))
      x = (x + y * gate[..., None, None]).relu()
  x = x.flatten(1, 2)
  hidden = F.conv1d(x, state["attention.0.weight"], state["attention.0.bias"]).relu()
  scores = F.conv1d(
    norm("attention.2", hidden), state["attention.3.weight"], state["attention.3.bias"]
  )
  weights = scores.softmax(2)
  mean = (x * weights).sum(2)
  spread = ((x**2 * weights).sum(2) - mean**2).clamp(min=1e-5).sqrt()
  return F.normalize(dense("fc", torch.cat([mean, spread], 1)), dim=1)


def speaker_mel(waveform_N: torch.Tensor) -> torch.Tensor:
  """Log-mel features [64, T] of a waveform at 16 kHz, in its dtype."""
  padded = F.pad(waveform_N[None, None], (1, 0), "reflect")
  emphasis = torch.tensor([[[-0.97, 1.0]]], dtype=waveform_N.dtype)
  return (mel_spectrogram(F.conv1d(padded, emphasis)[0])[0] + 1e-6).log()


def mel_spectrogram(waveform_BN: torch.Tensor) -> torch.Tensor:
  """Power in mel bins [B, 64, T]: torchaudio's MelSpectrogram with the encoder's settings."""
  dtype = waveform_BN.dtype
  spectrum_BKT = torch.stft(
    waveform_BN,
    512,
    hop_length=160,
    win_length=400,
    window=torch.hamming_window(400, dtype=dtype),
    center=True,
    pad_mode="reflect",
    return_complex=True,
  )
  return mel_matrix().T.to(dtype) @ spectrum_BKT.abs().square()


def mel_matrix() -> torch.Tensor:
  """Triangles between points at equal distances on the HTK mel scale, float64 [257, 64]."""
  top = 2595 * torch.log10(torch.tensor(1 + 8000 / 700, dtype=torch.float64))
  points = 700 * (10 ** (torch.linspace(0, 1, 66, dtype=torch.float64) * top / 2595) - 1)
  hz = torch.linspace(0, 8000, 257, dtype=torch.float64)[:, None]
  rising = (hz - points[:-2]) / (points[1:-1] - points[:-2])
  falling = (points[2:] - hz) / (points[2:] - points[1:-1])
  return torch.minimum(rising, falling).clamp(min=0)
