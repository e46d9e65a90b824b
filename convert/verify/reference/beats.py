"""BEATs rebuilt from torch's primitives by its published structure, under its published names.

Nothing here knows of our own encoder but the names of its sizes.
"""

import math
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mooer_jax.encoders.beats import BEATsConfig


class SelfAttention(nn.Module):
  def __init__(self, c: BEATsConfig):
    super().__init__()
    self.heads, self.one_way, self.reach = c.heads, c.buckets // 2, c.max_distance
    for name in "qkv":
      self.add_module(f"{name}_proj", nn.Linear(c.width, c.width))
    self.out_proj = nn.Linear(c.width, c.width)
    self.grep_linear = nn.Linear(c.width // c.heads, 8)
    self.grep_a = nn.Parameter(torch.ones(1, c.heads, 1, 1))
    self.relative_attention_bias = nn.Embedding(c.buckets, c.heads)

  def bias(self, length):
    place = torch.arange(length)
    distance = place[None] - place[:, None]
    size, exact = distance.abs(), self.one_way // 2
    far = torch.log(size.clamp(min=1) / exact) / math.log(self.reach / exact)
    far = (exact + (far * (self.one_way - exact)).long()).clamp(max=self.one_way - 1)
    row = torch.where(size < exact, size, far) + self.one_way * (distance > 0)
    return self.relative_attention_bias(row).permute(2, 0, 1)

  def forward(self, x, hidden):
    B, T, D = x.shape
    q, k, v = (
      getattr(self, f"{name}_proj")(x).view(B, T, self.heads, -1).transpose(1, 2) for name in "qkv"
    )
    update, reset = self.grep_linear(q).view(*q.shape[:3], 2, 4).sum(-1).sigmoid().split(1, -1)
    gated = (update * (reset * self.grep_a - 1) + 2) * self.bias(T)
    scores = q @ k.transpose(2, 3) / (D // self.heads) ** 0.5 + gated
    scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))


class Layer(nn.Module):
  def __init__(self, c: BEATsConfig):
    super().__init__()
    self.self_attn = SelfAttention(c)
    self.self_attn_layer_norm = nn.LayerNorm(c.width)
    self.fc1, self.fc2 = nn.Linear(c.width, c.mlp_width), nn.Linear(c.mlp_width, c.width)
    self.final_layer_norm = nn.LayerNorm(c.width)
    self.alpha = (2 * c.layers) ** 0.25

  def forward(self, x, hidden):
    x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x, hidden))
    return self.final_layer_norm(self.alpha * x + self.fc2(F.gelu(self.fc1(x))))


class Encoder(nn.Module):
  def __init__(self, c: BEATsConfig):
    super().__init__()
    conv = nn.Conv1d(
      c.width, c.width, c.conv_pos, padding=c.conv_pos // 2, groups=c.conv_pos_groups
    )
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", FutureWarning)  # the published names are of this one
      self.pos_conv = nn.Sequential(nn.utils.weight_norm(conv, dim=2), nn.GELU())
    layers = [Layer(c) for _ in range(c.layers)]
    for layer in layers[1:]:
      layer.self_attn.relative_attention_bias = layers[0].self_attn.relative_attention_bias
    self.layers = nn.ModuleList(layers)
    self.layer_norm = nn.LayerNorm(c.width)

  def forward(self, x, hidden):
    x = x.masked_fill(hidden[..., None], 0)
    positions = self.pos_conv[0](x.transpose(1, 2))[..., : x.shape[1]]
    x = self.layer_norm(x + F.gelu(positions).transpose(1, 2))
    for layer in self.layers:
      x = layer(x, hidden)
    return x


class BEATs(nn.Module):
  """Features [B, T, F] and frames [B] in, tokens out."""

  def __init__(self, c: BEATsConfig):
    super().__init__()
    self.bands = c.input_width // c.patch
    self.patch_embedding = nn.Conv2d(1, c.patch_width, c.patch, stride=c.patch, bias=False)
    self.layer_norm = nn.LayerNorm(c.patch_width)
    if c.patch_width != c.width:
      self.post_extract_proj = nn.Linear(c.patch_width, c.width)
    self.encoder = Encoder(c)

  def forward(self, features, frames=None):
    x = self.layer_norm(self.patch_embedding(features[:, None]).flatten(2).transpose(1, 2))
    if hasattr(self, "post_extract_proj"):
      x = self.post_extract_proj(x)
    tokens = torch.full((len(x),), x.shape[1])
    if frames is not None:
      tokens = frames // self.patch_embedding.kernel_size[0] * self.bands
    return self.encoder(x, torch.arange(x.shape[1]) >= tokens[:, None])


def features(waveform_N: np.ndarray) -> torch.Tensor:
  """What the original makes of a waveform at 16 kHz: [T, 128], normalised."""
  fbank_TF = kaldi_fbank(
    torch.tensor(waveform_N)[None] * 2**15,
    num_mel_bins=128,
    sample_frequency=16000,
    frame_length=25,
    frame_shift=10,
  )
  return (fbank_TF - 15.41663) / (2 * 6.55582)


def kaldi_fbank(waveform, *, num_mel_bins, sample_frequency, frame_length, frame_shift):
  """What torchaudio.compliance.kaldi.fbank defines by default (Povey window), in float64.

  torchaudio's own float32 is off by up to 0.3 far below a frame's peak.
  """
  size, hop = round(sample_frequency * frame_length) // 1000, sample_frequency * frame_shift // 1000
  frames = waveform[0].double().unfold(0, size, hop)
  frames = frames - frames.mean(1, keepdim=True)
  frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], 1)
  window = torch.hann_window(size, periodic=False, dtype=torch.float64) ** 0.85
  points = 2 ** math.ceil(math.log2(size))
  power = torch.fft.rfft(frames * window, points).abs()[:, :-1] ** 2
  mel = lambda hz: 1127 * torch.log1p(torch.as_tensor(hz, dtype=torch.float64) / 700)  # noqa: E731
  low, high = mel(20.0), mel(sample_frequency / 2)
  place = (mel(torch.arange(points // 2) * sample_frequency / points) - low) / (high - low)
  place = place[:, None] * (num_mel_bins + 1) - torch.arange(1, num_mel_bins + 1)
  energies = power @ (1 - place.abs()).clamp(min=0)
  return energies.clamp(min=torch.finfo(torch.float32).eps).log().float()
