"""The LoRA of a checkpoint as peft's folder."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooer_jax.checkpoint import Checkpoint
from mooer_jax.decoders.llm import LLMConfig

from ..core.engine import map_out, read_out
from ..core.errors import Problems
from ..core.folders import write_json
from ..core.writers import write_shards, write_torch
from .lora import CONFIG_FILE, paths, table


def export(
  about: Checkpoint,
  config: LLMConfig,
  folder: Path,
  *,
  style: Mapping[str, Any],
  original: Mapping[str, Any] | None = None,
) -> None:
  """Writes the LoRA of a checkpoint as peft does.

  Args:
    about: the checkpoint.
    config: rank, alpha, dropout and targets.
    folder: to write into; it exists.
    style: as in `Lora.style`.
    original: adapter_config.json that it was imported from; kept if it describes this LoRA.

  Raises:
    ConversionError: if the checkpoint has no LoRA.
  """
  problems = Problems()
  if not paths(about):
    problems.add("no LoRA in it (lora_rank is 0)")
  tensors = map_out(about, table(style.get("adapter", "")), paths(about), problems)
  problems.check(str(about.folder))
  write_json(folder / CONFIG_FILE, _options(config, original))
  file = style.get("file", "adapter_model.safetensors")
  if file.endswith(".safetensors"):
    stem = file.removesuffix(".safetensors")
    total = sum(tensor.nbytes for tensor in tensors)
    write_shards(folder, tensors, read_out(about, tensors), shard_bytes=total, stem=stem)
  else:
    write_torch(folder / file, tensors, read_out(about, tensors))


def _options(config: LLMConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
  described = {
    "r": config.lora_rank,
    "lora_alpha": config.lora_alpha,
    "lora_dropout": config.lora_dropout,
    "use_rslora": False,
  }
  if original is not None:
    root = math.sqrt(config.lora_rank) if original.get("use_rslora") else 1.0
    same = original.get("r") == config.lora_rank and math.isclose(
      original.get("lora_alpha", 0) * root, config.lora_alpha
    )
    same = same and float(original.get("lora_dropout") or 0.0) == config.lora_dropout
    named = original.get("target_modules")
    if isinstance(named, list):  # else a pattern
      ends = {name.rsplit(".", 1)[-1].removesuffix("_proj") for name in named}
      same = same and ends >= set(config.lora_targets)
    if same:
      return dict(original)
  alpha = config.lora_alpha
  return {
    **(original or {}),
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "inference_mode": True,
    "target_modules": [f"{name}_proj" for name in config.lora_targets],
    **described,
    "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
  }
