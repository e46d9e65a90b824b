"""BEATs rebuilt from torch's primitives, and its weights in our layout."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from convert.parts import beats
from mooer_jax import tree
from mooer_jax.encoders.beats import BEATsConfig
from tests import tiny
from tests.parity.torch_models import vary_vectors

SMALL = dataclasses.replace(tiny.BEATS, layers=3)
# The original's defaults of the sizes in a file's cfg.
DEFAULTS = {
  "embed_dim": 512,
  "encoder_layers": 12,
  "encoder_embed_dim": 768,
  "encoder_ffn_embed_dim": 3072,
  "encoder_attention_heads": 12,
  "conv_pos": 128,
  "conv_pos_groups": 16,
  "num_buckets": 320,
  "max_distance": 1280,
}


class SelfAttention(nn.Module):
  def __init__(self, c: Mapping[str, Any]):
    super().__init__()
    width, self.heads = c["encoder_embed_dim"], c["encoder_attention_heads"]
    self.one_way, self.reach = c["num_buckets"] // 2, c["max_distance"]
    for name in "qkv":
      self.add_module(f"{name}_proj", nn.Linear(width, width))
    self.out_proj = nn.Linear(width, width)
    self.grep_linear = nn.Linear(width // self.heads, 8)
    self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))
    self.relative_attention_bias = nn.Embedding(c["num_buckets"], self.heads)

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
  def __init__(self, c: Mapping[str, Any]):
    super().__init__()
    width, hidden = c["encoder_embed_dim"], c["encoder_ffn_embed_dim"]
    self.self_attn = SelfAttention(c)
    self.self_attn_layer_norm = nn.LayerNorm(width)
    self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
    self.final_layer_norm = nn.LayerNorm(width)
    self.alpha = (2 * c["encoder_layers"]) ** 0.25

  def forward(self, x, hidden):
    x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x, hidden))
    return self.final_layer_norm(self.alpha * x + self.fc2(F.gelu(self.fc1(x))))


class Encoder(nn.Module):
  def __init__(self, c: Mapping[str, Any]):
    super().__init__()
    width, taps = c["encoder_embed_dim"], c["conv_pos"]
    conv = nn.Conv1d(width, width, taps, padding=taps // 2, groups=c["conv_pos_groups"])
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", FutureWarning)  # the published names are of this one
      self.pos_conv = nn.Sequential(nn.utils.weight_norm(conv, dim=2), nn.GELU())
    layers = [Layer(c) for _ in range(c["encoder_layers"])]
    for layer in layers[1:]:
      layer.self_attn.relative_attention_bias = layers[0].self_attn.relative_attention_bias
    self.layers = nn.ModuleList(layers)
    self.layer_norm = nn.LayerNorm(width)

  def forward(self, x, hidden):
    x = x.masked_fill(hidden[..., None], 0)
    positions = self.pos_conv[0](x.transpose(1, 2))[..., : x.shape[1]]
    x = self.layer_norm(x + F.gelu(positions).transpose(1, 2))
    for layer in self.layers:
      x = layer(x, hidden)
    return x


class BEATs(nn.Module):
  """Features [B, T, F] and their lengths [B] to frames [B, T', D].

  Args:
    cfg: of a file.
    mel_bins: width of the features.
  """

  def __init__(self, cfg: Mapping[str, Any], mel_bins: int = BEATsConfig.input_width):
    super().__init__()
    c = {**DEFAULTS, **cfg}
    patch, patch_width = c["input_patch_size"], c["embed_dim"]
    self.bands = mel_bins // patch
    self.patch_embedding = nn.Conv2d(1, patch_width, patch, stride=patch, bias=False)
    self.layer_norm = nn.LayerNorm(patch_width)
    if patch_width != c["encoder_embed_dim"]:
      self.post_extract_proj = nn.Linear(patch_width, c["encoder_embed_dim"])
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
  """The original's features of a waveform at 16 kHz: float32 [T, 128], normalised."""
  fbank_TF = kaldi_fbank(
    torch.tensor(waveform_N)[None] * 2**15,
    num_mel_bins=BEATsConfig.input_width,
    sample_frequency=16000,
    frame_length=25,
    frame_shift=10,
  )
  return (fbank_TF - beats.MEAN) / (2 * beats.DEVIATION)


def kaldi_fbank(waveform, *, num_mel_bins, sample_frequency, frame_length, frame_shift):
  """torchaudio.compliance.kaldi.fbank with its defaults (Povey window), in float64.

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


def model(config: BEATsConfig, seed=0) -> BEATs:
  torch.manual_seed(seed)
  cfg = beats.cfg_of(dataclasses.replace(config, input_width=BEATsConfig.input_width))
  return louder(vary_vectors(BEATs(cfg, config.input_width), seed))


def louder(module, seed=1):
  """Makes what starts small or even large enough that a mistake in it shows."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      if "relative_attention_bias" in name:
        parameter.normal_(0, 1, generator=generator)
      elif name.endswith(("grep_a", "weight_g", "original0")):
        parameter *= 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
      elif name.endswith(("weight_v", "original1")):
        parameter *= 3
  return module.eval()


def params(module) -> dict:
  """The module's state dict in our layout, through the converter's table."""
  leaves = {}
  for name, tensor in module.state_dict().items():
    # speechbrain's weight norm is torch's newer one, of the same two tensors.
    name = name.replace("parametrizations.weight.original0", "weight_g")
    name = name.replace("parametrizations.weight.original1", "weight_v")
    mapped = beats.TABLE.to_jax(name)
    if mapped is None:
      assert "relative_attention_bias" in name or name.startswith("predictor."), name
      continue
    path, transform = mapped
    leaves[path] = np.ascontiguousarray(transform.to_jax(tensor.detach().clone().numpy()))
  return tree.unflatten(leaves)["encoders"]["beats"]
