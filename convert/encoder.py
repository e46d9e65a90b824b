"""Paraformer's SAN-M encoder and its CMVN: FunASR's model folders, and MooER's encoder file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mooer_jax import tree
from mooer_jax.audio.cmvn import read_mvn, write_mvn
from mooer_jax.audio.fbank import FbankConfig
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.checkpoint import Checkpoint, Lazy, read_leaves
from mooer_jax.encoders.sanm import SANMConfig, SANMEncoder
from mooer_jax.nn.compute import Compute

from .engine import leaf_shapes, map_in, map_out, read_out, under
from .errors import Problems
from .readers import Source
from .rules import Rule, Table
from .torch_out import write_torch
from .transforms import DEPTHWISE, TRANSPOSE

CMVN_FILE = "am.mvn"
PREFIXES = ("", "encoder.", "encoder.model.")
_LAYER = (
  ("norm{x:1|2}.weight", "norm{x}/scale"),
  ("norm{x:1|2}.bias", "norm{x}/bias"),
  ("self_attn.linear_q_k_v.weight", "attention/qkv/kernel"),
  ("self_attn.linear_q_k_v.bias", "attention/qkv/bias"),
  ("self_attn.linear_out.weight", "attention/out/kernel"),
  ("self_attn.linear_out.bias", "attention/out/bias"),
  ("self_attn.fsmn_block.weight", "attention/fsmn/kernel"),
  ("feed_forward.w_1.weight", "feed_forward/up/kernel"),
  ("feed_forward.w_1.bias", "feed_forward/up/bias"),
  ("feed_forward.w_2.weight", "feed_forward/down/kernel"),
  ("feed_forward.w_2.bias", "feed_forward/down/bias"),
)


def table(prefix: str = "") -> Table:
  """The rules for names that begin with a prefix, such as `encoder.`."""
  rules = []
  for layer, ours in (("encoders0.0", "first_layer"), ("encoders.{n}", "layers_{n}")):
    for theirs, path in _LAYER:
      transform = TRANSPOSE if path.endswith("kernel") else None
      transform = DEPTHWISE if "fsmn" in path else transform
      rules.append(_rule(f"{prefix}{layer}.{theirs}", f"encoders/sanm/{ours}/{path}", transform))
  for theirs, path in (("weight", "scale"), ("bias", "bias")):
    rules.append(_rule(f"{prefix}after_norm.{theirs}", f"encoders/sanm/after_norm/{path}", None))
  return Table(rules)


def _rule(torch, jax, transform):
  return Rule(torch, jax) if transform is None else Rule(torch, jax, transform)


def shapes(config: SANMConfig) -> dict[str, tuple[int, ...]]:
  """encoders/sanm/… -> shape."""
  module = SANMEncoder(config, Compute(scan=True))
  inputs = jnp.zeros((1, 8, config.input_width)), jnp.ones((1, 8), bool)
  return under("encoders/sanm", leaf_shapes(module, *inputs))


def find_prefix(source: Source) -> str | None:
  """What stands before the encoder's names: nothing in MooER's file, `encoder.` in FunASR's."""
  for prefix in PREFIXES:
    if any(name.startswith(f"{prefix}encoders0.0.") for name in source.tensors):
      return prefix
  return None


@dataclasses.dataclass(frozen=True)
class Encoder:
  """An encoder file that was opened; no tensor is read."""

  config: SANMConfig
  frontend: FrontendConfig
  leaves: dict[str, Lazy]
  prefix: str
  ignored: tuple[str, ...]


def open_encoder(
  source: Source, cmvn: Path, problems: Problems, *, heads: int = SANMConfig.heads
) -> Encoder | None:
  """Maps a SAN-M encoder and its CMVN; whatever else stands in the file is ignored, by name.

  Args:
    source: the file.
    cmvn: path of its am.mvn.
    problems: gets what does not fit.
    heads: of the attention; the tensors do not tell.

  Returns:
    Encoder, or None if there is none in the file.
  """
  prefix = find_prefix(source)
  if prefix is None:
    problems.add(f"{source.path}: no SAN-M encoder (encoders0.0.…) in it")
    return None
  config = sanm_config(source, prefix, problems, heads=heads)
  if config is None:
    return None
  rules = table(prefix)
  names = [name for name in source.tensors if rules.to_jax(name) is not None]
  mapped = map_in(source, rules, shapes(config), problems, names=names)
  chosen = set(names)
  return Encoder(
    config=config,
    frontend=frontend_config(config.input_width, problems),
    leaves={**mapped.leaves, **cmvn_leaves(cmvn, config.input_width, problems)},
    prefix=prefix,
    ignored=(*(name for name in source.tensors if name not in chosen), *source.ignored),
  )


def sanm_config(
  source: Source, prefix: str, problems: Problems, *, heads: int = SANMConfig.heads
) -> SANMConfig | None:
  """Reads the sizes off the tensors; their number of heads leaves no trace and must be known.

  Returns None, with the reason in `problems`, if a tensor that is needed for it is missing.
  """
  tensors = source.tensors
  needed = {
    "qkv": (f"{prefix}encoders0.0.self_attn.linear_q_k_v.weight", 2),
    "up": (f"{prefix}encoders0.0.feed_forward.w_1.weight", 2),
    "fsmn": (f"{prefix}encoders0.0.self_attn.fsmn_block.weight", 3),
  }
  for name, ndim in needed.values():
    if name not in tensors:
      problems.add(f"{source.path}: {name} is missing: no SAN-M encoder")
      return None
    if len(tensors[name].shape) != ndim:
      problems.add(f"{name} has shape {list(tensors[name].shape)}; {ndim} axes are needed")
      return None
  wide, input_width = tensors[needed["qkv"][0]].shape
  start = f"{prefix}encoders."
  numbers = {name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)}
  try:
    return SANMConfig(
      input_width=input_width,
      width=wide // 3,
      layers=1 + 1 + max((int(n) for n in numbers if n.isdigit()), default=-1),
      heads=heads,
      mlp_width=tensors[needed["up"][0]].shape[0],
      memory_kernel=tensors[needed["fsmn"][0]].shape[2],
    )
  except ValueError as error:
    problems.add(str(error))
    return None


def frontend_config(input_width: int, problems: Problems) -> FrontendConfig:
  """The features that an encoder of such an input takes: 7 frames of as many bins as it has."""
  window = FrontendConfig.lfr_window
  if input_width % window:
    problems.add(f"the encoder's input is {input_width} wide, which is not {window} frames")
    return FrontendConfig()
  return FrontendConfig(fbank=FbankConfig(bins=input_width // window))


def cmvn_leaves(path: Path, width: int, problems: Problems) -> dict[str, Lazy]:
  """frontend/sanm/… of an am.mvn."""
  try:
    shift_F, scale_F = read_mvn(path, width=width)
  except (ValueError, FileNotFoundError) as error:
    problems.add(str(error))
    return {}
  return {
    "frontend/sanm/shift": _given(shift_F),
    "frontend/sanm/scale": _given(scale_F),
  }


def _given(array: np.ndarray) -> Lazy:
  return Lazy(array.shape, array.dtype, lambda: array)


def paths(about: Checkpoint) -> list[str]:
  """The encoder's leaves of a checkpoint."""
  return [path for path in tree.flatten(about.params) if path.startswith("encoders/sanm/")]


def export(about: Checkpoint, file: Path, *, prefix: str = "") -> None:
  """Writes the encoder as a state dict, and am.mvn beside it.

  Raises:
    ConversionError: if the checkpoint has no SAN-M encoder.
  """
  problems = Problems()
  if not paths(about):
    problems.add("no SAN-M encoder in it")
  tensors = map_out(about, table(prefix), paths(about), problems)
  problems.check(str(about.folder))
  write_torch(file, tensors, read_out(about, tensors))
  cmvn = read_leaves(about, ["frontend/sanm/shift", "frontend/sanm/scale"])
  write_mvn(file.with_name(CMVN_FILE), *cmvn.values())


def check_funasr(conf: Mapping[str, Any], problems: Problems) -> int:
  """Reads the number of heads off a FunASR config.yaml, and refuses what we compute otherwise."""
  encoder = conf.get("encoder_conf") or {}
  if conf.get("encoder") not in ("SANMEncoder", None):
    problems.add(f"encoder={conf['encoder']!r}: only SANMEncoder can be converted")
  wanted = {
    "input_layer": "pe",
    "normalize_before": True,
    "sanm_shfit": 0,
    "selfattention_layer_type": "sanm",
    "pos_enc_class": "SinusoidalPositionEncoder",
  }
  _only(encoder, wanted, "encoder_conf", problems)
  frontend = conf.get("frontend_conf") or {}
  default = FrontendConfig()
  wanted = {
    "fs": default.fbank.sample_rate_hz,
    "window": default.fbank.window,
    "frame_length": 25,
    "frame_shift": 10,
    "lfr_m": default.lfr_window,
    "lfr_n": default.lfr_stride,
  }
  _only(frontend, wanted, "frontend_conf", problems)
  return encoder.get("attention_heads", SANMConfig.heads)


def _only(conf: Mapping, wanted: Mapping, name: str, problems: Problems) -> None:
  """Adds every value that is there and is another than the one that we compute with."""
  for key, value in wanted.items():
    if conf.get(key, value) != value:
      problems.add(f"{name}.{key}={conf[key]!r}: only {value!r} can be expressed")
