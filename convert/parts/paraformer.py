"""Paraformer's SAN-M encoder and its CMVN: FunASR's model folders, and MooER's encoder file."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from mooer_jax.audio.cmvn import read_mvn, write_mvn
from mooer_jax.checkpoint import Checkpoint, LazyArray, as_lazy, read_leaves
from mooer_jax.config import SpeechLLMConfig, build
from mooer_jax.encoders.sanm import SANMConfig

from ..core.engine import map_in, map_out, paths_of, read_out
from ..core.errors import ConversionError, Problems
from ..core.folders import check_roundtrip, copier, encoder_of, kept_files, style_of
from ..core.kind import Kind, Part
from ..core.rules import DEPTHWISE, Rule, Table, linear, norm
from ..core.shapes import count_layers, encoder_shapes, shape_of
from ..core.writers import write_torch
from ..readers import Source, check_file, open_source
from ..verify.reference import paraformer as reference
from . import funasr_config

ROOT = "encoders/sanm"
CMVN_FILE = "am.mvn"
FUNASR_FILE = "model.pt"
PREFIXES = ("", "encoder.", "encoder.model.")
_LINEAR = (
  ("self_attn.linear_q_k_v", "attention/qkv"),
  ("self_attn.linear_out", "attention/out"),
  ("feed_forward.w_1", "feed_forward/up"),
  ("feed_forward.w_2", "feed_forward/down"),
)


def table(prefix: str = "") -> Table:
  """Rules for names with a prefix, such as `encoder.`."""
  rules = [*norm(f"{prefix}after_norm", f"{ROOT}/after_norm")]
  for layer, ours in (("encoders0.0", "first_layer"), ("encoders.{n}", "layers_{n}")):
    layer, ours = f"{prefix}{layer}", f"{ROOT}/{ours}"
    fsmn = f"{layer}.self_attn.fsmn_block.weight", f"{ours}/attention/fsmn/kernel"
    rules += [*norm(f"{layer}.norm{{x:1|2}}", f"{ours}/norm{{x}}"), Rule(*fsmn, DEPTHWISE)]
    for theirs, path in _LINEAR:
      rules += linear(f"{layer}.{theirs}", f"{ours}/{path}")
  return Table(rules)


def find_prefix(names: Collection[str]) -> str | None:
  """Returns the prefix of the encoder's names: "" in MooER's file, `encoder.` in FunASR's."""
  starts = {prefix: f"{prefix}encoders0.0." for prefix in PREFIXES}
  return next((p for p, start in starts.items() if any(n.startswith(start) for n in names)), None)


def open_encoder(
  source: Source, cmvn: Path, problems: Problems, *, conf: Mapping[str, Any] | None = None
) -> Part:
  """Maps a SAN-M encoder and its CMVN; other tensors of the file are listed as ignored.

  Without FunASR's config.yaml (`conf`), the options are Paraformer's.
  """
  prefix = find_prefix(source.tensors)
  if prefix is None:
    raise ConversionError(f"{source.path}: no SAN-M encoder (encoders0.0.…) in it")
  conf, rules = conf or {}, table(prefix)
  config = sanm_config(source, prefix, heads=funasr_config.heads(conf))
  names = [name for name in source.tensors if rules.to_jax(name) is not None]
  mapped = map_in(source, rules, encoder_shapes(config), problems=problems, names=names)
  cmvn_leaves = problems.attempt(_cmvn_leaves, cmvn, config.input_width) or {}
  frontend = funasr_config.frontend(conf, config.input_width)
  funasr_config.check(conf, config, frontend, problems=problems)
  return Part(
    config=config,
    leaves=mapped.leaves | cmvn_leaves,
    style={"paraformer": {"prefix": prefix}},
    frontend=frontend,
    ignored=(*(name for name in source.tensors if name not in names), *source.ignored),
    notes=source.notes,
  )


def sanm_config(source: Source, prefix: str, *, heads: int = SANMConfig.heads) -> SANMConfig:
  """Derives the sizes from the shapes of the tensors. Raises ValueError if that fails."""
  first = f"{prefix}encoders0.0."
  wide, input_width = shape_of(source, f"{first}self_attn.linear_q_k_v.weight", 2)
  sizes = {
    "input_width": input_width,
    "hidden_size": wide // 3,
    "layers": 1 + count_layers(source, table(prefix)),
    "heads": heads,
    "intermediate_size": shape_of(source, f"{first}feed_forward.w_1.weight", 2)[0],
    "memory_kernel": shape_of(source, f"{first}self_attn.fsmn_block.weight", 3)[2],
  }
  return build(SANMConfig, sizes, "sanm")


def _cmvn_leaves(path: Path, width: int) -> dict[str, LazyArray]:
  """Reads frontend/sanm/… from an am.mvn. Raises ConversionError if it is absent or damaged."""
  try:
    check_file(path)
    shift_F, scale_F = read_mvn(path, width=width)
  except (ValueError, FileNotFoundError) as error:
    raise ConversionError(str(error)) from error
  return {"frontend/sanm/shift": as_lazy(shift_F), "frontend/sanm/scale": as_lazy(scale_F)}


def export(about: Checkpoint, file: Path, *, prefix: str = "") -> None:
  """Writes a state dict, and am.mvn beside it. Raises ConversionError without SAN-M encoder."""
  encoder_of(about, SANMConfig.kind)
  tensors = map_out(about, table(prefix), paths_of(about, f"{ROOT}/"))
  write_torch(file, tensors, read_out(about, tensors))
  cmvn = read_leaves(about, ["frontend/sanm/shift", "frontend/sanm/scale"])
  write_mvn(file.with_name(CMVN_FILE), *cmvn.values())


def _open_part(src: Path, problems: Problems) -> Part:
  if not (src / FUNASR_FILE).is_file():
    hint = ""
    if (src / "paraformer-encoder.pth").is_file():
      hint = "; this is the encoder of a MooER release: import that with the kind mooer"
    raise FileNotFoundError(
      f"{src / FUNASR_FILE}: not found; SRC is FunASR's folder with that and {CMVN_FILE}{hint}"
    )
  described = src / funasr_config.FILE
  kept = (described,) if described.is_file() else ()
  conf = funasr_config.read_yaml(described) if kept else {}
  part = open_encoder(open_source(src / FUNASR_FILE), src / CMVN_FILE, problems, conf=conf)
  notes = (*part.notes, *funasr_config.notes(conf))
  return dataclasses.replace(part, kept={"encoder": kept}, notes=notes)


def _export(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  """Writes FunASR's files; the imported config.yaml if it still describes this encoder.

  Raises ConversionError if there is no SAN-M encoder, or the files cannot express it.
  """
  config, features = encoder_of(about, SANMConfig.kind)
  prefix = style_of(about, "paraformer").get("prefix", "encoder.")
  export(about, folder / FUNASR_FILE, prefix=prefix)
  described = folder / funasr_config.FILE
  copier(kept_files(about, "encoder"))(folder)
  if not (
    described.is_file() and funasr_config.same(funasr_config.read_yaml(described), config, features)
  ):
    conf = funasr_config.describe(config, features)
    described.write_text(yaml.safe_dump(conf, sort_keys=False), encoding="utf-8")

  def read(problems: Problems) -> SpeechLLMConfig:
    part = _open_part(folder, problems)
    return SpeechLLMConfig(encoders=(part.config,), frontends=(part.frontend,))

  check_roundtrip(about, SpeechLLMConfig(encoders=(config,), frontends=(features,)), read)


KIND = Kind(
  name="paraformer",
  open=lambda src, options, problems: _open_part(src, problems).alone(),
  export=_export,
  recognises=lambda path, names: None if find_prefix(names) is None else "paraformer",
  parts=(f"{ROOT}/",),
  reference=reference.run,
)
