"""The sections of FunASR's config.yaml about the encoder and its features, in and out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.config import build
from mooer_jax.encoders.sanm import SANMConfig

from ..core.errors import Problems
from ..readers import check_file

FILE = "config.yaml"
# FunASR's defaults, and the only supported values.
_ENCODER = {
  "normalize_before": True,
  "concat_after": False,
  "positionwise_layer_type": "linear",
  "sanm_shfit": 0,
  "selfattention_layer_type": "sanm",
}
_FRONTEND = {"snip_edges": True, "upsacle_samples": True}
# FunASR's names -> fields of SANMConfig, FbankConfig and FrontendConfig.
_SIZES = {
  "output_size": "hidden_size",
  "attention_heads": "heads",
  "linear_units": "intermediate_size",
  "num_blocks": "layers",
  "kernel_size": "memory_kernel",
}
_FBANK = {
  "fs": "sample_rate_hz",
  "window": "window",
  "n_mels": "bins",
  "frame_length": "frame_ms",
  "frame_shift": "hop_ms",
}
_LFR = {"lfr_m": "lfr_window", "lfr_n": "lfr_stride"}
# Defaults of FunASR's SANMEncoder and WavFrontend, except sizes that the tensors show.
_ABSENT: dict[str, dict[str, Any]] = {
  "encoder_conf": {**_ENCODER, "attention_heads": 4, "input_layer": "conv2d"},
  "frontend_conf": {
    "fs": 16000,
    "window": "hamming",
    "n_mels": 80,
    "frame_length": 25,
    "frame_shift": 10,
    "lfr_m": 1,
    "lfr_n": 1,
    "dither": 1.0,
    **_FRONTEND,
  },
}


def read_yaml(path: Path) -> Mapping[str, Any]:
  """Reads a config.yaml. Raises ValueError if it is not YAML, or it or a section no mapping."""
  check_file(path)
  try:
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    reason = " ".join(str(error).split())
    raise ValueError(f"{path}: not YAML: {reason}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path}: must hold a mapping, got {type(value).__name__}")
  for name in _ABSENT:
    if not isinstance(value.get(name), dict | None):
      raise ValueError(f"{path}: {name} must hold a mapping, got {type(value[name]).__name__}")
  return value


def heads(conf: Mapping[str, Any]) -> Any:
  """Returns the number of heads; default: Paraformer's."""
  return _setting(conf, "encoder_conf", "attention_heads", otherwise=SANMConfig.heads)


def frontend(conf: Mapping[str, Any], input_width: int) -> FrontendConfig:
  """Reads the features of an encoder with this input width.

  Default: those of Paraformer, 7 frames every 6, each of input_width / 7 bins. Raises ValueError if
  they cannot be expressed, or have another width.
  """
  section: dict[str, Any] = {"fbank": {"bins": input_width // FrontendConfig.lfr_window}}
  if conf.get("frontend_conf") is not None:
    settings = {**_ABSENT["frontend_conf"], **conf["frontend_conf"]}
    section = {ours: settings[theirs] for theirs, ours in _LFR.items()}
    section["fbank"] = {ours: settings[theirs] for theirs, ours in _FBANK.items()}
  try:
    found = build(FrontendConfig, section, "frontend_conf")
  except ValueError as error:
    raise ValueError(f"{FILE}: {error}") from error
  if found.width != input_width:
    raise ValueError(
      f"the encoder takes {input_width} values a step, its features have {found.width}:"
      f" {found.lfr_window} frames of {found.fbank.bins} bins"
    )
  return found


def describe(config: SANMConfig, features: FrontendConfig) -> dict[str, Any]:
  """Returns the content of a config.yaml for an encoder and its features."""
  return {
    "encoder": "SANMEncoder",
    "encoder_conf": {
      **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
      "input_layer": "pe",
      "pos_enc_class": "SinusoidalPositionEncoder",
      **_ENCODER,
    },
    "frontend": "WavFrontend",
    "frontend_conf": {
      **{theirs: getattr(features.fbank, ours) for theirs, ours in _FBANK.items()},
      **{theirs: getattr(features, ours) for theirs, ours in _LFR.items()},
      "dither": 0.0,
      **_FRONTEND,
    },
  }


def check(
  conf: Mapping[str, Any], config: SANMConfig, features: FrontendConfig, *, problems: Problems
) -> None:
  """Adds every setting by which a config.yaml describes another model."""
  for section, wanted in describe(config, features).items():
    if not isinstance(wanted, dict):
      if (found := conf.get(section, wanted)) != wanted:
        problems.add(f"{FILE}: {section}={found!r}: only {wanted} can be converted")
      continue
    for key, value in wanted.items():
      found = _setting(conf, section, key, otherwise=value)
      if found != value and key != "dither":
        absent = "" if key in conf[section] else " (FunASR's default)"
        problems.add(
          f"{FILE}: {section}.{key}={found!r}{absent}; the tensors and this version need {value!r}"
        )


def same(conf: Mapping[str, Any], config: SANMConfig, features: FrontendConfig) -> bool:
  """Whether a config.yaml describes this model."""
  problems = Problems()
  check(conf, config, features, problems=problems)
  found = problems.attempt(frontend, conf, config.input_width)
  return found == features and not problems.found


def notes(conf: Mapping[str, Any]) -> tuple[str, ...]:
  """Sentences for the user about an imported config.yaml."""
  dither = _setting(conf, "frontend_conf", "dither", otherwise=0.0)
  if not dither:
    return ()
  return (f"{FILE}: dither={dither!r}: FunASR adds that noise to a clip, this library adds none",)


def _setting(conf: Mapping[str, Any], section: str, key: str, *, otherwise: Any) -> Any:
  """Returns a setting, by default FunASR's; `otherwise` without the section."""
  if conf.get(section) is None:
    return otherwise
  return conf[section].get(key, _ABSENT[section].get(key, otherwise))
