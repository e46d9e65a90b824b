"""Paraformer's SAN-M encoder and features, by funasr."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ...core.kind import Original, Request, Stages
from ...readers import open_source
from .language_model import State, load_state, state_of

# Paraformer-large's options, without a config.yaml.
ENCODER = {
  "attention_heads": 4,
  "input_layer": "pe",
  "normalize_before": True,
  "sanm_shfit": 0,
  "selfattention_layer_type": "sanm",
}
FRONTEND: dict[str, Any] = {"fs": 16000, "window": "hamming", "n_mels": 80, "lfr_m": 7, "lfr_n": 6}
_FIRST, _OTHERS = "encoders0.0.", "encoders."


def run(request: Request) -> Original:
  """Runs the encoder of FunASR's folder."""
  described = request.src / "config.yaml"
  conf = yaml.safe_load(described.read_text("utf-8")) if described.is_file() else {}
  weights, cmvn = request.src / "model.pt", request.src / "am.mvn"
  return Original(run_sanm_encoder(weights, cmvn, request.waveforms, conf=conf))


def run_sanm_encoder(
  weights: Path,
  cmvn: Path,
  waveforms: Sequence[np.ndarray],
  *,
  conf: Mapping[str, Any] | None = None,
  tuned: State | None = None,
) -> list[Stages]:
  """Runs funasr's front end and encoder, with the options of a config.yaml, on clips [N].

  Tensors in `tuned` replace those of the file.

  Returns:
    Per clip, "features" [T, F] after CMVN and "encoder" [T, D].
  """
  from funasr.frontends.wav_frontend import WavFrontend

  conf = conf or {}
  options = {**(conf.get("frontend_conf") or _frontend_of(cmvn)), "cmvn_file": str(cmvn)}
  options["dither"] = 0.0
  extract = WavFrontend(**options)
  source = open_source(weights)
  first = next((name for name in source.tensors if _FIRST in name), _FIRST)
  state = {**state_of(source, first.partition(_FIRST)[0]), **(tuned or {})}
  module = load_state(sanm_encoder(_sizes(state), conf.get("encoder_conf")), state, weights)
  clips = []
  for waveform_N in waveforms:
    with torch.no_grad():
      features_BTF, frames_B = extract(
        torch.tensor(waveform_N)[None], torch.tensor([len(waveform_N)])
      )
      frames_BTD = module(features_BTF, frames_B)[0]
    clips.append({"features": features_BTF[0].numpy(), "encoder": frames_BTD[0].numpy()})
  return clips


def _frontend_of(cmvn: Path) -> dict[str, Any]:
  """Paraformer's front end, with the number of mel bins from am.mvn."""
  [values] = re.findall(r"<LearnRateCoef>\s*\S+\s*\[([^\]]*)\]", cmvn.read_text("utf-8"))[:1]
  return {**FRONTEND, "n_mels": len(values.split()) // FRONTEND["lfr_m"]}


def sanm_encoder(sizes: Mapping[str, int], options: Mapping[str, Any] | None = None) -> Any:
  """Makes funasr's encoder with random weights; `options` is encoder_conf of config.yaml."""
  from funasr.models.sanm.encoder import SANMEncoder

  return SANMEncoder(**{**sizes, **(options or ENCODER)})


def _sizes(state: State) -> dict[str, int]:
  """Sizes by funasr's names, from the shapes of the tensors."""
  attention, up = f"{_FIRST}self_attn.", f"{_FIRST}feed_forward.w_1.weight"
  joined, input_size = state[f"{attention}linear_q_k_v.weight"].shape
  layers = {name.split(".")[1] for name in state if name.startswith(_OTHERS)}
  return {
    "input_size": input_size,
    "output_size": joined // 3,
    "linear_units": state[up].shape[0],
    "num_blocks": 1 + len(layers),
    "kernel_size": state[f"{attention}fsmn_block.weight"].shape[-1],
  }
