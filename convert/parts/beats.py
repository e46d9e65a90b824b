"""BEATs: the published files `{"cfg": {...}, "model": {...}}`, in and out."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mooer_jax.checkpoint import Checkpoint, LazyArray, as_lazy, read_leaves
from mooer_jax.encoders.beats import BEATsConfig

from ..core.engine import map_in, map_out, paths_of, read_out
from ..core.errors import ConversionError, Problems
from ..core.folders import encoder_of, style_of
from ..core.kind import Kind, Part
from ..core.rules import CONVOLUTION, Rule, Table, Transform, linear, norm
from ..core.shapes import encoder_shapes
from ..core.writers import state_dict
from ..readers import ReadError, Source, open_source
from ..readers.torch_file import read_dict
from ..verify.reference import beats as reference

FILE, ROOT = "beats.pt", "encoders/beats"
# Of the features in training; BEATs divides by two standard deviations.
MEAN, DEVIATION = 15.41663, 6.55582

BIAS_TABLE = "encoder.layers.{n}.self_attn.relative_attention_bias.weight"
_HEAD = r"predictor\.(weight|bias)"

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
_ONLY: tuple[tuple[str, bool | str, bool | str], ...] = (
  ("conv_bias", False, False),
  ("activation_fn", "gelu", "gelu"),
  ("layer_norm_first", False, False),
  ("deep_norm", True, False),
  ("relative_position_embedding", True, False),
  ("gru_rel_pos", True, False),
)
# Of training, or of the head of a fine-tuned file.
_SKIPPED = (
  "layer_wise_gradient_decay_ratio", "dropout", "attention_dropout", "activation_dropout",
  "encoder_layerdrop", "dropout_input", "finetuned_model", "predictor_dropout", "predictor_class",
)  # fmt: skip


def _patch_out(kernel_PO: np.ndarray) -> np.ndarray:
  side = round(len(kernel_PO) ** 0.5)
  return kernel_PO.T.reshape(-1, 1, side, side)


# nn.Conv2d over one channel, its kernel as wide as its stride, is a linear layer on each patch.
PATCH = Transform(lambda weight_O1PP: weight_O1PP.reshape(len(weight_O1PP), -1).T, _patch_out)
# Vectors with further axes of length one.
_LAST = Transform(lambda x: x.reshape(-1), lambda x: x[None, None])
_HEADS = Transform(lambda x: x.reshape(-1), lambda x: x[None, :, None, None])


_LAYER, _OURS = "encoder.layers.{n}", f"{ROOT}/layers_{{n}}"
TABLE = Table((
  Rule("patch_embedding.weight", f"{ROOT}/patch/kernel", PATCH),
  Rule("encoder.pos_conv.0.weight_v", f"{ROOT}/position/kernel", CONVOLUTION),
  Rule("encoder.pos_conv.0.weight_g", f"{ROOT}/position/scale", _LAST),
  Rule("encoder.pos_conv.0.bias", f"{ROOT}/position/bias"),
  Rule(BIAS_TABLE.format(n=0), f"{ROOT}/relative_bias/embedding"),
  Rule(f"{_LAYER}.self_attn.grep_a", f"{_OURS}/attention/gate/scale", _HEADS),
  *norm("layer_norm", f"{ROOT}/patch_norm"),
  *linear("post_extract_proj", f"{ROOT}/patch_out"),
  *norm("encoder.layer_norm", f"{ROOT}/input_norm"),
  *linear(f"{_LAYER}.self_attn.{{x:q|k|v|out}}_proj", f"{_OURS}/attention/{{x}}"),
  *linear(f"{_LAYER}.self_attn.grep_linear", f"{_OURS}/attention/gate/linear"),
  *norm(f"{_LAYER}.self_attn_layer_norm", f"{_OURS}/attention_norm"),
  *linear(f"{_LAYER}.fc1", f"{_OURS}/up"),
  *linear(f"{_LAYER}.fc2", f"{_OURS}/down"),
  *norm(f"{_LAYER}.final_layer_norm", f"{_OURS}/mlp_norm"),
))  # fmt: skip


def read_cfg(path: Path) -> dict[str, Any]:
  """Reads the sizes and options. Raises ReadError if there is no dict `cfg` of plain values."""
  if path.is_dir():
    raise ReadError(f"{path} is a folder; give the .pt file of BEATs itself")
  cfg = read_dict(path, "cfg")
  if cfg is None:
    raise ReadError(f"{path}: no dict 'cfg' beside 'model': not a published BEATs file")
  for key, value in cfg.items():
    if not isinstance(key, str) or not isinstance(value, bool | int | float | str | None):
      raise ReadError(f"{path}: cfg[{key!r}] is of type {type(value).__name__}, not a plain value")
  return dict(cfg)


def beats_config(cfg: Mapping[str, Any]) -> BEATsConfig:
  """Reads the sizes. Raises ValueError with all unknown keys and unsupported values."""
  problems = Problems()
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
  for key, name, usual in _SIZES:
    size = cfg.get(key, usual)
    if not isinstance(size, int) or isinstance(size, bool):
      problems.add(f"cfg {key}={size!r}: must be an integer")
    else:
      sizes[name] = size
  problems.check("cfg")
  return BEATsConfig(**sizes)


def cfg_of(config: BEATsConfig, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Returns the cfg of an encoder. Raises ValueError if `given`, the imported one, differs."""
  if given is None:
    sizes = {key: getattr(config, name) for key, name, _ in _SIZES}
    given = {**sizes, **{key: wanted for key, wanted, _ in _ONLY}}
  described = beats_config(given)
  if described != dataclasses.replace(config, dropout=0.0):
    raise ConversionError(f"cfg: it describes {described}, the encoder is {config}")
  return {**given, "finetuned_model": False} if given.get("finetuned_model") else dict(given)


def open_beats(path: Path, problems: Problems) -> Part:
  """Maps a BEATs file. The head of a fine-tuned file is listed as ignored."""
  cfg = read_cfg(path)
  source = open_source(path, part="model")
  config = beats_config(cfg)
  copies = tied_copies(source, config, problems)
  ignored = (_HEAD, *map(re.escape, copies))
  mapped = map_in(source, TABLE, encoder_shapes(config), problems=problems, ignored=ignored)
  return Part(
    config=config,
    leaves={**mapped.leaves, **cmvn_leaves(config.input_width)},
    style={"beats": {"cfg": cfg}},
    frontend=config.frontend(),
    ignored=(*mapped.ignored, *(name for name in source.ignored if name != "cfg")),
    notes=source.notes,
  )


def tied_copies(source: Source, config: BEATsConfig, problems: Problems) -> list[str]:
  """Lists the copies of layer 0's bias table, which all layers share.

  A table that differs from it is added to the problems.
  """
  first, *others = (BIAS_TABLE.format(n=n) for n in range(config.layers))
  copies = [name for name in others if name in source.tensors]
  for name in copies if first in source.tensors else ():
    if not source.equal(first, name):
      problems.add(f"{name} differs from {first}: all layers must share one bias table")
  return copies


def cmvn_leaves(width: int) -> dict[str, LazyArray]:
  """frontend/beats/{shift,scale}, float32 [width], for (x - mean) / (2 deviations)."""
  values = {"shift": -MEAN, "scale": 1 / (2 * DEVIATION)}
  return {
    f"frontend/beats/{name}": as_lazy(np.full(width, value, np.float32))
    for name, value in values.items()
  }


def export(about: Checkpoint, file: Path) -> None:
  """Writes `{"cfg", "model"}`, with copies of the bias table, as the original loads it.

  cfg is the imported one, but `finetuned_model` is False: the head is not kept. Raises
  ConversionError if the checkpoint has no BEATs, or its features are scaled differently.
  """
  config, _ = encoder_of(about, BEATsConfig.kind)
  problems = Problems()
  tensors = map_out(about, TABLE, paths_of(about, f"{ROOT}/"))
  for path, leaf in cmvn_leaves(config.input_width).items():
    for found in read_leaves(about, paths_of(about, path)).values():
      if not np.allclose(np.asarray(found, np.float32), leaf.read(), rtol=1e-6):
        problems.add(f"{path} differs from the original's constant, which its file cannot express")
  problems.check(str(about.folder))
  model = state_dict(tensors, read_out(about, tensors))
  for n in range(1, config.layers):
    model[BIAS_TABLE.format(n=n)] = model[BIAS_TABLE.format(n=0)]
  torch.save({"cfg": cfg_of(config, style_of(about, "beats").get("cfg")), "model": model}, file)


def _recognises(path: Path, names: Collection[str]) -> str | None:
  patched = any(name.startswith("patch_embedding.") and TABLE.to_jax(name) for name in names)
  return "beats" if patched else None


KIND = Kind(
  name="beats",
  open=lambda src, options, problems: open_beats(src, problems).alone(),
  export=lambda about, folder, shard_bytes: export(about, folder / FILE),
  recognises=_recognises,
  parts=(f"{ROOT}/",),
  reference=reference.run,
)
