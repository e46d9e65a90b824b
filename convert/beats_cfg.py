"""What a file of BEATs says of itself beside its weights, `cfg`: read, checked and written."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooer_jax.encoders.beats import BEATsConfig

from .errors import Problems
from .readers import ReadError
from .readers.torch_file import TorchFile

# cfg's name of each size, ours, and what the original takes if the file does not say.
_SIZES = (
  ("input_patch_size", "patch", None),
  ("embed_dim", "patch_width", 512),
  ("encoder_layers", "layers", 12),
  ("encoder_embed_dim", "width", 768),
  ("encoder_ffn_embed_dim", "mlp_width", 3072),
  ("encoder_attention_heads", "heads", 12),
  ("conv_pos", "conv_pos", 128),
  ("conv_pos_groups", "conv_pos_groups", 16),
  ("num_buckets", "buckets", 320),
  ("max_distance", "max_distance", 1280),
)
# What we compute with, and what the original takes if the file does not say.
_ONLY: tuple[tuple[str, Any, Any], ...] = (
  ("conv_bias", False, False),
  ("activation_fn", "gelu", "gelu"),
  ("layer_norm_first", False, False),
  ("deep_norm", True, False),
  ("relative_position_embedding", True, False),
  ("gru_rel_pos", True, False),
)
# These act in training only, or on the head of a fine-tuned file.
_PASSED_OVER = (
  "layer_wise_gradient_decay_ratio",
  "dropout",
  "attention_dropout",
  "activation_dropout",
  "encoder_layerdrop",
  "dropout_input",
  "finetuned_model",
  "predictor_dropout",
  "predictor_class",
)


def read_cfg(path: Path) -> dict[str, Any]:
  """The sizes and options that stand beside the weights.

  Raises:
    ReadError: if it is no file of torch, or has no dict `cfg` of plain values.
  """
  if path.is_dir():
    raise ReadError(f"{path} is a folder; give the .pt file of BEATs itself")
  content = TorchFile(path).content()
  cfg = content.get("cfg") if isinstance(content, dict) else None
  if not isinstance(cfg, dict):
    raise ReadError(f"{path}: no dict 'cfg' beside 'model': not a file that BEATs was published as")
  for key, value in cfg.items():
    if not isinstance(key, str) or not isinstance(value, bool | int | float | str | None):
      raise ReadError(f"{path}: cfg[{key!r}] is of type {type(value).__name__}, no plain value")
  return dict(cfg)


def beats_config(cfg: Mapping[str, Any], problems: Problems) -> BEATsConfig | None:
  """Reads the sizes, and refuses by name what we do not know or compute otherwise.

  Returns None, with the reasons in `problems`, if the encoder cannot be expressed.
  """
  before = len(problems.found)
  known = {*(n for n, *_ in _SIZES), *(n for n, *_ in _ONLY), *_PASSED_OVER}
  for key in cfg:
    if key not in known:
      problems.add(
        f"unknown cfg key {key!r} (= {cfg[key]!r}); known are {', '.join(sorted(known))}"
      )
  for key, wanted, default in _ONLY:
    value = cfg.get(key, default)
    if value != wanted:
      said = "" if key in cfg else " (not in the file, the original's default)"
      problems.add(f"cfg {key}={value!r}{said}: only {wanted!r} can be expressed")
  sizes = {}
  for key, name, default in _SIZES:
    value = cfg.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
      problems.add(f"cfg {key}={value!r}: a whole number is needed")
    else:
      sizes[name] = value
  if len(problems.found) > before:
    return None
  try:
    return BEATsConfig(**sizes)
  except ValueError as error:
    problems.add(str(error))
    return None


def cfg_of(config: BEATsConfig, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """What a file says of an encoder; `given` is the cfg that it was imported with.

  Raises:
    ConversionError: if the file would describe another encoder: `given` is of another one, or the
      original has no such input width.
  """
  if given is None:
    sizes = {key: getattr(config, name) for key, name, _ in _SIZES}
    given = {**sizes, **{key: wanted for key, wanted, _ in _ONLY}}
  problems = Problems()
  described = beats_config(given, problems)
  if described != dataclasses.replace(config, dropout=0.0):
    problems.add(f"it describes {described}, the encoder is {config}")
  problems.check("cfg")
  return {**given, "finetuned_model": False} if given.get("finetuned_model") else dict(given)
