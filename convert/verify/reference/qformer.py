"""SALMONN's window-level Q-Former, by transformers' BLIP-2."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...readers import Source
from .language_model import State, load_state, state_of

_FRAMES, _SECONDS = 1500, 30.0  # by which the original counts the frames of a window
_BERT = "speech_Qformer.bert."
_LAYER = f"{_BERT}encoder.layer."


def run_qformer(
  source: Source, streams: Sequence[tuple[str, np.ndarray]], seconds: Mapping[str, float]
) -> np.ndarray:
  """Normalises the frames of each encoder, joins them and runs the Q-Former on every window.

  Args:
    streams: (name of the LayerNorm, frames [T, D]) of each encoder, in order.
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
  window, stride = (
    round(_FRAMES * seconds[name] / _SECONDS) for name in ("second_per_window", "second_stride")
  )
  windows_WLD = frames_TD.unfold(0, window, stride).transpose(1, 2)
  queries_WQD = state["speech_query_tokens"].expand(len(windows_WLD), -1, -1)
  with torch.no_grad():
    out_WQD = qformer(state, frames_TD.shape[-1], source.path)(
      query_embeds=queries_WQD, encoder_hidden_states=windows_WLD
    ).last_hidden_state
    weight, bias = (state[f"speech_llama_proj.{name}"] for name in ("weight", "bias"))
    return F.linear(out_WQD, weight, bias).flatten(0, 1).numpy()


def qformer(state: State, input_width: int, path: Path) -> Any:
  """Makes transformers' Q-Former with SALMONN's tensors; their shapes give its sizes."""
  from transformers import Blip2QFormerConfig, Blip2QFormerModel

  config = Blip2QFormerConfig(
    hidden_size=state["speech_query_tokens"].shape[-1],
    num_hidden_layers=len({name.split(".")[4] for name in state if name.startswith(_LAYER)}),
    intermediate_size=len(state[f"{_LAYER}0.intermediate_query.dense.weight"]),
    encoder_hidden_size=input_width,
    cross_attention_frequency=1,
    use_qformer_text_input=False,
  )
  renamed = {
    name.removeprefix(_BERT)
    .replace("attention.self.", "attention.attention.")
    .replace("embeddings.LayerNorm.", "layernorm."): tensor
    for name, tensor in state.items()
  }
  return load_state(Blip2QFormerModel(config), renamed, path)
