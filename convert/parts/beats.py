"""BEATs: the published files `{"cfg": {...}, "model": {...}}`, in and out."""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, LazyArray, read_leaves
from mooer_jax.encoders.beats import BEATsConfig, BEATsEncoder
from mooer_jax.nn.compute import ExecutionConfig

from ..core.engine import leaf_shapes, map_in, map_out, read_out, under
from ..core.errors import Problems
from ..core.folders import encoder_of, style_of
from ..core.kind import Kind, Opened, Part
from ..core.options import Options
from ..core.rules import CONVOLUTION, TRANSPOSE, Rule, Table, Transform
from ..core.writers import state_dict
from ..readers import ReadError, Source, open_source
from ..readers.torch_file import TorchFile
from ..verify.reference import beats as reference

FILE = "beats.pt"
# Of the features in training; BEATs divides by two standard deviations.
MEAN, DEVIATION = 15.41663, 6.55582

BIAS_TABLE = "encoder.layers.{n}.self_attn.relative_attention_bias.weight"
_HEAD = r"predictor\.(weight|bias)"

_LINEAR = (("weight", "kernel", TRANSPOSE), ("bias", "bias", None))
_NORM = (("weight", "scale", None), ("bias", "bias", None))
_LAYER = "encoder.layers.{n}"
# cfg's name of each size, ours, and the original's default.
_SIZES = (
  ("input_patch_size", "patch", None),
  ("embed_dim", "patch_width", 512),
  ("encoder_layers", "layers", 12),
  ("encoder_embed_dim", "hidden_size", 768),
  ("encoder_ffn_embed_dim", "intermediate_size", 3072),
  ("encoder_attention_heads", "heads", 12),
  ("conv_pos", "conv_pos", 128),
  ("conv_pos_groups", "conv_pos_groups", 16),
  ("num_buckets", "buckets", 320),
  ("max_distance", "max_distance", 1280),
)
# The only supported value, and the original's default.
_ONLY: tuple[tuple[str, Any, Any], ...] = (
  ("conv_bias", False, False),
  ("activation_fn", "gelu", "gelu"),
  ("layer_norm_first", False, False),
  ("deep_norm", True, False),
  ("relative_position_embedding", True, False),
  ("gru_rel_pos", True, False),
)
# Of training, or of the head of a fine-tuned file.
_SKIPPED = (
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


def _patch_out(kernel_PO: np.ndarray) -> np.ndarray:
  side = round(len(kernel_PO) ** 0.5)
  return kernel_PO.T.reshape(-1, 1, side, side)


# nn.Conv2d over one channel, its kernel as wide as its stride, is a linear layer on each patch.
PATCH = Transform(lambda weight_O1PP: weight_O1PP.reshape(len(weight_O1PP), -1).T, _patch_out)
# Vectors with further axes of length one.
_LAST = Transform(lambda x: x.reshape(-1), lambda x: x[None, None])
_HEADS = Transform(lambda x: x.reshape(-1), lambda x: x[None, :, None, None])


def _rules():
  rules = [
    ("patch_embedding.weight", "patch/kernel", PATCH),
    ("encoder.pos_conv.0.weight_v", "position/kernel", CONVOLUTION),
    ("encoder.pos_conv.0.weight_g", "position/scale", _LAST),
    ("encoder.pos_conv.0.bias", "position/bias", None),
    (BIAS_TABLE.format(n=0), "relative_bias/embedding", None),
    (f"{_LAYER}.self_attn.grep_a", "layers_{n}/attention/gate/scale", _HEADS),
  ]
  for theirs, path, parts in (
    ("layer_norm", "patch_norm", _NORM),
    ("post_extract_proj", "patch_out", _LINEAR),
    ("encoder.layer_norm", "input_norm", _NORM),
    (f"{_LAYER}.self_attn.{{x:q|k|v|out}}_proj", "layers_{n}/attention/{x}", _LINEAR),
    (f"{_LAYER}.self_attn.grep_linear", "layers_{n}/attention/gate/linear", _LINEAR),
    (f"{_LAYER}.self_attn_layer_norm", "layers_{n}/attention_norm", _NORM),
    (f"{_LAYER}.fc1", "layers_{n}/up", _LINEAR),
    (f"{_LAYER}.fc2", "layers_{n}/down", _LINEAR),
    (f"{_LAYER}.final_layer_norm", "layers_{n}/mlp_norm", _NORM),
  ):
    rules += [(f"{theirs}.{a}", f"{path}/{b}", transform) for a, b, transform in parts]
  return [
    Rule(name, f"encoders/beats/{path}", *([] if transform is None else [transform]))
    for name, path, transform in rules
  ]


TABLE = Table(_rules())


def read_cfg(path: Path) -> dict[str, Any]:
  """Reads the sizes and options beside the weights.

  Raises:
    ReadError: if there is no dict `cfg` of plain values.
  """
  if path.is_dir():
    raise ReadError(f"{path} is a folder; give the .pt file of BEATs itself")
  content = TorchFile(path).content()
  cfg = content.get("cfg") if isinstance(content, dict) else None
  if not isinstance(cfg, dict):
    raise ReadError(f"{path}: no dict 'cfg' beside 'model': not a published BEATs file")
  for key, value in cfg.items():
    if not isinstance(key, str) or not isinstance(value, bool | int | float | str | None):
      raise ReadError(f"{path}: cfg[{key!r}] is of type {type(value).__name__}, not a plain value")
  return dict(cfg)


def beats_config(cfg: Mapping[str, Any], problems: Problems) -> BEATsConfig | None:
  """Reads the sizes; None, with reasons in `problems`, for unknown keys and unsupported values."""
  before = len(problems.found)
  known = {*(n for n, *_ in _SIZES), *(n for n, *_ in _ONLY), *_SKIPPED}
  for key in cfg:
    if key not in known:
      problems.add(
        f"unknown cfg key {key!r} (= {cfg[key]!r}); known are {', '.join(sorted(known))}"
      )
  for key, wanted, default in _ONLY:
    value = cfg.get(key, default)
    if value != wanted:
      absent = "" if key in cfg else " (not in the file, the original's default)"
      problems.add(f"cfg {key}={value!r}{absent}: only {wanted!r} can be expressed")
  sizes = {}
  for key, name, default in _SIZES:
    value = cfg.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
      problems.add(f"cfg {key}={value!r}: must be an integer")
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
  """Returns the cfg of an encoder; `given` is the imported cfg.

  Raises:
    ConversionError: if the cfg describes another encoder.
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


def shapes(config: BEATsConfig) -> dict[str, tuple[int, ...]]:
  """encoders/beats/… -> shape."""
  module = BEATsEncoder(config, ExecutionConfig(scan=True))
  frames = config.patch
  inputs = jnp.zeros((1, frames, config.input_width)), jnp.ones((1, frames), bool)
  return under("encoders/beats", leaf_shapes(module, *inputs))


def open_beats(path: Path, problems: Problems) -> Part | None:
  """Maps a BEATs file. The head of a fine-tuned file is listed as ignored.

  Returns:
    The encoder; None, with reasons in `problems`, if its cfg cannot be expressed.

  Raises:
    ReadError: if the file is damaged, or has no cfg and model.
  """
  cfg = read_cfg(path)
  config = beats_config(cfg, problems)
  source = open_source(path, part="model")
  if config is None:
    return None
  copies = tied_copies(source, config, problems)
  mapped = map_in(
    source, TABLE, shapes(config), problems=problems, ignored=(_HEAD, *map(re.escape, copies))
  )
  return Part(
    config=config,
    leaves={**mapped.leaves, **cmvn_leaves(config.input_width)},
    style={"beats": {"cfg": cfg}},
    frontend=config.frontend(),
    ignored=(*mapped.ignored, *(name for name in source.ignored if name != "cfg")),
    notes=source.notes,
  )


def tied_copies(source: Source, config: BEATsConfig, problems: Problems) -> list[str]:
  """Names of the copies of layer 0's bias table, which all layers share.

  A copy that differs is a problem.
  """
  first = BIAS_TABLE.format(n=0)
  copies = [BIAS_TABLE.format(n=n) for n in range(1, config.layers)]
  copies = [name for name in copies if name in source.tensors]
  if first not in source.tensors or not copies:
    return copies
  table = source.read(first)
  for name in copies:
    copy = source.read(name)
    if copy.dtype != table.dtype or copy.shape != table.shape or copy.tobytes() != table.tobytes():
      problems.add(f"{name} differs from {first}: all layers must share one bias table")
  return copies


def cmvn_leaves(width: int) -> dict[str, LazyArray]:
  """frontend/beats/{shift,scale}, float32 [width], for (x - mean) / (2 deviations)."""
  values = {"shift": -MEAN, "scale": 1 / (2 * DEVIATION)}
  return {
    f"frontend/beats/{name}": LazyArray(
      (width,), np.dtype(np.float32), functools.partial(np.full, width, value, np.float32)
    )
    for name, value in values.items()
  }


def export(about: Checkpoint, file: Path) -> None:
  """Writes `{"cfg", "model"}`, with copies of the bias table, as the original loads it.

  cfg is the imported one, but `finetuned_model` is False: the head is not kept.

  Raises:
    ConversionError: if the checkpoint has no BEATs, or its features are scaled differently.
  """
  config, _ = encoder_of(about, BEATsConfig.kind)
  problems = Problems()
  paths = [path for path in tree.flatten(about.params) if path.startswith("encoders/beats/")]
  tensors = map_out(about, TABLE, paths)
  for path, leaf in cmvn_leaves(config.input_width).items():
    if path in tree.flatten(about.params):
      found = read_leaves(about, [path])[path]
      if not np.allclose(np.asarray(found, np.float32), leaf.read(), rtol=1e-6):
        problems.add(f"{path} differs from the original's constant, which its file cannot express")
  problems.check(str(about.folder))
  model = state_dict(tensors, read_out(about, tensors))
  for n in range(1, config.layers):
    model[BIAS_TABLE.format(n=n)] = model[BIAS_TABLE.format(n=0)]
  torch.save({"cfg": cfg_of(config, style_of(about, "beats").get("cfg")), "model": model}, file)


def _open(src: Path, options: Options, problems: Problems) -> Opened | None:
  part = open_beats(src, problems)
  return None if part is None else part.alone()


def _recognises(path: Path, names: Collection[str]) -> str | None:
  patched = any(name.startswith("patch_embedding.") and TABLE.to_jax(name) for name in names)
  return "beats" if patched else None


KIND = Kind(
  name="beats",
  open=_open,
  export=lambda about, folder, shard_bytes: export(about, folder / FILE),
  recognises=_recognises,
  parts=("encoders/beats/",),
  reference=reference.run,
)
