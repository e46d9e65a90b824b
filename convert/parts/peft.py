"""LoRA folders of the package peft, in and out: with their base model, or alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooer_jax.checkpoint import Checkpoint, describe, find
from mooer_jax.config import build, part_to_json
from mooer_jax.decoders.llm import LLMConfig

from ..core.engine import map_in, map_out, read_out
from ..core.errors import ConversionError, Problems
from ..core.folders import copier, kept_json, style_of, write_json
from ..core.kind import Kind, Opened
from ..core.options import Options
from ..core.writers import write_shards, write_torch
from ..verify.reference import language_model as reference
from . import lora
from .language_model import decoder_of


def open_peft(src: Path, options: Options, problems: Problems) -> Opened:
  """Opens a folder of `save_pretrained`, with --base-checkpoint as a fine-tune of that."""
  opened = lora.open_folder(src)
  shared: dict[str, Any] = dict(
    style={"peft": opened.style},
    kept={"lora": (src / lora.CONFIG_FILE,)},
    ignored=opened.source.ignored,
    notes=opened.source.notes,
  )
  if options.base_checkpoint is None:
    expected = lora.shapes_alone(opened)
    leaves = map_in(opened.source, opened.table, expected, problems=problems).leaves
    section = {name.removeprefix("lora_"): value for name, value in opened.fields.items()}
    return Opened(config={"lora": section}, leaves=leaves, **shared)
  about = describe(find(options.base_checkpoint))
  decoder = opened.added_to(decoder_of(about))
  if own := lora.paths(about):
    problems.add(
      f"{about.folder} has a LoRA of its own (on {own[0]} and {len(own) - 1} more): import that"
      " model with --no-lora, or with --merge-lora if this one was trained on the merged weights"
    )
  return Opened(
    config={**about.config, "decoder": part_to_json(decoder)},
    leaves=map_in(opened.source, opened.table, lora.shapes(decoder), problems=problems).leaves,
    tokenizer=copier(sorted(about.tokenizer.iterdir())),
    generation=about.generation,
    base=about.folder,
    **shared,
  )


def export(about: Checkpoint, folder: Path) -> None:
  """Writes the LoRA of a checkpoint as peft does. Raises ConversionError if it has none."""
  if "lora" in about.config:
    section = {f"lora_{name}": value for name, value in about.config["lora"].items()}
    config = build(LLMConfig, section, "lora")
  else:
    config = decoder_of(about)
  style = style_of(about, "peft")
  if not lora.paths(about):
    raise ConversionError(f"{about.folder}: no LoRA in it (lora_rank is 0)")
  tensors = map_out(about, lora.table(style.get("adapter", "")), lora.paths(about))
  original = kept_json(about, "lora", lora.CONFIG_FILE)
  write_json(folder / lora.CONFIG_FILE, _options(config, original))
  file = style.get("file", "adapter_model.safetensors")
  if file.endswith(".safetensors"):
    stem = file.removesuffix(".safetensors")
    total = sum(tensor.nbytes for tensor in tensors)
    write_shards(folder, tensors, read_out(about, tensors), shard_bytes=total, stem=stem)
  else:
    write_torch(folder / file, tensors, read_out(about, tensors))


def _options(config: LLMConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
  """Returns an adapter_config.json: the imported one, if it still describes the LoRA."""
  if original is not None:
    fields = lora.llm_fields(original).items()
    same = all(math.isclose(value, getattr(config, name)) for name, value in fields)
    named = original.get("target_modules")
    named = named if isinstance(named, list) else config.lora_targets  # a pattern
    if same and {*config.lora_targets} <= {n.split(".")[-1].removesuffix("_proj") for n in named}:
      return dict(original)
  alpha = config.lora_alpha
  return {
    **(original or {}),
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "inference_mode": True,
    "target_modules": [f"{name}_proj" for name in config.lora_targets],
    "r": config.lora_rank,
    "lora_dropout": config.lora_dropout,
    "use_rslora": False,
    "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
  }


KIND = Kind(
  name="peft",
  open=open_peft,
  export=lambda about, folder, shard_bytes: export(about, folder),
  recognises=lambda path, names: "peft" if any(".lora_A." in name for name in names) else None,
  options=("base_checkpoint",),
  parts=("decoder/",),
  reference=reference.run,
  needs=("llm",),
)
