"""LoRA folders of the package peft: opened, and merged into the base weights. peft.py exports."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, LazyArray
from mooer_jax.decoders.llm import LORA_TARGETS, LLMConfig

from ..core.errors import ConversionError, Problems
from ..core.rules import TRANSPOSE, Rule, Table
from ..readers import Source, open_source, read_object
from . import language_model

CONFIG_FILE = "adapter_config.json"
LEAVES = ("/lora_a", "/lora_b")
# Options of peft that do not change what the weights compute.
_HARMLESS = (
  "auto_mapping", "base_model_name_or_path", "inference_mode", "layers_pattern", "lora_alpha",
  "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
  "revision", "runtime_config", "target_modules", "exclude_modules", "task_type", "use_rslora",
  "ensure_weight_tying",
)  # fmt: skip
# Checked by name.
_CHECKED = ("bias", "init_lora_weights")
# Initialisations that do not change the base weights.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Lora:
  """An opened LoRA; no tensor is read.

  Attributes:
    fields: of LLMConfig: lora_rank, lora_alpha, lora_dropout and lora_targets.
    source: the tensors.
    adapter: the word between `lora_A` and `weight` in their names, or "".
    prefix: precedes peft's names, such as "llm." where the LLM is part of a model.
  """

  fields: dict[str, Any]
  source: Source
  adapter: str
  prefix: str = ""

  @property
  def rank(self) -> int:
    return self.fields["lora_rank"]

  @property
  def scale(self) -> float:
    return self.fields["lora_alpha"] / self.rank

  def added_to(self, config: LLMConfig) -> LLMConfig:
    return dataclasses.replace(config, **self.fields)

  @functools.cached_property
  def table(self) -> Table:
    return table(self.adapter, self.prefix)

  @property
  def style(self) -> dict[str, Any]:
    [file] = {tensor.file.name for tensor in self.source.tensors.values()}
    return {"adapter": self.adapter, "file": file}


def llm_fields(options: Mapping[str, Any]) -> dict[str, Any]:
  """Returns rank, alpha and dropout of an adapter_config.json as fields of LLMConfig.

  Our scale is alpha / rank. With use_rslora, peft's is alpha / sqrt(rank).
  """
  root = math.sqrt(options["r"]) if options.get("use_rslora") else 1.0
  return {
    "lora_rank": options["r"],
    "lora_alpha": options["lora_alpha"] * root,
    "lora_dropout": float(options.get("lora_dropout") or 0.0),
  }


def table(adapter: str = "", prefix: str = "") -> Table:
  """Rules for names with the adapter's name in them (usually `default`) or without."""
  infix = f".{adapter}" if adapter else ""
  layer = f"{prefix}{language_model.WRAPPED}model.layers.{{n}}"
  blocks = (("self_attn", "attention", "q|k|v|o"), ("mlp", "mlp", "gate|up|down"))
  return Table([
    Rule(
      f"{layer}.{block}.{{x:{words}}}_proj.lora_{letter}{infix}.weight",
      f"decoder/layers_{{n}}/{ours}/{{x}}/lora_{letter.lower()}",
      TRANSPOSE,
    )
    for block, ours, words in blocks
    for letter in "AB"
  ])  # fmt: skip


def open_folder(folder: Path) -> Lora:
  """Opens a folder of peft's `save_pretrained`. Raises ConversionError if that is impossible."""
  if not (folder / CONFIG_FILE).is_file():
    raise ConversionError(
      f"{folder}: no {CONFIG_FILE}; give the folder that peft's save_pretrained wrote"
    )
  options = read_options(folder / CONFIG_FILE)
  return from_source(open_source(folder), options)


def config_file(path: Path) -> Path:
  """Returns the adapter_config.json that --lora-config names, directly or by its folder."""
  return path / CONFIG_FILE if path.is_dir() else path


def read_options(file: Path) -> dict[str, Any]:
  """Reads an adapter_config.json. Raises ConversionError with all that cannot be expressed."""
  options, problems = read_object(file), Problems()
  if options.get("peft_type") != "LORA":
    problems.add(f"peft_type={options.get('peft_type')!r}: only LORA can be converted")
  if options.get("bias", "none") != "none":
    problems.add(f"bias={options['bias']!r}: trained biases cannot be expressed")
  init = options.get("init_lora_weights", True)
  if init not in _PLAIN_INITS:
    problems.add(
      f"init_lora_weights={init!r} changes the base weights; save it as a plain LoRA with peft"
      " (path_initial_model_for_weight_conversion) first"
    )
  for name in sorted(options.keys() - {*_HARMLESS, *_CHECKED}):
    if options[name]:
      problems.add(f"{name}={options[name]!r} cannot be expressed")
  rank, alpha = options.get("r"), options.get("lora_alpha")
  if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
    problems.add(f"r={rank!r}, lora_alpha={alpha!r}: must be a positive integer and a number")
  problems.check(str(file))
  return options


def from_source(source: Source, options: Mapping[str, Any], *, prefix: str = "") -> Lora:
  """Finds the LoRA among tensors. Raises ConversionError unless there is exactly one adapter."""
  adapters = {
    name.split(".lora_A.")[1].removesuffix("weight").strip(".")
    for name in source.tensors
    if ".lora_A." in name
  }
  if len(adapters) != 1:
    names = ", ".join(sorted(adapters))
    raise ConversionError(
      f"{source.path}: must hold exactly one adapter, has {len(adapters)} ({names})"
    )
  [adapter] = adapters
  rules = table(adapter, prefix)
  found = {mapped[0].split("/")[-2] for name in source.tensors if (mapped := rules.to_jax(name))}
  targets = tuple(name for name in LORA_TARGETS if name in found)
  return Lora({**llm_fields(options), "lora_targets": targets}, source, adapter, prefix)


def from_training(
  source: Source,
  lora_config: Path | None,
  *,
  usual: Mapping[str, Any],
  origin: str,
  prefix: str,
) -> tuple[Lora, str]:
  """Finds the LoRA in a training checkpoint, whose tensors show its rank, but not its alpha.

  Returns the LoRA, and a sentence about it for the user. Without lora_config, the options are
  `usual`, from `origin`. Raises ConversionError if they cannot be expressed, or the ranks differ.
  """
  options = usual if lora_config is None else read_options(config_file(lora_config))
  found = from_source(source, options, prefix=prefix)
  ranks = {t.shape[:1] for name, t in source.tensors.items() if ".lora_A." in name}
  if ranks != {(found.rank,)}:
    has = ", ".join(str(*rank) for rank in sorted(ranks))
    raise ConversionError(
      f"the LoRA has rank {has}, but r is {found.rank} in {lora_config or origin}, so its alpha is"
      " unknown; pass the adapter_config.json of training with --lora-config"
    )
  targets = ", ".join(found.fields["lora_targets"])
  where = lora_config or f"{origin} (--lora-config changes it)"
  alpha = options["lora_alpha"]
  return found, f"LoRA: rank {found.rank}, alpha {alpha:g}, on {targets}; alpha of {where}"


def shapes(config: LLMConfig) -> dict[str, tuple[int, ...]]:
  """decoder/… -> shape of the LoRA leaves of a model."""
  leaves = language_model.shapes(config)
  return {path: leaves[path] for path in leaves if path.endswith(LEAVES)}


def shapes_alone(lora: Lora) -> dict[str, tuple[int, ...]]:
  """decoder/… -> shape as in the files, for a LoRA without a model to compare with."""
  layers = set()
  sizes: dict[str, tuple[int, ...]] = {}
  for name, tensor in lora.source.tensors.items():
    if (mapped := lora.table.to_jax(name)) and len(tensor.shape) == 2:
      top, layer, rest = mapped[0].split("/", 2)
      layers.add(layer)
      rows, columns = mapped[1].shape(tensor.shape)
      shape = (rows, lora.rank) if rest.endswith("a") else (lora.rank, columns)
      sizes.setdefault(f"{top}/{{layer}}/{rest}", shape)
  return {rest.format(layer=layer): shape for layer in layers for rest, shape in sizes.items()}


def merge(leaves: Mapping[str, LazyArray], scale: float) -> dict[str, LazyArray]:
  """Adds scale * A B to the kernels in float32, and rounds once to the kernel's dtype.

  Reading a merged leaf raises ConversionError if a value is too large for its dtype.
  """
  merged = {path: leaf for path, leaf in leaves.items() if not path.endswith(LEAVES)}
  for at in [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]:
    kernel, a, b = (leaves[f"{at}/{name}"] for name in ("kernel", "lora_a", "lora_b"))
    read = functools.partial(_merged, f"{at}/kernel", kernel, a=a, b=b, scale=scale)
    merged[f"{at}/kernel"] = LazyArray(kernel.shape, kernel.dtype, read)
  return merged


def _merged(
  path: str, kernel: LazyArray, *, a: LazyArray, b: LazyArray, scale: float
) -> np.ndarray:
  with np.errstate(over="ignore", invalid="ignore"):  # counted below
    delta = a.read().astype(np.float32) @ b.read().astype(np.float32)
    delta *= np.float32(scale)
    delta += kernel.read().astype(np.float32)
    found = delta.astype(kernel.dtype)
  if bad := int(np.count_nonzero(~np.isfinite(found))):
    name, _ = language_model.TABLE.to_torch(path) or (path, None)
    raise ConversionError(
      f"{name}: with its LoRA added, {bad} of {found.size} values are too large for"
      f" {kernel.dtype.name}; keep the LoRA apart (without --merge-lora)"
    )
  return found


def paths(about: Checkpoint) -> list[str]:
  """Returns the paths of the LoRA leaves of a checkpoint."""
  return [path for path in tree.flatten(about.params) if path.endswith(LEAVES)]
