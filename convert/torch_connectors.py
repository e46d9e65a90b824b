"""What the originals have between their encoders and their LLM, and SALMONN's LLM itself."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from mooer_jax.connectors.qformer import QFormerConfig

from . import torch_qformer
from .readers import Source, open_source
from .torch_side import Stages, language_model, load, state_of, with_lora

_LLM = "llama_model."
# The original gives its LLM a token [PAD], which ours does not have: one row at the end.
_ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def adapt(adapter: Path, clips: Sequence[Stages], stack: int) -> list[Stages]:
  """MooER's adapter in two lines: each clip with "adapter" [S, D of the LLM] besides."""
  weight = state_of(open_source(adapter), "encoder_projector.")
  linear = torch.nn.functional.linear
  adapted = []
  for clip in clips:
    frames_TD = clip["encoder"]
    whole = len(frames_TD) // stack * stack
    x = torch.tensor(frames_TD[:whole]).reshape(whole // stack, -1)
    x = torch.relu(linear(x, weight["linear1.weight"], weight["linear1.bias"]))
    x = linear(x, weight["linear2.weight"], weight["linear2.bias"])
    adapted.append({**clip, "adapter": x.numpy()})
  return adapted


def connect_windows(
  source: Source, heard: Mapping[str, np.ndarray], config: QFormerConfig
) -> np.ndarray:
  """SALMONN's norms, its streams side by side, and the windows of its Q-Former.

  Args:
    source: salmonn_v1.pth.
    heard: name of the norm ("ln_speech", "ln_audio") -> a clip's frames [T, D].
    config: the Q-Former's sizes and windows.

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
    for n, x_TD in heard.items()
  ]
  longest = max(map(len, normed))
  frames_TD = torch.cat([F.pad(x_TD, (0, 0, 0, longest - len(x_TD))) for x_TD in normed], dim=-1)
  widths = frames_TD.shape[-1], len(state["speech_llama_proj.weight"])
  module = load(torch_qformer.QFormer(config, *widths), state, source.path)
  return torch_qformer.tokens(module, frames_TD[None], config)[0].numpy()


def salmonn_llm(source: Source, folder: Path, *, lora: Mapping[str, Any], vocab: int) -> Any:
  """The LLM of a folder with what SALMONN's file holds of it, its LoRA by peft.

  Args:
    source: salmonn_v1.pth.
    folder: of the LLM.
    lora: lora_alpha and use_rslora of training.
    vocab: rows of the LLM's embedding.
  """
  state = state_of(source, _LLM)
  added = {name: tensor for name, tensor in state.items() if ".lora_" in name}
  tuned = {}
  for name in state.keys() - added.keys():
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    tuned[plain] = state[name][:vocab] if plain in _ROWS else state[name]
  tuned = {name: tensor for name, tensor in tuned.items() if not name.endswith(".inv_freq")}
  module = language_model(folder, tuned)
  if not added:
    return module
  from peft import LoraConfig

  config = LoraConfig(
    r=next(len(tensor) for name, tensor in added.items() if ".lora_A." in name),
    lora_alpha=lora["lora_alpha"],
    use_rslora=bool(lora.get("use_rslora")),
    target_modules=sorted({re.split(r"\.lora_[AB]", name)[0].split(".")[-1] for name in added}),
    task_type="CAUSAL_LM",
  )
  return with_lora(module, config, added, source.path)
