"""Q-Formers in PyTorch on random weights, under the names of salmonn_v1.pth."""

import torch
import torch.nn.functional as F
from torch import nn

from convert.parts import qformer
from mooer_jax import tree
from mooer_jax.connectors.qformer import QFormerConfig
from tests.parity.torch_models import vary_vectors


class Blip2(nn.Module):
  """transformers' Q-Former of the same sizes, between our queries and projection."""

  def __init__(self, c: QFormerConfig, input_width: int, output_width: int):
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    super().__init__()
    config = Blip2QFormerConfig(
      hidden_size=c.hidden_size,
      num_hidden_layers=c.layers,
      num_attention_heads=c.heads,
      intermediate_size=c.intermediate_size,
      layer_norm_eps=c.norm_eps,
      encoder_hidden_size=input_width,
      cross_attention_frequency=1,
      use_qformer_text_input=False,
      attn_implementation="eager",
    )
    self.speech_query_tokens = nn.Parameter(torch.randn(1, c.queries, c.hidden_size))
    self.qformer = Blip2QFormerModel(config)
    self.speech_llama_proj = nn.Linear(c.hidden_size, output_width)

  def forward(self, windows):
    queries = self.speech_query_tokens.expand(len(windows), -1, -1)
    out = self.qformer(query_embeds=queries, encoder_hidden_states=windows)
    return self.speech_llama_proj(out.last_hidden_state)

  def state_dict(self, *args, **kwargs):
    """Under the names of salmonn_v1.pth."""
    renamed = {}
    for name, tensor in super().state_dict(*args, **kwargs).items():
      name = name.replace("attention.attention.", "attention.self.")
      name = name.replace("qformer.encoder.", "speech_Qformer.bert.encoder.")
      name = name.replace("qformer.layernorm.", "speech_Qformer.bert.embeddings.LayerNorm.")
      renamed[name] = tensor
    return renamed


class Residual(nn.Module):
  """Dense layer, residual connection, LayerNorm."""

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
  def __init__(self, c: QFormerConfig, input_width):
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

  def __init__(self, c: QFormerConfig, input_width: int, output_width: int):
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


def tokens(module, frames_BTD, c: QFormerConfig):
  """Runs the module on the windows of frames [B, T, E]: [B, W * Q, output_width]."""
  frames = torch.as_tensor(frames_BTD)
  if c.edge == "pad":
    missing = max(c.window - frames.shape[1], 0) or (c.window - frames.shape[1]) % c.stride
    frames = F.pad(frames, (0, 0, 0, missing))
  windows_BWLD = frames.unfold(1, c.window, c.stride).transpose(2, 3)
  with torch.no_grad():
    return module(windows_BWLD.flatten(0, 1)).unflatten(0, (len(frames), -1)).flatten(1, 2)


def make(kind: type[nn.Module], c: QFormerConfig, input_width: int, output_width: int, seed=0):
  torch.manual_seed(seed)
  return vary_vectors(kind(c, input_width, output_width), seed)


def params(tensors) -> dict:
  """A state dict in our layout, by the converter's table."""
  flat = {}
  for name, tensor in tensors.items():
    path, transform = qformer.TABLE.to_jax(name)
    flat[path] = transform.to_jax(tensor.numpy())
  return tree.unflatten(flat)["connector"]
