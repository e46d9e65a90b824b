"""SALMONN's window-level Q-Former, rebuilt from torch's primitives, under its published names."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...readers import Source
from .language_model import State, load_state, state_of

_FRAMES, _SECONDS = 1500, 30.0  # by which the original counts the frames of a window
_LAYER = "speech_Qformer.bert.encoder.layer."


class Sizes(NamedTuple):
  """Sizes of a Q-Former, in BERT's words; the window and its stride in frames."""

  queries: int
  hidden_size: int
  intermediate_size: int
  layers: int
  window: int
  stride: int
  heads: int = 12
  norm_eps: float = 1e-12
  pad_last: bool = False  # whether a last, incomplete window is padded rather than dropped


def sizes_of(state: State, seconds: Mapping[str, float]) -> Sizes:
  """Sizes from the tensors, window and stride from the configuration of training."""
  _, queries, hidden_size = state["speech_query_tokens"].shape
  return Sizes(
    queries=queries,
    hidden_size=hidden_size,
    intermediate_size=len(state[f"{_LAYER}0.intermediate_query.dense.weight"]),
    layers=len({name.split(".")[4] for name in state if name.startswith(_LAYER)}),
    window=round(_FRAMES * seconds["second_per_window"] / _SECONDS),
    stride=round(_FRAMES * seconds["second_stride"] / _SECONDS),
  )


def run_qformer(
  source: Source, streams: Sequence[tuple[str, np.ndarray]], seconds: Mapping[str, float]
) -> np.ndarray:
  """Runs SALMONN's norms, the join of its streams, and its Q-Former on one clip.

  Args:
    source: salmonn_v1.pth.
    streams: (name of the norm, frames [T, D]) of each encoder, in order.
    seconds: second_per_window and second_stride.

  Returns:
    Speech tokens [S, D of the LLM].
  """
  state = {
    first + name: tensor
    for first in ("ln_", "speech_")
    for name, tensor in state_of(source, first).items()
  }
  normed = [
    F.layer_norm(torch.tensor(x_TD), x_TD.shape[-1:], state[f"{n}.weight"], state[f"{n}.bias"])
    for n, x_TD in streams
  ]
  longest = max(map(len, normed))
  frames_TD = torch.cat([F.pad(x_TD, (0, 0, 0, longest - len(x_TD))) for x_TD in normed], dim=-1)
  sizes = sizes_of(state, seconds)
  output_width = len(state["speech_llama_proj.weight"])
  module = load_state(QFormer(sizes, frames_TD.shape[-1], output_width), state, source.path)
  return tokens(module, frames_TD[None], sizes)[0].numpy()


class Residual(nn.Module):
  """Dense layer, residual connection, LayerNorm."""

  def __init__(self, width, out, eps):
    super().__init__()
    self.dense = nn.Linear(width, out)
    self.LayerNorm = nn.LayerNorm(out, eps=eps)

  def forward(self, change, x):
    return self.LayerNorm(x + self.dense(change))


class Attention(nn.Module):
  def __init__(self, c: Sizes, key_width):
    super().__init__()
    self.heads = c.heads
    widths = {"query": c.hidden_size, "key": key_width, "value": key_width}
    self.self = nn.ModuleDict(
      {name: nn.Linear(width, c.hidden_size) for name, width in widths.items()}
    )
    self.output = Residual(c.hidden_size, c.hidden_size, c.norm_eps)

  def forward(self, x, keys):
    def heads(tensor):
      return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    q, k, v = (heads(self.self[n](t)) for n, t in (("query", x), ("key", keys), ("value", keys)))
    out = F.scaled_dot_product_attention(q, k, v)
    return self.output(out.transpose(1, 2).flatten(2), x)


class Layer(nn.Module):
  def __init__(self, c: Sizes, input_width):
    super().__init__()
    self.attention = Attention(c, c.hidden_size)
    self.crossattention = Attention(c, input_width)
    self.intermediate_query = nn.ModuleDict(
      {"dense": nn.Linear(c.hidden_size, c.intermediate_size)}
    )
    self.output_query = Residual(c.intermediate_size, c.hidden_size, c.norm_eps)

  def forward(self, x, window):
    x = self.crossattention(self.attention(x, x), window)
    return self.output_query(F.gelu(self.intermediate_query["dense"](x)), x)


class QFormer(nn.Module):
  """Windows [N, L, E] to speech tokens [N, Q, output_width]."""

  def __init__(self, c: Sizes, input_width: int, output_width: int):
    super().__init__()
    self.speech_query_tokens = nn.Parameter(torch.randn(1, c.queries, c.hidden_size))
    norm = nn.ModuleDict({"LayerNorm": nn.LayerNorm(c.hidden_size, eps=c.norm_eps)})
    layers = nn.ModuleList(Layer(c, input_width) for _ in range(c.layers))
    bert = nn.ModuleDict({"embeddings": norm, "encoder": nn.ModuleDict({"layer": layers})})
    self.speech_Qformer = nn.ModuleDict({"bert": bert})
    self.speech_llama_proj = nn.Linear(c.hidden_size, output_width)

  def forward(self, windows):
    bert = self.speech_Qformer["bert"]
    x = bert["embeddings"]["LayerNorm"](self.speech_query_tokens.expand(len(windows), -1, -1))
    for layer in bert["encoder"]["layer"]:
      x = layer(x, windows)
    return self.speech_llama_proj(x)


def tokens(module, frames_BTD, c: Sizes):
  """Runs the module on the windows of frames [B, T, E]: [B, W * Q, output_width]."""
  frames = torch.as_tensor(frames_BTD)
  if c.pad_last:
    missing = max(c.window - frames.shape[1], 0) or (c.window - frames.shape[1]) % c.stride
    frames = F.pad(frames, (0, 0, 0, missing))
  windows_BWLD = frames.unfold(1, c.window, c.stride).transpose(2, 3)
  with torch.no_grad():
    return module(windows_BWLD.flatten(0, 1)).unflatten(0, (len(frames), -1)).flatten(1, 2)
