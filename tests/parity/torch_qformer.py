"""Q-Formers in PyTorch on random weights, under the names of salmonn_v1.pth."""

import torch
from torch import nn

from convert.parts import qformer
from convert.verify.reference.qformer import QFormer, Sizes
from convert.verify.reference.qformer import tokens as run_windows
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


def make(kind: type[nn.Module], c: QFormerConfig, input_width: int, output_width: int, seed=0):
  torch.manual_seed(seed)
  sizes = sizes_of(c) if kind is QFormer else c
  return vary_vectors(kind(sizes, input_width, output_width), seed)


def sizes_of(c: QFormerConfig) -> Sizes:
  return Sizes(
    queries=c.queries,
    hidden_size=c.hidden_size,
    intermediate_size=c.intermediate_size,
    layers=c.layers,
    window=c.window,
    stride=c.stride,
    heads=c.heads,
    norm_eps=c.norm_eps,
    pad_last=c.edge == "pad",
  )


def tokens(module, frames_BTD, c: QFormerConfig):
  return run_windows(module, frames_BTD, sizes_of(c))


def params(tensors) -> dict:
  """A state dict in our layout, by the converter's table."""
  flat = {}
  for name, tensor in tensors.items():
    path, transform = qformer.TABLE.to_jax(name)
    flat[path] = transform.to_jax(tensor.numpy())
  return tree.unflatten(flat)["connector"]
