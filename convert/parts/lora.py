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
from mooer_jax.config import build
from mooer_jax.decoders.llm import LORA_TARGETS, LLMConfig

from ..core.engine import Mapped, map_in
from ..core.errors import ConversionError, Problems
from ..core.rules import TRANSPOSE, Rule, Table
from ..readers import Source, open_source, read_object
from . import language_model

CONFIG_FILE = "adapter_config.json"
LEAVES = ("/lora_a", "/lora_b")
# Options of peft that do not change what the weights compute.
_HARMLESS = {
  "auto_mapping",
  "base_model_name_or_path",
  "inference_mode",
  "layers_pattern",
  "lora_alpha",
  "lora_dropout",
  "megatron_core",
  "peft_type",
  "peft_version",
  "qalora_group_size",
  "r",
  "revision",
  "runtime_config",
  "target_modules",
  "exclude_modules",
  "task_type",
  "use_rslora",
  "ensure_weight_tying",
}
_FIELDS = ("rank", "alpha", "dropout", "targets")
# Initialisations that do not change the base weights.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Lora:
  """An opened LoRA; no tensor is read.

  Attributes:
    rank, alpha, dropout: of training.
    rslora: whether the scale is alpha / sqrt(rank) rather than alpha / rank.
    targets: adapted projections of a layer, in the order of LORA_TARGETS.
    source: the tensors.
    adapter: the word between `lora_A` and `weight` in their names, or "".
    prefix: precedes peft's names, such as "llm." where the LLM is part of a model.
  """

  rank: int
  alpha: float
  dropout: float
  rslora: bool
  targets: tuple[str, ...]
  source: Source
  adapter: str
  prefix: str = ""

  @property
  def scale(self) -> float:
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

  def added_to(self, config: LLMConfig) -> LLMConfig:
    """Adds the LoRA to a config. Our scale is lora_alpha / lora_rank, so alpha includes rslora."""
    return dataclasses.replace(
      config,
      lora_rank=self.rank,
      lora_alpha=self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha,
      lora_dropout=self.dropout,
      lora_targets=self.targets,
    )

  @property
  def table(self) -> Table:
    return table(self.adapter, self.prefix)

  def to_json(self) -> dict[str, Any]:
    """Returns the content of config.json for a LoRA without a model."""
    config = self.added_to(LLMConfig())
    return {name: getattr(config, f"lora_{name}") for name in _FIELDS}

  @property
  def style(self) -> dict[str, Any]:
    [file] = {tensor.file.name for tensor in self.source.tensors.values()}
    return {"adapter": self.adapter, "file": file}


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


def from_json(section: Mapping[str, Any]) -> LLMConfig:
  """Inverse of `Lora.to_json`; sizes other than those of the LoRA are defaults."""
  return build(LLMConfig, {f"lora_{name}": section[name] for name in _FIELDS}, "lora")


def open_folder(folder: Path, problems: Problems) -> Lora | None:
  """Opens a folder of peft's `save_pretrained`.

  Returns:
    The LoRA; None, with reasons in `problems`, if its options cannot be expressed.
  """
  if not (folder / CONFIG_FILE).is_file():
    problems.add(f"{folder}: no {CONFIG_FILE}; give the folder that peft's save_pretrained wrote")
    return None
  options = read_options(folder / CONFIG_FILE, problems)
  return None if options is None else from_source(open_source(folder), options, problems)


def config_file(path: Path) -> Path:
  """Returns the adapter_config.json that --lora-config names, directly or by its folder."""
  return path / CONFIG_FILE if path.is_dir() else path


def read_options(file: Path, problems: Problems) -> dict[str, Any] | None:
  """Reads an adapter_config.json; None, with the reasons, if it cannot be expressed."""
  options = read_object(file)
  before = len(problems.found)
  _refuse(options, problems)
  rank, alpha = options.get("r"), options.get("lora_alpha")
  if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
    problems.add(f"r={rank!r}, lora_alpha={alpha!r}: must be a positive integer and a number")
  return None if len(problems.found) > before else options


def from_source(
  source: Source, options: Mapping[str, Any], problems: Problems, *, prefix: str = ""
) -> Lora | None:
  """Finds the LoRA among the tensors of a source; None unless there is exactly one adapter.

  Args:
    source: the tensors.
    options: content of an adapter_config.json, as `read_options` returns it.
    problems: receives the reason for None.
    prefix: precedes peft's names.
  """
  adapters = {
    name.split(".lora_A.")[1].removesuffix("weight").strip(".")
    for name in source.tensors
    if ".lora_A." in name
  }
  if len(adapters) != 1:
    names = ", ".join(sorted(adapters))
    problems.add(f"{source.path}: must hold exactly one adapter, has {len(adapters)} ({names})")
    return None
  [adapter] = adapters
  rules = table(adapter, prefix)
  found = {mapped[0].split("/")[-2] for name in source.tensors if (mapped := rules.to_jax(name))}
  return Lora(
    rank=options["r"],
    alpha=float(options["lora_alpha"]),
    dropout=float(options.get("lora_dropout") or 0.0),
    rslora=bool(options.get("use_rslora")),
    targets=tuple(name for name in LORA_TARGETS if name in found),
    source=source,
    adapter=adapter,
    prefix=prefix,
  )


def from_training(
  source: Source,
  lora_config: Path | None,
  problems: Problems,
  notes: list[str],
  *,
  usual: Mapping[str, Any],
  origin: str,
  prefix: str,
) -> Lora | None:
  """Finds the LoRA in a training checkpoint, whose tensors show its rank, but not its alpha.

  Args:
    source: the tensors.
    lora_config: adapter_config.json of training, or its folder.
    problems: receives the reasons for None.
    notes: receives a sentence about the LoRA.
    usual: options without lora_config.
    origin: where they come from.
    prefix: precedes peft's names.
  """
  options: Mapping[str, Any] | None = usual
  if lora_config is not None:
    options = read_options(config_file(lora_config), problems)
  found = None if options is None else from_source(source, options, problems, prefix=prefix)
  if found is None:
    return None
  ranks = {t.shape[:1] for name, t in source.tensors.items() if ".lora_A." in name}
  if ranks != {(found.rank,)}:
    has = ", ".join(str(*rank) for rank in sorted(ranks))
    problems.add(
      f"the LoRA has rank {has}, but r is {found.rank} in {lora_config or origin}, so its alpha is"
      " unknown; pass the adapter_config.json of training with --lora-config"
    )
    return None
  notes.append(
    f"LoRA: rank {found.rank}, alpha {found.alpha:g}, on {', '.join(found.targets)}; alpha of"
    f" {lora_config or f'{origin} (--lora-config changes it)'}"
  )
  return found


def _refuse(options: Mapping[str, Any], problems: Problems) -> None:
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
  for name in sorted(options.keys() - _HARMLESS - {"bias", "init_lora_weights"}):
    if options[name]:
      problems.add(f"{name}={options[name]!r} cannot be expressed")


def shapes(config: LLMConfig) -> dict[str, tuple[int, ...]]:
  """decoder/… -> shape of the LoRA leaves of a model."""
  leaves = language_model.shapes(config)
  return {path: leaves[path] for path in leaves if path.endswith(LEAVES)}


def map_lora(lora: Lora, config: LLMConfig, problems: Problems) -> Mapped:
  """Maps the leaves of a LoRA of the model that `Lora.added_to` returns."""
  return map_in(lora.source, lora.table, shapes(config), problems=problems)


def shapes_alone(lora: Lora) -> dict[str, tuple[int, ...]]:
  """decoder/… -> shape as in the files, for a LoRA without a model to compare with."""
  rules = lora.table
  layers = set()
  sizes: dict[str, tuple[int, ...]] = {}
  for name, tensor in lora.source.tensors.items():
    if (mapped := rules.to_jax(name)) and len(tensor.shape) == 2:
      top, layer, rest = mapped[0].split("/", 2)
      layers.add(layer)
      sizes.setdefault(f"{top}/{{layer}}/{rest}", tuple(mapped[1].shape(tensor.shape)))
  for rest in list(sizes):  # the rank is known
    rows, columns = sizes[rest]
    sizes[rest] = (rows, lora.rank) if rest.endswith("a") else (lora.rank, columns)
  return {rest.format(layer=layer): shape for layer in layers for rest, shape in sizes.items()}


def merge(leaves: Mapping[str, LazyArray], scale: float) -> dict[str, LazyArray]:
  """Adds scale * A B to the kernels in float32, and rounds once to the kernel's dtype.

  Reading a leaf raises ConversionError if a value is too large for its dtype.

  Args:
    leaves: those of a model and its LoRA.
    scale: factor of the LoRA.

  Returns:
    The leaves of the model.
  """
  merged = {path: leaf for path, leaf in leaves.items() if not path.endswith(LEAVES)}
  for at in [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]:
    kernel, a, b = (leaves[f"{at}/{name}"] for name in ("kernel", "lora_a", "lora_b"))
    read = functools.partial(_merged, f"{at}/kernel", kernel, a, b, scale)
    merged[f"{at}/kernel"] = LazyArray(kernel.shape, kernel.dtype, read)
  return merged


def _merged(path: str, kernel: LazyArray, a: LazyArray, b: LazyArray, scale: float) -> np.ndarray:
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
