"""Paraformer's SAN-M encoder and its CMVN: FunASR's model folders, and MooER's encoder file."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mooer_jax import tree
from mooer_jax.audio.cmvn import read_mvn, write_mvn
from mooer_jax.checkpoint import Checkpoint, LazyArray, read_leaves
from mooer_jax.config import SpeechLLMConfig, build
from mooer_jax.encoders.sanm import SANMConfig, SANMEncoder
from mooer_jax.nn.compute import ExecutionConfig

from ..core.engine import leaf_shapes, map_in, map_out, read_out, under
from ..core.errors import Problems
from ..core.folders import check_roundtrip, copier, encoder_of, kept_files, style_of
from ..core.kind import Kind, Opened, Part
from ..core.options import Options
from ..core.rules import DEPTHWISE, IDENTITY, TRANSPOSE, Rule, Table
from ..core.writers import write_torch
from ..readers import Source, check_file, open_source
from ..verify.reference import paraformer as reference
from . import funasr_config

CMVN_FILE = "am.mvn"
FUNASR_FILE = "model.pt"
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
  """Rules for names with a prefix, such as `encoder.`."""
  rules = []
  for layer, ours in (("encoders0.0", "first_layer"), ("encoders.{n}", "layers_{n}")):
    for theirs, path in _LAYER:
      transform = TRANSPOSE if path.endswith("kernel") else IDENTITY
      transform = DEPTHWISE if "fsmn" in path else transform
      rules.append(Rule(f"{prefix}{layer}.{theirs}", f"encoders/sanm/{ours}/{path}", transform))
  for theirs, path in (("weight", "scale"), ("bias", "bias")):
    rules.append(Rule(f"{prefix}after_norm.{theirs}", f"encoders/sanm/after_norm/{path}"))
  return Table(rules)


def shapes(config: SANMConfig) -> dict[str, tuple[int, ...]]:
  """encoders/sanm/… -> shape."""
  module = SANMEncoder(config, ExecutionConfig(scan=True))
  inputs = jnp.zeros((1, 8, config.input_width)), jnp.ones((1, 8), bool)
  return under("encoders/sanm", leaf_shapes(module, *inputs))


def find_prefix(names: Collection[str]) -> str | None:
  """Returns the prefix of the encoder's names: "" in MooER's file, `encoder.` in FunASR's."""
  starts = {prefix: f"{prefix}encoders0.0." for prefix in PREFIXES}
  return next((p for p, start in starts.items() if any(n.startswith(start) for n in names)), None)


def open_encoder(
  source: Source, cmvn: Path, problems: Problems, *, conf: Mapping[str, Any] | None = None
) -> Part | None:
  """Maps a SAN-M encoder and its CMVN; other tensors of the file are listed as ignored.

  Args:
    source: the file.
    cmvn: path of its am.mvn.
    problems: receives everything that does not fit.
    conf: content of FunASR's config.yaml; default: Paraformer's values.

  Returns:
    The encoder; None if there is none, or its sizes or features cannot be expressed.
  """
  prefix = find_prefix(source.tensors)
  if prefix is None:
    problems.add(f"{source.path}: no SAN-M encoder (encoders0.0.…) in it")
    return None
  conf = conf or {}
  config = sanm_config(source, prefix, problems, heads=funasr_config.heads(conf))
  if config is None:
    return None
  rules = table(prefix)
  names = [name for name in source.tensors if rules.to_jax(name) is not None]
  mapped = map_in(source, rules, shapes(config), problems=problems, names=names)
  leaves = {**mapped.leaves, **_cmvn_leaves(cmvn, config.input_width, problems)}
  chosen = set(names)
  frontend = funasr_config.frontend(conf, config.input_width, problems)
  if frontend is None:
    return None
  funasr_config.check(conf, config, frontend, problems)
  return Part(
    config=config,
    leaves=leaves,
    style={"paraformer": {"prefix": prefix}},
    frontend=frontend,
    ignored=(*(name for name in source.tensors if name not in chosen), *source.ignored),
    notes=source.notes,
  )


def sanm_config(
  source: Source, prefix: str, problems: Problems, *, heads: int = SANMConfig.heads
) -> SANMConfig | None:
  """Derives the sizes from the shapes of the tensors; None, with the reason, if that fails."""
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
      problems.add(f"{name} has shape {list(tensors[name].shape)}; it must have {ndim} axes")
      return None
  wide, input_width = tensors[needed["qkv"][0]].shape
  start = f"{prefix}encoders."
  numbers = {name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)}
  try:
    sizes = {
      "input_width": input_width,
      "hidden_size": wide // 3,
      "layers": 1 + 1 + max((int(n) for n in numbers if n.isdigit()), default=-1),
      "heads": heads,
      "intermediate_size": tensors[needed["up"][0]].shape[0],
      "memory_kernel": tensors[needed["fsmn"][0]].shape[2],
    }
    return build(SANMConfig, sizes, "sanm")
  except ValueError as error:
    problems.add(str(error))
    return None


def _cmvn_leaves(path: Path, width: int, problems: Problems) -> dict[str, LazyArray]:
  """Reads frontend/sanm/… from an am.mvn."""
  try:
    check_file(path)
    shift_F, scale_F = read_mvn(path, width=width)
  except (ValueError, FileNotFoundError) as error:
    problems.add(str(error))
    return {}
  return {
    "frontend/sanm/shift": LazyArray(shift_F.shape, shift_F.dtype, lambda: shift_F),
    "frontend/sanm/scale": LazyArray(scale_F.shape, scale_F.dtype, lambda: scale_F),
  }


def export(about: Checkpoint, file: Path, *, prefix: str = "") -> None:
  """Writes a state dict, and am.mvn beside it. Raises ConversionError without SAN-M encoder."""
  encoder_of(about, SANMConfig.kind)
  paths = [path for path in tree.flatten(about.params) if path.startswith("encoders/sanm/")]
  tensors = map_out(about, table(prefix), paths)
  write_torch(file, tensors, read_out(about, tensors))
  cmvn = read_leaves(about, ["frontend/sanm/shift", "frontend/sanm/scale"])
  write_mvn(file.with_name(CMVN_FILE), *cmvn.values())


def _open(src: Path, options: Options, problems: Problems) -> Opened | None:
  if not (src / FUNASR_FILE).is_file():
    hint = ""
    if (src / "paraformer-encoder.pth").is_file():
      hint = "; this is the encoder of a MooER release: import that with the kind mooer"
    raise FileNotFoundError(
      f"{src / FUNASR_FILE}: not found; SRC is FunASR's folder with {FUNASR_FILE} and"
      f" {CMVN_FILE}{hint}"
    )
  described = src / funasr_config.FILE
  kept = (described,) if described.is_file() else ()
  conf = funasr_config.read_yaml(described) if kept else {}
  part = open_encoder(open_source(src / FUNASR_FILE), src / CMVN_FILE, problems, conf=conf)
  if part is None:
    return None
  notes = (*part.notes, *funasr_config.notes(conf))
  return dataclasses.replace(part, kept={"encoder": kept}, notes=notes).alone()


def _export(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  """Writes FunASR's files; the imported config.yaml if it still describes this encoder.

  Raises:
    ConversionError: if there is no SAN-M encoder, or the files cannot express it.
  """
  config, features = encoder_of(about, SANMConfig.kind)
  prefix = style_of(about, "paraformer").get("prefix", "encoder.")
  export(about, folder / FUNASR_FILE, prefix=prefix)
  described = folder / funasr_config.FILE
  copier(kept_files(about, "encoder"))(folder)
  if not (
    described.is_file() and funasr_config.same(funasr_config.read_yaml(described), config, features)
  ):
    funasr_config.write_yaml(described, funasr_config.describe(config, features))
  problems = Problems()
  source, conf = open_source(folder / FUNASR_FILE), funasr_config.read_yaml(described)
  read = open_encoder(source, folder / CMVN_FILE, problems, conf=conf)
  if read is not None:
    meant = SpeechLLMConfig(encoders=(config,), frontends=(features,))
    again = SpeechLLMConfig(encoders=(read.config,), frontends=(read.frontend,))
    check_roundtrip(meant, again, problems)
  problems.check(str(about.folder))


KIND = Kind(
  name="paraformer",
  open=_open,
  export=_export,
  recognises=lambda path, names: None if find_prefix(names) is None else "paraformer",
  parts=("encoders/sanm/",),
  reference=reference.run,
)
