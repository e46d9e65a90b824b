"""Whisper's encoder and features, by transformers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mooer_jax.encoders.whisper import WhisperConfig

from ...core.errors import ConversionError
from ...core.kind import Original, Request, Stages
from ...readers import Source, open_source
from ...readers.torch_file import TorchFile
from .language_model import State, load_state, state_of

# Prefixes of the encoder's names in files of Hugging Face.
_PREFIXES = ("model.encoder.", "encoder.", "")
# Names of openai-whisper and CTranslate2 -> of transformers; regular expressions.
_OPENAI = (
  (r"positional_embedding", "embed_positions.weight"),
  (r"ln_post\.", "layer_norm."),
  (r"blocks\.", "layers."),
  (r"\.attn_ln\.", ".self_attn_layer_norm."),
  (r"\.attn\.query\.", ".self_attn.q_proj."),
  (r"\.attn\.key\.", ".self_attn.k_proj."),
  (r"\.attn\.value\.", ".self_attn.v_proj."),
  (r"\.attn\.out\.", ".self_attn.out_proj."),
  (r"\.mlp_ln\.", ".final_layer_norm."),
  (r"\.mlp\.0\.", ".fc1."),
  (r"\.mlp\.2\.", ".fc2."),
)
_CTRANSLATE2 = (
  (r"position_encodings/encodings", "embed_positions.weight"),
  (r"layer_(\d+)/self_attention/layer_norm", r"layers.\1.self_attn_layer_norm"),
  (r"layer_(\d+)/self_attention/linear_1", r"layers.\1.self_attn.out_proj"),
  (r"layer_(\d+)/ffn/layer_norm", r"layers.\1.final_layer_norm"),
  (r"layer_(\d+)/ffn/linear_0", r"layers.\1.fc1"),
  (r"layer_(\d+)/ffn/linear_1", r"layers.\1.fc2"),
  (r"/gamma$", ".weight"),
  (r"/beta$", ".bias"),
  (r"/(weight|bias)$", r".\1"),
)
_FUSED = re.compile(r"layer_(\d+)/self_attention/linear_0/(weight|bias)")


def run(request: Request) -> Original:
  """Runs the encoder of a folder or file of Whisper."""
  check_context(request)
  return Original(run_whisper_encoder(request.src, request.waveforms))


def check_context(request: Request) -> None:
  """Raises ConversionError if our encoder does not compute all frames, as the original does."""
  for encoder in request.config.encoders:
    if not isinstance(encoder, WhisperConfig):
      continue
    if encoder.trim or encoder.context != encoder.positions:
      raise ConversionError(
        f"whisper.context={encoder.context}, whisper.trim={encoder.trim}: the original computes"
        f" all of its {encoder.positions} frames; verify an imported checkpoint"
      )


def run_whisper_encoder(
  src: Path, waveforms: Sequence[np.ndarray], *, tuned: State | None = None
) -> list[Stages]:
  """Runs transformers' features and encoder on clips [N] at 16 kHz.

  Tensors in `tuned`, under transformers' names, replace those of the file.

  Returns:
    Per clip, "features" of the frames that overlap the clip, and "encoder" of all frames.
  """
  from transformers import WhisperFeatureExtractor

  module = whisper_encoder(src, tuned)
  extract: Any = WhisperFeatureExtractor(feature_size=module.config.num_mel_bins)
  frame, hop = extract.n_fft, extract.hop_length
  samples = module.config.max_source_positions * module.conv2.stride[0] * hop
  clips = []
  for waveform_N in waveforms:
    mel_BFT = extract(
      waveform_N, sampling_rate=extract.sampling_rate, max_length=samples, return_tensors="pt"
    ).input_features
    with torch.no_grad():
      frames_BTD = module(mel_BFT).last_hidden_state
    # Frame t covers the samples from t * hop - frame / 2 to t * hop + frame / 2.
    overlapping = -(-(len(waveform_N) + frame // 2) // hop)
    features_TF = mel_BFT[0, :, :overlapping].T
    clips.append({"features": features_TF.numpy(), "encoder": frames_BTD[0].numpy()})
  return clips


def whisper_encoder(src: Path, tuned: State | None = None) -> Any:
  """Makes transformers' encoder in float32 from a folder or file of Whisper."""
  from transformers import WhisperConfig
  from transformers.models.whisper.modeling_whisper import WhisperEncoder

  source = open_source(src)
  if "encoder/conv1/weight" in source.tensors:
    state, heads = _ctranslate2(source), int(source.read("encoder/num_heads").max())
  elif "encoder.blocks.0.attn_ln.weight" in source.tensors:
    state = {_renamed(n, _OPENAI): tensor for n, tensor in state_of(source, "encoder.").items()}
    heads = TorchFile(source.tensors["encoder.conv1.weight"].file).content()["dims"]["n_audio_head"]
  else:
    first = "layers.0.self_attn_layer_norm.weight"
    prefix = next((p for p in _PREFIXES if p + first in source.tensors), None)
    if prefix is None:
      raise ConversionError(f"{src}: no Whisper encoder in it")
    module = WhisperEncoder(WhisperConfig.from_pretrained(src))
    return load_state(module, {**state_of(source, prefix), **(tuned or {})}, src)
  width, bins, _ = state["conv1.weight"].shape
  config = WhisperConfig(
    num_mel_bins=bins,
    d_model=width,
    encoder_layers=len({name for name in state if name.endswith(".fc1.weight")}),
    encoder_attention_heads=heads,
    encoder_ffn_dim=len(state["layers.0.fc1.weight"]),
    max_source_positions=len(state["embed_positions.weight"]),
  )
  return load_state(WhisperEncoder(config), {**state, **(tuned or {})}, src)


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
  for theirs, published in pairs:
    name = re.sub(theirs, published, name)
  return name


def _ctranslate2(source: Source) -> dict[str, torch.Tensor]:
  """Renames CTranslate2's encoder, and splits its joint q, k and v."""
  state = {}
  for name, tensor in state_of(source, "encoder/").items():
    if fused := _FUSED.fullmatch(name):
      for part, rows in zip("qkv", tensor.chunk(3)):
        state[f"layers.{fused[1]}.self_attn.{part}_proj.{fused[2]}"] = rows
    else:
      state[_renamed(name, _CTRANSLATE2)] = tensor
  return state
