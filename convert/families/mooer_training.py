"""Training checkpoints of MooER's own program: DeepSpeed folders, in only.

They hold what was trained (adapter, LoRA, perhaps encoder or LLM) under the names of the whole
model; what was frozen, the tokenizer and the prompts come from a checkpoint made of the release.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, Lazy
from mooer_jax.config import SpeechLLMConfig, from_json

from ..core.engine import map_in
from ..core.errors import ConversionError, Problems
from ..core.folders import style_of
from ..core.rules import Table
from ..parts import language_model, lora, paraformer
from ..readers import Source, open_source
from . import mooer

LLM = "llm."
WRAPPED = LLM + language_model.WRAPPED
# MooER's PeftConfig. The rank shows in the shapes; the file tells nothing of the others.
USUAL = {"peft_type": "LORA", "r": 64, "lora_alpha": 16, "lora_dropout": 0.05}
BUFFERS = (r"llm\.(base_model\.model\.)?model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
LLM_TABLE = language_model.wrapped_table(LLM)


@dataclasses.dataclass(frozen=True)
class Trained:
  """A training checkpoint that was opened; no tensor is read.

  Attributes:
    config: of the whole model.
    leaves: what the checkpoint has of its own.
    style: what an export as a release needs to know.
    ignored, notes: what a user should know.
  """

  config: SpeechLLMConfig
  leaves: dict[str, Lazy]
  style: dict[str, Any]
  ignored: tuple[str, ...]
  notes: tuple[str, ...]


def open_training(
  folder: Path,
  about: Checkpoint,
  problems: Problems,
  *,
  lora_config: Path | None = None,
  task: str | None = None,
) -> Trained | None:
  """Opens a training checkpoint.

  Args:
    folder: as DeepSpeed wrote it (`latest`, `global_step*/`), or a file of its merged weights.
    about: checkpoint of the speech LLM that supplies what was frozen.
    problems: gets everything that does not fit.
    lora_config: the adapter_config.json of training; None: MooER's usual values.
    task: what the model was trained for; None: what the base does.

  Returns:
    Trained, or None if there were problems.
  """
  if missing := [part for part in ("encoders", "connector", "decoder") if part not in about.config]:
    raise ConversionError(f"--base {about.folder} has no {missing[0]}; give an imported release")
  config = from_json(about.config)
  heard, _ = paraformer.sanm_of(about)
  source = open_source(folder)
  below = {path: tuple(leaf.shape) for path, leaf in tree.flatten(about.params).items()}
  expected: dict[str, tuple[int, ...]] = {}
  table = Table(
    (*mooer.ADAPTER.rules, *paraformer.table(mooer.TUNED_ENCODER).rules, *LLM_TABLE.rules)
  )
  notes = list(source.notes)
  if any(name.startswith("encoder_projector.") for name in source.tensors):
    connector = mooer.connector_config(source, heard.width, problems)
    if connector is not None:
      config = config.replace(connector=connector)
      expected |= mooer.connector_shapes(connector, heard, config.decoder.width)
  added = None
  if any(".lora_" in name for name in source.tensors):
    added = _open_lora(source, lora_config, problems, notes)
    if added is not None:
      _check_base(about, config, added, problems)
      config = config.replace(decoder=added.added_to(config.decoder))
      expected |= lora.shapes(config.decoder)
      table = Table((*table.rules, *added.table.rules))
  elif lora_config is not None:
    problems.add("--lora-config: there is no LoRA in the folder")
  if problems.found:
    return None
  _check_merged(source, about, added, problems)
  # Of encoder and LLM, any part may have been trained; the base has the others.
  for name in source.tensors:
    mapped = table.to_jax(name)
    if mapped and mapped[0].startswith(("encoders/", "decoder/")) and mapped[0] in below:
      expected.setdefault(mapped[0], below[mapped[0]])
  mapped_in = map_in(source, table, expected, problems, ignored=_ignored(source, config))
  if not mapped_in.leaves:
    problems.add("nothing of a speech LLM in it")
  if problems.found:
    return None
  notes.append(f"from {about.folder}: " + ", ".join(sorted(
    {_part(path) for path in below if path not in mapped_in.leaves} or {"nothing but the tokenizer"}
  )))  # fmt: skip
  style = dict(style_of(about, "mooer"))
  tuned = [path for path in mapped_in.leaves if path.startswith("encoders/")]
  style["tuned_encoder"] = sorted({*style.get("tuned_encoder", ()), *tuned})
  if task is not None:
    style["task"] = task
    config = config.replace(prompts=((task, mooer.TASK_PROMPTS[task]),))
  return Trained(
    config=config,
    leaves=mapped_in.leaves,
    style={"mooer": style},
    ignored=(*mapped_in.ignored, *source.ignored),
    notes=tuple(notes),
  )


def _open_lora(
  source: Source, lora_config: Path | None, problems: Problems, notes: list[str]
) -> lora.Lora | None:
  options: Mapping[str, Any] | None = USUAL
  if lora_config is not None:
    options = lora.read_options(lora.config_file(lora_config), problems)
  if options is None:
    return None
  found = lora.from_source(source, options, problems, prefix=LLM)
  if found is None:
    return None
  first = next(t for name, t in source.tensors.items() if ".lora_A." in name)
  rank = first.shape[0] if first.shape else 0
  if lora_config is None and rank != USUAL["r"]:
    problems.add(
      f"the LoRA has rank {rank}, MooER's has {USUAL['r']}, so its alpha is not known; pass the"
      " adapter_config.json of training with --lora-config"
    )
    return None
  origin = "of MooER's usual training (--lora-config tells another)"
  notes.append(
    f"LoRA: rank {found.rank}, alpha {found.alpha:g}, on {', '.join(found.targets)}; alpha "
    + (origin if lora_config is None else f"of {lora.config_file(lora_config)}")
  )
  return found


def _check_base(
  about: Checkpoint, config: SpeechLLMConfig, added: lora.Lora, problems: Problems
) -> None:
  """A LoRA was trained on a plain LLM; the base's own is replaced, so none of it may be left."""
  if style_of(about, "mooer").get("lora_merged"):
    problems.add(
      f"--base {about.folder}: a LoRA was merged into its LLM, and this one was trained on an LLM"
      " without; import the base without --merge-lora"
    )
  ours = lora.shapes(added.added_to(config.decoder))
  if left := [path for path in lora.paths(about) if path not in ours]:
    problems.add(
      f"--base {about.folder} has a LoRA on {left[0]} ({len(left)} such leaves), where the training"
      " folder has none; import the base with --no-lora"
    )


def _check_merged(
  source: Source, about: Checkpoint, added: lora.Lora | None, problems: Problems
) -> None:
  """An LLM that was trained itself had its LoRA merged before; the base's must not come on top."""
  plain = [
    name
    for name in source.tensors
    if name.startswith(LLM) and LLM_TABLE.to_jax(name) and not name.startswith(WRAPPED)
  ]
  if plain and added is None and lora.paths(about):
    problems.add(
      f"{plain[0]}: the LLM itself was trained, without LoRA, but --base {about.folder} has one;"
      " import the base with --merge-lora (if training began with lora_dir) or --no-lora"
    )


def _ignored(source: Source, config: SpeechLLMConfig) -> list[str]:
  """Buffers, and a tied head if it is the embedding again."""
  ignored = list(BUFFERS)
  for prefix in (LLM, WRAPPED):
    pair = prefix + language_model.EMBEDDING, prefix + language_model.HEAD
    if config.decoder.tied and all(name in source.tensors for name in pair):
      if language_model.equal(source, *pair):
        ignored.append(pair[1].replace(".", r"\."))
  return ignored


def _part(path: str) -> str:
  if path.endswith(("/lora_a", "/lora_b")):
    return "LoRA"
  top = path.split("/", 1)[0]
  return {"encoders": "encoder", "frontend": "CMVN", "connector": "adapter", "decoder": "LLM"}[top]
