"""The original encoders: funasr's, transformers' and, of BEATs, the one in reference/beats.py.

Each hears clip by clip; a clip's stages are "features" [T, F], normalised, and "encoder" [T, D].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mooer_jax.audio.frontend import FrontendConfig, num_frames
from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.encoders.whisper import WhisperConfig

from ..core.errors import ConversionError, Problems
from ..families.mooer import TUNED_ENCODER
from ..parts import beats, whisper
from ..parts.paraformer import find_prefix
from ..parts.whisper import PREFIX, find_format, split_ctranslate2
from ..readers import Source, open_source
from .reference import beats as reference_beats
from .torch_models import Stages, State, load, state_of

# openai-whisper's names of an encoder's tensors, and transformers'.
_OPENAI = (
  ("positional_embedding", "embed_positions.weight"),
  ("ln_post.", "layer_norm."),
  ("blocks.", "layers."),
  (".attn_ln.", ".self_attn_layer_norm."),
  (".attn.query.", ".self_attn.q_proj."),
  (".attn.key.", ".self_attn.k_proj."),
  (".attn.value.", ".self_attn.v_proj."),
  (".attn.out.", ".self_attn.out_proj."),
  (".mlp_ln.", ".final_layer_norm."),
  (".mlp.0.", ".fc1."),
  (".mlp.2.", ".fc2."),
)


def sanm_encoder(config: SANMConfig):
  """funasr's encoder of the same sizes, with random weights."""
  from funasr.models.sanm.encoder import SANMEncoder

  return SANMEncoder(
    input_size=config.input_width,
    output_size=config.width,
    attention_heads=config.heads,
    linear_units=config.mlp_width,
    num_blocks=config.layers,
    input_layer="pe",
    normalize_before=True,
    kernel_size=config.memory_kernel,
    sanm_shfit=0,
    selfattention_layer_type="sanm",
  )


def hear_sanm(
  weights: Path,
  cmvn: Path,
  config: SANMConfig,
  *,
  frontend: FrontendConfig,
  waveforms: Sequence[np.ndarray],
  tuned: Path | None = None,
) -> list[Stages]:
  """funasr's front end and encoder: of each clip "features" after CMVN [T, F], "encoder" [T, D].

  Args:
    weights: file with the encoder.
    cmvn: am.mvn.
    config, frontend: sizes, as the original's are.
    waveforms: clips [N].
    tuned: MooER's adapter file; the encoder's tensors in it, if it was trained along, go over those
      in `weights`, as the original loads one file after the other.
  """
  from funasr.frontends.wav_frontend import WavFrontend

  listen = WavFrontend(
    cmvn_file=str(cmvn),
    fs=frontend.fbank.sample_rate_hz,
    n_mels=frontend.fbank.bins,
    lfr_m=frontend.lfr_window,
    lfr_n=frontend.lfr_stride,
    dither=0.0,
  )
  source = open_source(weights)
  state = state_of(source, find_prefix(source) or "")
  if tuned is not None:
    state |= state_of(open_source(tuned), TUNED_ENCODER)
  module = load(sanm_encoder(config), state, weights)
  heard = []
  for waveform_N in waveforms:
    with torch.no_grad():
      features_BTF, frames_B = listen(
        torch.tensor(waveform_N)[None], torch.tensor([len(waveform_N)])
      )
      frames_BTD = module(features_BTF, frames_B)[0]
    heard.append({"features": features_BTF[0].numpy(), "encoder": frames_BTD[0].numpy()})
  return heard


def hear_whisper(
  src: Path,
  config: WhisperConfig,
  frontend: LogMelConfig,
  *,
  waveforms: Sequence[np.ndarray],
  tuned: State | None = None,
) -> list[Stages]:
  """transformers' features and encoder of Whisper.

  Args:
    src: folder of Hugging Face or faster-whisper, or openai-whisper's .pt file.
    config, frontend: ours, for the number of frames that are compared.
    waveforms: clips [N] at 16 kHz.
    tuned: tensors under transformers' names that replace those of `src`.

  Returns:
    Features of the frames that touch the clip; the encoder's frames are those of the whole context.

  Raises:
    ConversionError: if ours does not hear the whole context, as the original does.
  """
  from transformers import WhisperFeatureExtractor

  if config.trim or config.context != config.positions:
    raise ConversionError(
      f"whisper.context={config.context}, whisper.trim={config.trim}: the original gives all of its"
      f" {config.positions} frames, so there is nothing to compare with; verify the"
      " checkpoint that an import made"
    )
  module = whisper_encoder(src, tuned)
  samples = module.config.max_source_positions * 2 * 160
  listen: Any = WhisperFeatureExtractor(feature_size=module.config.num_mel_bins)
  heard = []
  for waveform_N in waveforms:
    mel_BFT = listen(
      waveform_N, sampling_rate=16000, max_length=samples, return_tensors="pt"
    ).input_features
    with torch.no_grad():
      frames_BTD = module(mel_BFT).last_hidden_state
    features_TF = mel_BFT[0, :, : num_frames(len(waveform_N), frontend)].T
    heard.append({"features": features_TF.numpy(), "encoder": frames_BTD[0].numpy()})
  return heard


def whisper_encoder(src: Path, tuned: State | None = None) -> Any:
  """transformers' encoder with the tensors of a folder or file of Whisper, in float32.

  Only the names of CTranslate2 go through the import's own reading.
  """
  from transformers import WhisperConfig
  from transformers.models.whisper.modeling_whisper import WhisperEncoder

  source = open_source(src)
  found = find_format(source)
  if found is None:
    raise ConversionError(f"{src}: no Whisper encoder in it")
  style, prefix = found
  if style == "hf":
    return load(
      WhisperEncoder(WhisperConfig.from_pretrained(src)),
      {**state_of(source, prefix), **(tuned or {})},
      src,
    )
  problems = Problems()
  opened = whisper.open_encoder(src, problems)
  problems.check(str(src))
  assert opened is not None
  config = WhisperConfig(**whisper.hf_config(opened.config, np.dtype(np.float32)))
  state = _openai(source, prefix) if style == "openai" else _ctranslate2(source)
  return load(WhisperEncoder(config), {**state, **(tuned or {})}, src)


def _openai(source: Source, prefix: str) -> dict[str, torch.Tensor]:
  state = {}
  for name, tensor in state_of(source, prefix).items():
    for theirs, published in _OPENAI:
      name = name.replace(theirs, published)
    state[name] = tensor
  return state


def _ctranslate2(source: Source) -> dict[str, torch.Tensor]:
  problems = Problems()
  split = split_ctranslate2(source, problems)
  problems.check(str(source.path))
  return state_of(split, PREFIX)


def hear_beats(
  file: Path, waveforms: Sequence[np.ndarray], *, tuned: State | None = None
) -> list[Stages]:
  """BEATs as it was published, rebuilt from torch's primitives.

  Args:
    file: the .pt file.
    waveforms: clips [N] at 16 kHz.
    tuned: tensors under the file's names that replace those of the file.
  """
  problems = Problems()
  config = beats.beats_config(beats.read_cfg(file), problems)
  problems.check(str(file))
  assert config is not None
  state = {**state_of(open_source(file, part="model")), **(tuned or {})}
  for n in range(1, config.layers):  # a shared tensor, which a file need not repeat
    state.setdefault(beats.BIAS_TABLE.format(n=n), state[beats.BIAS_TABLE.format(n=0)])
  module = load(reference_beats.BEATs(config), state, file)
  heard = []
  for waveform_N in waveforms:
    features_TF = reference_beats.features(waveform_N)
    with torch.no_grad():
      frames_BTD = module(features_TF[None])
    heard.append({"features": features_TF.numpy(), "encoder": frames_BTD[0].numpy()})
  return heard
