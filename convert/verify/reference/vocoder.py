"""MooER-omni's vocoder and speaker encoder in PyTorch, from their published structure.

Both are functions of a state dict in the released names.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F

State = Mapping[str, torch.Tensor]


def _count(state: State, pattern: str) -> int:
  """The largest number that a pattern finds at the start of a name, plus one."""
  return max(int(match[1]) + 1 for name in state if (match := re.match(pattern, name)))


def _normalised(state, name):
  if f"{name}.weight" in state:  # weight norm was removed
    return state[f"{name}.weight"]
  return torch._weight_norm(state[f"{name}.weight_v"], state[f"{name}.weight_g"], 0)


def without_weight_norm(state: State) -> dict[str, torch.Tensor]:
  """The same weights for inference, with a `weight` instead of `weight_v` and `weight_g`."""
  names = [name.removesuffix(".weight_v") for name in state if name.endswith(".weight_v")]
  plain = {name: x for name, x in state.items() if not name.endswith((".weight_v", ".weight_g"))}
  return plain | {f"{name}.weight": _normalised(state, name) for name in names}


def generate(state: State, states_BTD, speaker_BE, *, stretch: int = 4) -> torch.Tensor:
  """The waveform [B, N] of hidden states, all of the same length."""
  stages = _count(state, r"ups\.(\d+)\.")
  blocks = _count(state, r"resblocks\.(\d+)\.") // stages

  def convolution(name, x, dilation=1):
    kernel = _normalised(state, name)
    reach = dilation * (kernel.shape[2] - 1) // 2
    return F.conv1d(x, kernel, state[f"{name}.bias"], padding=reach, dilation=dilation)

  def voice(name, x):
    return x + F.conv1d(speaker_BE[..., None], state[f"{name}.weight"], state[f"{name}.bias"])

  x = F.interpolate(states_BTD.mT, scale_factor=stretch, mode="linear")
  x = voice("cond_layer", convolution("conv_pre", x))
  for i in range(stages):
    kernel, bias = _normalised(state, f"ups.{i}"), state[f"ups.{i}.bias"]
    taps, rate = kernel.shape[2], kernel.shape[2] // 2
    x = F.conv_transpose1d(F.leaky_relu(x, 0.1), kernel, bias, rate, padding=(taps - rate) // 2)
    x, total = voice(f"conds.{i}", x), torch.zeros(())
    for block in range(i * blocks, (i + 1) * blocks):
      y = x
      for pair in range(_count(state, rf"resblocks\.{block}\.convs1\.(\d+)\.")):
        name = f"resblocks.{block}.convs{{}}.{pair}"
        inner = convolution(name.format(1), F.leaky_relu(y, 0.1), 2 * pair + 1)
        y = y + convolution(name.format(2), F.leaky_relu(inner, 0.1))
      total = total + y
    x = total / blocks
  return torch.tanh(convolution("conv_post", F.leaky_relu(x, 0.01)))[:, 0]


def speaker_vector(state: State, mel_BFT) -> torch.Tensor:
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
  for stage in range(1, _count(state, r"layer(\d+)\.")):
    for block in range(_count(state, rf"layer{stage}\.(\d+)\.")):
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
