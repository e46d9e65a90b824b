"""Training checkpoints of MooER's own program: DeepSpeed folders, import only.

They have the trained parts (adapter, LoRA, perhaps encoder or LLM) under the names of the complete
model. The frozen parts, the tokenizer and the prompts come from the checkpoint of a release.
"""

from collections.abc import Collection
from pathlib import Path

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, describe, find
from mooer_jax.config import SpeechLLMConfig, from_json, to_json
from mooer_jax.encoders.sanm import SANMConfig

from ..core.engine import map_in
from ..core.errors import ConversionError, Problems
from ..core.folders import copier, encoder_of, style_of
from ..core.kind import Kind, Opened
from ..core.options import Options
from ..core.rules import Table
from ..core.shapes import connector_shapes
from ..parts import language_model, lora
from ..readers import Source, open_source
from . import mooer

LLM = "llm."
WRAPPED = LLM + language_model.WRAPPED
# MooER's PeftConfig, which the folder does not have.
USUAL = {"peft_type": "LORA", "r": 64, "lora_alpha": 16, "lora_dropout": 0.05}
BUFFERS = (r"llm\.(base_model\.model\.)?model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
LLM_TABLE = language_model.wrapped_table(LLM)


def open_training(folder: Path, options: Options, problems: Problems) -> Opened:
  """Opens a training checkpoint, as a fine-tune of --base-checkpoint.

  Args:
    folder: DeepSpeed's folder (`latest`, `global_step*/`), or a file of its merged weights.
    options: base_checkpoint, which has the frozen parts; lora_config (default: USUAL); task of
      the training (default: that of the base).
  """
  if options.base_checkpoint is None:
    raise ValueError(
      "deepspeed needs the imported release that training started from: --base-checkpoint CKPT"
    )
  task = None if options.task is None else mooer.known_task(options.task, mooer.TASK_PROMPTS)
  about = describe(find(options.base_checkpoint))
  where = f"--base-checkpoint {about.folder}"
  if missing := [part for part in ("encoders", "connector", "decoder") if part not in about.config]:
    raise ConversionError(f"{where} has no {missing[0]}; give an imported release")
  config = from_json(about.config)
  encoder, _ = encoder_of(about, SANMConfig.kind)
  source = open_source(folder)
  below = {path: tuple(leaf.shape) for path, leaf in tree.flatten(about.params).items()}
  expected: dict[str, tuple[int, ...]] = {}
  table = Table((*mooer.ADAPTER.rules, *LLM_TABLE.rules))
  notes = list(source.notes)
  if any(name.startswith("encoder_projector.") for name in source.tensors):
    connector = problems.attempt(mooer.connector_config, source, encoder.hidden_size)
    if connector is not None:
      config = config.replace(connector=connector)
      width = config.decoder.hidden_size
      expected |= connector_shapes(connector, encoder.hidden_size, width)
  added = None
  if any(".lora_" in name for name in source.tensors):
    found = problems.attempt(
      lora.from_training,
      source,
      options.lora_config,
      usual=USUAL,
      origin="MooER's usual training",
      prefix=LLM,
    )
    if found is not None:
      added, note = found
      notes.append(note)
      _check_base(about, config, added, problems=problems)
      config = config.replace(decoder=added.added_to(config.decoder))
      expected |= lora.shapes(config.decoder)
      table = Table((*table.rules, *added.table.rules))
  elif options.lora_config is not None:
    problems.add("--lora-config: there is no LoRA in the folder")
  problems.check(str(folder))
  _check_merged(source, about, added, problems=problems)
  # Any part of encoder and LLM may have been trained; the base has the others.
  for name in source.tensors:
    mapped = table.to_jax(name)
    if mapped and mapped[0].startswith(("encoders/", "decoder/")) and mapped[0] in below:
      expected.setdefault(mapped[0], below[mapped[0]])
  mapped_in = map_in(source, table, expected, problems=problems, ignored=_ignored(source, config))
  if not mapped_in.leaves:
    problems.add("it has no tensor of a speech LLM")
  frozen = {_part(path) for path in below if path not in mapped_in.leaves}
  notes.append(f"from {about.folder}: {', '.join(sorted(frozen or {'only the tokenizer'}))}")
  style = dict(style_of(about, "mooer"))
  tuned = [path for path in mapped_in.leaves if path.startswith("encoders/")]
  style["tuned_encoder"] = sorted({*style.get("tuned_encoder", ()), *tuned})
  if task is not None:
    style["task"] = task
    config = config.replace(prompts=((task, mooer.TASK_PROMPTS[task]),))
  given = options.lora_config
  return Opened(
    config=to_json(config),
    leaves=mapped_in.leaves,
    style={"mooer": style},
    tokenizer=copier(sorted(about.tokenizer.iterdir())),
    kept={} if given is None else {"lora": (lora.config_file(given),)},
    generation=about.generation,
    base=about.folder,
    ignored=(*mapped_in.ignored, *source.ignored),
    notes=tuple(notes),
  )


def _check_base(
  about: Checkpoint, config: SpeechLLMConfig, added: lora.Lora, *, problems: Problems
) -> None:
  """The LoRA replaces that of the base, and was trained on a plain LLM."""
  if style_of(about, "mooer").get("lora_merged"):
    problems.add(
      f"--base-checkpoint {about.folder}: a LoRA was merged into its LLM, and this one was trained"
      " on an LLM without; import the base without --merge-lora"
    )
  ours = lora.shapes(added.added_to(config.decoder))
  if left := [path for path in lora.paths(about) if path not in ours]:
    problems.add(
      f"--base-checkpoint {about.folder} has a LoRA on {left[0]} ({len(left)} such leaves), where"
      " the training folder has none; import the base with --no-lora"
    )


def _check_merged(
  source: Source, about: Checkpoint, added: lora.Lora | None, *, problems: Problems
) -> None:
  """The LoRA of the base must not be added to an LLM that was trained after merging it."""
  plain = [
    name
    for name in source.tensors
    if name.startswith(LLM) and LLM_TABLE.to_jax(name) and not name.startswith(WRAPPED)
  ]
  if plain and added is None and lora.paths(about):
    problems.add(
      f"{plain[0]}: the LLM itself was trained, without LoRA, but --base-checkpoint {about.folder}"
      " has one; import the base with --merge-lora (if training began with lora_dir) or --no-lora"
    )


def _ignored(source: Source, config: SpeechLLMConfig) -> list[str]:
  """Buffers, and a tied head that equals the embedding."""
  ignored = list(BUFFERS)
  for prefix in (LLM, WRAPPED):
    pair = prefix + language_model.EMBEDDING, prefix + language_model.HEAD
    held = config.decoder.tie_word_embeddings and all(name in source.tensors for name in pair)
    if held and source.equal(*pair):
      ignored.append(pair[1].replace(".", r"\."))
  return ignored


def _part(path: str) -> str:
  if path.endswith(("/lora_a", "/lora_b")):
    return "LoRA"
  top = path.split("/", 1)[0]
  return {"encoders": "encoder", "frontend": "CMVN", "connector": "adapter", "decoder": "LLM"}[top]


def _recognises(path: Path, names: Collection[str]) -> str | None:
  if mooer.KIND.files(path):
    return None
  parts = ("llm.", "encoder_projector.") if path.is_dir() else ("llm.",)
  return "deepspeed" if any(name.startswith(parts) for name in names) else None


KIND = Kind(
  name="deepspeed",
  open=open_training,
  recognises=_recognises,
  options=("base_checkpoint", "lora_config", "task"),
)
