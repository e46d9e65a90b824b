"""LoRA folders of the package peft: opened, and merged into the weights they were trained on.

The way back is in peft.py.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, Lazy
from mooer_jax.config import build
from mooer_jax.decoders.llm import LORA_TARGETS, LLMConfig

from ..core.engine import Mapped, map_in
from ..core.errors import ConversionError, Problems
from ..core.rules import TRANSPOSE, Rule, Table
from ..readers import Source, open_source, read_object
from . import language_model

CONFIG_FILE = "adapter_config.json"
# Options of peft that do not change what is computed from the weights.
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
# Initialisations after which the base weights are the ones that were published.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Lora:
  """A LoRA folder that was opened; no tensor is read.

  Attributes:
    rank, alpha, dropout: of training.
    rslora: whether the scale is alpha / sqrt(rank) rather than alpha / rank.
    targets: the adapted projections of a layer, in the order of LORA_TARGETS.
    source: the tensors.
    adapter: the word between `lora_A` and `weight` in their names, or "".
    prefix: comes before peft's own names, such as "llm." where the LLM is part of a model.
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
    """The model with this LoRA. Our scale is lora_alpha / lora_rank, so alpha carries rslora."""
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
    """Content of config.json for a LoRA without a model."""
    config = self.added_to(LLMConfig())
    return {name: getattr(config, f"lora_{name}") for name in _FIELDS}

  @property
  def style(self) -> dict[str, Any]:
    [file] = {tensor.file.name for tensor in self.source.tensors.values()}
    return {"adapter": self.adapter, "file": file}


def table(adapter: str = "", prefix: str = "") -> Table:
  """The rules for names with (`default`) or without the adapter's name in them."""
  infix = f".{adapter}" if adapter else ""
  rules = []
  for block, ours, words in (
    ("self_attn", "attention", "q|k|v|o"),
    ("mlp", "mlp", "gate|up|down"),
  ):
    for letter in "AB":
      rules.append(
        Rule(
          f"{prefix}base_model.model.model.layers.{{n}}.{block}.{{x:{words}}}_proj.lora_{letter}{infix}"
          ".weight",
          f"decoder/layers_{{n}}/{ours}/{{x}}/lora_{letter.lower()}",
          TRANSPOSE,
        )
      )
  return Table(rules)


def from_json(section: Mapping[str, Any]) -> LLMConfig:
  """Inverse of `Lora.to_json`; sizes other than those of the LoRA are defaults."""
  return build(LLMConfig, {f"lora_{name}": section[name] for name in _FIELDS}, "lora")


def open_folder(folder: Path, problems: Problems) -> Lora | None:
  """Opens a folder of peft's `save_pretrained`.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors or .bin.
    problems: receives, by name, every option that cannot be expressed.

  Returns:
    The LoRA; None if its options were not understood.
  """
  if not (folder / CONFIG_FILE).is_file():
    problems.add(f"{folder}: no {CONFIG_FILE}; give the folder that peft's save_pretrained wrote")
    return None
  options = read_options(folder / CONFIG_FILE, problems)
  return None if options is None else from_source(open_source(folder), options, problems)


def config_file(path: Path) -> Path:
  """The adapter_config.json that --lora-config names, itself or by its folder."""
  return path / CONFIG_FILE if path.is_dir() else path


def read_options(file: Path, problems: Problems) -> dict[str, Any] | None:
  """Reads an adapter_config.json; None, with the reasons, if it cannot be expressed."""
  options = read_object(file)
  before = len(problems.found)
  _refuse(options, problems)
  rank, alpha = options.get("r"), options.get("lora_alpha")
  numbers = type(rank) is int and rank > 0 and isinstance(alpha, int | float)
  if not numbers:
    problems.add(f"r={rank!r}, lora_alpha={alpha!r}: a positive whole number and a number needed")
  return None if len(problems.found) > before else options


def from_source(
  source: Source, options: Mapping[str, Any], problems: Problems, *, prefix: str = ""
) -> Lora | None:
  """Finds the LoRA in a set of tensors.

  Args:
    source: the tensors; others may be among them.
    options: content of an adapter_config.json that `read_options` took.
    problems: receives the reason if there is not exactly one adapter.
    prefix: comes before peft's own names.
  """
  adapters = {
    name.split(".lora_A.")[1].removesuffix("weight").strip(".")
    for name in source.tensors
    if ".lora_A." in name
  }
  if len(adapters) != 1:
    names = ", ".join(sorted(adapters))
    problems.add(f"{source.path}: {len(adapters)} adapters in one file ({names}); must be one")
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


def shapes(config: LLMConfig) -> dict[str, tuple[int, int]]:
  """decoder/… -> shape of the LoRA leaves of a model."""
  c = config
  heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
  sizes = {
    "q": (c.hidden_size, heads),
    "k": (c.hidden_size, kv),
    "v": (c.hidden_size, kv),
    "o": (heads, c.hidden_size),
    "gate": (c.hidden_size, c.intermediate_size),
    "up": (c.hidden_size, c.intermediate_size),
    "down": (c.intermediate_size, c.hidden_size),
  }
  found = {}
  for n in range(c.layers):
    for name in c.lora_targets if c.lora_rank else ():
      block = "attention" if name in "qkvo" else "mlp"
      at = f"decoder/layers_{n}/{block}/{name}"
      found[f"{at}/lora_a"] = (sizes[name][0], c.lora_rank)
      found[f"{at}/lora_b"] = (c.lora_rank, sizes[name][1])
  return found


def map_lora(lora: Lora, config: LLMConfig, problems: Problems) -> Mapped:
  """The leaves of a LoRA for the model that it is added to (`Lora.added_to`)."""
  return map_in(lora.source, lora.table, shapes(config), problems)


def shapes_alone(lora: Lora) -> dict[str, tuple[int, ...]]:
  """decoder/… -> shape as the files have it, for a LoRA without a model to compare with."""
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


def merge(
  leaves: Mapping[str, Lazy], lora_leaves: Mapping[str, Lazy], scale: float
) -> dict[str, Lazy]:
  """Adds scale * A B to the kernels, in float32, and rounds once to the kernel's dtype.

  A leaf raises ConversionError when it is read, if a value is then too large for its dtype.
  """
  merged = dict(leaves)
  for path, a in lora_leaves.items():
    if not path.endswith("/lora_a"):
      continue
    at = path.removesuffix("/lora_a")
    kernel, b = leaves[f"{at}/kernel"], lora_leaves[f"{at}/lora_b"]
    read = functools.partial(_merged, f"{at}/kernel", kernel, a, b, scale)
    merged[f"{at}/kernel"] = Lazy(kernel.shape, kernel.dtype, read)
  return merged


def _merged(path: str, kernel: Lazy, a: Lazy, b: Lazy, scale: float) -> np.ndarray:
  with np.errstate(over="ignore", invalid="ignore"):  # told below, by name
    delta = a.read().astype(np.float32) @ b.read().astype(np.float32)
    delta *= np.float32(scale)
    delta += kernel.read().astype(np.float32)
    found = delta.astype(kernel.dtype)
  if bad := found.size - int(np.count_nonzero(np.isfinite(found))):
    name, _ = language_model.TABLE.to_torch(path) or (path, None)
    raise ConversionError(
      f"{name}: with its LoRA added, {bad} of {found.size} values are too large for"
      f" {kernel.dtype.name}; keep the LoRA apart (without --merge-lora)"
    )
  return found


def paths(about: Checkpoint) -> list[str]:
  """The LoRA leaves of a checkpoint."""
  return [p for p in tree.flatten(about.params) if p.endswith(("/lora_a", "/lora_b"))]
