"""BEATs by its published structure, with torch's primitives and transformers' filter bank."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ...core.errors import ConversionError
from ...core.kind import Original, Request, Stages
from ...readers import open_source
from ...readers.torch_file import TorchFile
from .language_model import State, state_of

MEL_BINS, RATE_HZ = 128, 16000
MEAN, DEVIATION = 15.41663, 6.55582  # of the features that BEATs was trained with
CONV = "encoder.pos_conv.0"
BIAS_TABLE = "encoder.layers.0.self_attn.relative_attention_bias.weight"  # of all layers
# The original's defaults of sizes in a file's cfg that the tensors do not show.
DEFAULTS = {
  "encoder_layers": 12,
  "encoder_attention_heads": 12,
  "conv_pos_groups": 16,
  "max_distance": 1280,
}
# The supported options.
OPTIONS = {"layer_norm_first": False, "deep_norm": True, "gru_rel_pos": True, "conv_bias": False}


def run(request: Request) -> Original:
  """Runs the encoder of a BEATs file."""
  return Original(run_beats_encoder(request.src, request.waveforms))


def run_beats_encoder(
  file: Path, waveforms: Sequence[np.ndarray], *, tuned: State | None = None
) -> list[Stages]:
  """Runs features and encoder on clips [N] at 16 kHz. Tensors in `tuned` replace those of the file.

  Returns:
    Per clip, "features" [T, 128], normalised, and "encoder" [T', D].
  """
  cfg = TorchFile(file).content()["cfg"]
  for key, value in OPTIONS.items():
    if cfg.get(key, False) != value:
      raise ConversionError(f"{file}: cfg {key}={cfg.get(key)!r}: only {value} can be verified")
  cfg = {**DEFAULTS, **cfg}
  state = {**state_of(open_source(file, part="model")), **(tuned or {})}
  try:
    check_shapes(state, cfg, file)
  except KeyError as error:
    raise ConversionError(f"{file}: {error.args[0]} is missing") from error
  clips = []
  for waveform_N in waveforms:
    features_TF = features(waveform_N)
    frames_TD = encode(torch.tensor(features_TF), state, cfg)
    clips.append({"features": features_TF, "encoder": frames_TD.numpy()})
  return clips


def check_shapes(state: State, cfg: Mapping[str, Any], file: Path) -> None:
  """Raises KeyError for a missing tensor, ConversionError for one that does not fit the others."""
  patches, *_, patch = state["patch_embedding.weight"].shape
  width, hidden = len(state["encoder.layer_norm.weight"]), len(state["encoder.layers.0.fc1.weight"])
  taps, heads = state[f"{CONV}.weight_v"].shape[-1], cfg["encoder_attention_heads"]
  shapes: dict[str, tuple[int, ...]] = {
    "patch_embedding.weight": (patches, 1, patch, patch),
    f"{CONV}.weight_v": (width, width // cfg["conv_pos_groups"], taps),
    f"{CONV}.weight_g": (1, 1, taps),
    f"{CONV}.bias": (width,),
    BIAS_TABLE: (len(state[BIAS_TABLE]), heads),
  }
  modules: dict[str, tuple[int, ...]] = {"layer_norm": (patches,), "encoder.layer_norm": (width,)}
  if patches != width:
    modules["post_extract_proj"] = (width, patches)
  for n in range(cfg["encoder_layers"]):
    layer, attention = f"encoder.layers.{n}", f"encoder.layers.{n}.self_attn"
    shapes[f"{attention}.grep_a"] = (1, heads, 1, 1)
    modules[f"{attention}.grep_linear"] = (8, width // heads)
    modules |= {f"{attention}.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    modules |= {f"{layer}.{name}_layer_norm": (width,) for name in ("self_attn", "final")}
    modules |= {f"{layer}.fc1": (hidden, width), f"{layer}.fc2": (width, hidden)}
  for name, shape in modules.items():
    shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
  for name, shape in shapes.items():
    if state[name].shape != shape:
      raise ConversionError(
        f"{file}: {name} has shape {list(state[name].shape)}, but the others need {list(shape)}"
      )


def encode(features_TF: torch.Tensor, state: State, cfg: Mapping[str, Any]) -> torch.Tensor:
  """Encodes normalised features: frames [T', D]."""

  def linear(x, name):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

  def norm(x, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

  patch = state["patch_embedding.weight"]
  x_TD = F.conv2d(features_TF[None, None], patch, stride=patch.shape[-1])[0].flatten(1).T
  x_TD = norm(x_TD, "layer_norm")
  if x_TD.shape[1] != len(state["encoder.layer_norm.weight"]):
    x_TD = linear(x_TD, "post_extract_proj")
  kernel = state[f"{CONV}.weight_v"]
  kernel = state[f"{CONV}.weight_g"] * kernel / kernel.norm(dim=(0, 1), keepdim=True)
  options = {"padding": kernel.shape[-1] // 2, "groups": cfg["conv_pos_groups"]}
  positions_DT = F.conv1d(x_TD.T, kernel, state[f"{CONV}.bias"], **options)[:, : len(x_TD)]
  x_TD = norm(x_TD + F.gelu(positions_DT.T), "encoder.layer_norm")

  table = state[BIAS_TABLE]
  bias_HTT = table[buckets(len(x_TD), len(table), cfg["max_distance"])].permute(2, 0, 1)
  alpha = (2 * cfg["encoder_layers"]) ** 0.25
  for n in range(cfg["encoder_layers"]):
    layer, attention = f"encoder.layers.{n}", f"encoder.layers.{n}.self_attn"
    q_HTC, k_HTC, v_HTC = (
      linear(x_TD, f"{attention}.{name}_proj").unflatten(1, (cfg["encoder_attention_heads"], -1))
      .transpose(0, 1) for name in "qkv"
    )  # fmt: skip
    gates_HT2 = linear(q_HTC, f"{attention}.grep_linear").unflatten(2, (2, 4)).sum(-1).sigmoid()
    update, reset = gates_HT2.split(1, -1)
    gated_HTT = (update * (reset * state[f"{attention}.grep_a"][0] - 1) + 2) * bias_HTT
    y_HTC = F.scaled_dot_product_attention(q_HTC, k_HTC, v_HTC, attn_mask=gated_HTT)
    y_TD = linear(y_HTC.transpose(0, 1).flatten(1), f"{attention}.out_proj")
    x_TD = norm(alpha * x_TD + y_TD, f"{layer}.self_attn_layer_norm")
    y_TD = linear(F.gelu(linear(x_TD, f"{layer}.fc1")), f"{layer}.fc2")
    x_TD = norm(alpha * x_TD + y_TD, f"{layer}.final_layer_norm")
  return x_TD


def buckets(length: int, count: int, reach: int) -> torch.Tensor:
  """Rows of the bias table for all pairs of positions: [length, length]."""
  place = torch.arange(length)
  distance = place[None] - place[:, None]
  size, one_way, exact = distance.abs(), count // 2, count // 4
  far = torch.log(size.clamp(min=1) / exact) / math.log(reach / exact)
  far = (exact + (far * (one_way - exact)).long()).clamp(max=one_way - 1)
  return torch.where(size < exact, size, far) + one_way * (distance > 0)


def features(waveform_N: np.ndarray) -> np.ndarray:
  """Kaldi's filter bank of a waveform at 16 kHz: float32 [T, 128], normalised."""
  from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

  with warnings.catch_warnings(action="ignore"):  # the lowest filters are between two bins
    filters = mel_filter_bank(
      257, MEL_BINS, 20, RATE_HZ / 2, RATE_HZ, mel_scale="kaldi", triangularize_in_mel_space=True
    )
  fbank_FT = spectrogram(
    waveform_N * 2.0**15,
    window_function(400, "povey", periodic=False),
    frame_length=400,
    hop_length=160,
    fft_length=512,
    power=2.0,
    center=False,
    preemphasis=0.97,
    mel_filters=filters,
    mel_floor=float(np.finfo(np.float32).eps),
    log_mel="log",
    remove_dc_offset=True,
  )
  return ((fbank_FT.T - MEAN) / (2 * DEVIATION)).astype(np.float32)
