"""SALMONN's window-level Q-Former rebuilt from torch's primitives, under its published names.

Nothing here knows of our own connector but the names of its sizes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mooer_jax.connectors.qformer import QFormerConfig


class Residual(nn.Module):
  """Linear, then added and normalised."""

  def __init__(self, width, out, eps):
    super().__init__()
    self.dense = nn.Linear(width, out)
    self.LayerNorm = nn.LayerNorm(out, eps=eps)

  def forward(self, change, x):
    return self.LayerNorm(x + self.dense(change))


class Attention(nn.Module):
  def __init__(self, c: QFormerConfig, key_width):
    super().__init__()
    self.heads = c.heads
    widths = {"query": c.width, "key": key_width, "value": key_width}
    self.self = nn.ModuleDict({name: nn.Linear(width, c.width) for name, width in widths.items()})
    self.output = Residual(c.width, c.width, c.norm_eps)

  def forward(self, x, keys):
    def heads(tensor):
      return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    q, k, v = (heads(self.self[n](t)) for n, t in (("query", x), ("key", keys), ("value", keys)))
    out = F.scaled_dot_product_attention(q, k, v)
    return self.output(out.transpose(1, 2).flatten(2), x)


class Layer(nn.Module):
  def __init__(self, c: QFormerConfig, input_width):
    super().__init__()
    self.attention = Attention(c, c.width)
    self.crossattention = Attention(c, input_width)
    self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(c.width, c.mlp_width)})
    self.output_query = Residual(c.mlp_width, c.width, c.norm_eps)

  def forward(self, x, window):
    x = self.crossattention(self.attention(x, x), window)
    return self.output_query(F.gelu(self.intermediate_query["dense"](x)), x)


class QFormer(nn.Module):
  """The published structure, from torch's primitives: windows [N, L, E] to [N, Q, output_width]."""

  def __init__(self, c: QFormerConfig, input_width: int, output_width: int):
    super().__init__()
    self.speech_query_tokens = nn.Parameter(torch.randn(1, c.queries, c.width))
    norm = nn.ModuleDict({"LayerNorm": nn.LayerNorm(c.width, eps=c.norm_eps)})
    layers = nn.ModuleList(Layer(c, input_width) for _ in range(c.layers))
    bert = nn.ModuleDict({"embeddings": norm, "encoder": nn.ModuleDict({"layer": layers})})
    self.speech_Qformer = nn.ModuleDict({"bert": bert})
    self.speech_llama_proj = nn.Linear(c.width, output_width)

  def forward(self, windows):
    bert = self.speech_Qformer["bert"]
    x = bert["embeddings"]["LayerNorm"](self.speech_query_tokens.expand(len(windows), -1, -1))
    for layer in bert["encoder"]["layer"]:
      x = layer(x, windows)
    return self.speech_llama_proj(x)


def tokens(module, frames_BTD, c: QFormerConfig):
  """Windows by torch's unfold, each through the module: [B, W * Q, output_width]."""
  frames = torch.as_tensor(frames_BTD)
  if c.edge == "pad":
    missing = max(c.window - frames.shape[1], 0) or (c.window - frames.shape[1]) % c.stride
    frames = F.pad(frames, (0, 0, 0, missing))
  windows_BWLD = frames.unfold(1, c.window, c.stride).transpose(2, 3)
  with torch.no_grad():
    return module(windows_BWLD.flatten(0, 1)).unflatten(0, (len(frames), -1)).flatten(1, 2)
