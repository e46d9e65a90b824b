"""MooER's release folders, in the published layout: in and out."""

import dataclasses
from pathlib import Path
from typing import Any

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, Lazy
from mooer_jax.config import SpeechLLMConfig, from_json
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.prompts import task_prompt

from ..core.engine import Outgoing, map_in, map_out, read_out
from ..core.errors import Problems
from ..core.folders import Release, check_same, kept_json, style_of
from ..core.rules import TRANSPOSE, Rule, Table
from ..core.writers import write_torch
from ..parts import language_model, lora, paraformer, peft
from ..readers import Source, open_source

# Which prompt each of the released models is asked with; the multitask one answers it in two lines.
TASK_PROMPTS = {
  "asr": task_prompt("asr"),
  "ast": task_prompt("ast"),
  "asr_ast_mtl": task_prompt("ast"),
}
ENCODER_FOLDER, ENCODER_FILE = "paraformer_encoder", "paraformer-encoder.pth"
ADAPTER_FILE, LORA_FOLDER = "adapter_project.pt", "lora_weights"
SAVED_LORA_FOLDER = "new_llm"  # as the original's training program calls it
# An encoder that was trained along is saved with the adapter, under this name.
TUNED_ENCODER = "encoder.model."

ADAPTER = Table((
  Rule("encoder_projector.{x:linear1|linear2}.weight", "connector/{x}/kernel", TRANSPOSE),
  Rule("encoder_projector.{x:linear1|linear2}.bias", "connector/{x}/bias"),
))  # fmt: skip

# The original's decoding options; eos is biased, and alone ends an answer.
DECODING = {
  "num_beams": 4,
  "length_penalty": 0.8,
  "max_new_tokens": 200,
  "min_length": 1,
  "repetition_penalty": 1.0,
}
EOS_BIAS = -0.2


def decoding(eos_id: int) -> dict[str, Any]:
  """Content of generation.json."""
  return {**DECODING, "eos_token_id": [eos_id], "sequence_bias": [[eos_id, EOS_BIAS]]}


def open_release(
  folder: Path,
  problems: Problems,
  *,
  task: str,
  llm: Path | None = None,
  with_lora: bool = True,
  merge_lora: bool = False,
) -> Release | None:
  """Opens all parts of a release.

  Args:
    folder: with paraformer_encoder/, a folder per task, and the LLM's folder.
    problems: gets everything that does not fit.
    task: "asr", "ast" or "asr_ast_mtl".
    llm: folder of the LLM, if it is elsewhere.
    with_lora: False for a release without lora_weights/, whose LLM is taken as it is.
    merge_lora: add the LoRA to the LLM's weights instead of keeping it apart.

  Returns:
    Release, or None if there were problems.
  """
  encoder_file = folder / ENCODER_FOLDER / ENCODER_FILE
  adapter_file = folder / task / ADAPTER_FILE
  lora_folder = find_lora(folder / task)
  for path in (encoder_file, adapter_file, *([lora_folder] if with_lora else [])):
    if not path.exists():
      hint = "; pass --no-lora for a model without" if path == lora_folder else ""
      problems.add(f"{path}: not found{hint}")
  if with_lora and lora_folder.name == LORA_FOLDER and (folder / task / SAVED_LORA_FOLDER).is_dir():
    problems.add(f"{folder / task}: {LORA_FOLDER} and {SAVED_LORA_FOLDER} in it; leave one of them")
  llm_folder = llm or find_llm(folder, problems)
  if problems.found or llm_folder is None:
    return None
  files = open_source(encoder_file), open_source(adapter_file)
  heard = paraformer.open_encoder(files[0], encoder_file.with_name(paraformer.CMVN_FILE), problems)
  model = language_model.open_model(llm_folder, problems)
  added = lora.open_folder(lora_folder, problems) if with_lora else None
  # Each part is looked at as far as the others allow, so that one error tells everything.
  adapter = None
  if heard is not None and model is not None:
    adapter = _open_adapter(files[1], heard.config, model.config.width, problems)
  lora_leaves: dict[str, Lazy] = {}
  if model is not None and added is not None:
    lora_leaves = lora.map_lora(added, added.added_to(model.config), problems).leaves
  if problems.found:
    return None
  assert heard is not None and model is not None and adapter is not None

  leaves = {**heard.leaves, **model.leaves, **adapter.leaves}
  decoder = model.config
  style: dict[str, Any] = {"llm": {"head_present": model.head_present}}
  kept = {"llm": model.kept}
  if added is not None and merge_lora:
    leaves = lora.merge(leaves, lora_leaves, added.scale)
  elif added is not None:
    leaves |= lora_leaves
    decoder = added.added_to(decoder)
    style["peft"] = added.style
    kept["lora"] = (lora_folder / lora.CONFIG_FILE,)
  style["mooer"] = {
    "task": task,
    "llm": _llm_name(llm_folder),
    "encoder_prefix": heard.prefix,
    "lora_merged": added is not None and merge_lora,
    "tuned_encoder": sorted(adapter.tuned_encoder),
  }
  notes = [*model.notes, *(note for file in files for note in file.notes)]
  unread: tuple[str, ...] = ()
  if added is not None:
    notes += added.source.notes
    unread = added.source.ignored
  elif lora_folder.is_dir():
    notes.append(f"{lora_folder.name} is not read (--no-lora)")
  replaced = [f"{ENCODER_FILE}: {path} ({ADAPTER_FILE} has it)" for path in adapter.tuned_encoder]
  return Release(
    config=SpeechLLMConfig(
      encoders=(heard.config,),
      frontends=(heard.frontend,),
      connector=adapter.config,
      decoder=decoder,
      prompts=((task, TASK_PROMPTS[task]),),
    ),
    leaves=leaves,
    style=style,
    tokenizer=model.tokenizer,
    kept=kept,
    ignored=(*heard.ignored, *model.ignored, *adapter.ignored, *unread, *replaced),
    notes=tuple(notes),
  )


@dataclasses.dataclass(frozen=True)
class Adapter:
  """adapter_project.pt: connector/… and, if it was trained along, parts of the encoder."""

  config: LinearConfig
  leaves: dict[str, Lazy]
  tuned_encoder: tuple[str, ...]
  ignored: tuple[str, ...]


def _open_adapter(
  source: Source, heard: SANMConfig, width: int, problems: Problems
) -> Adapter | None:
  config = connector_config(source, heard.width, problems)
  if config is None:
    return None
  rules = paraformer.table(TUNED_ENCODER)
  tuned = [name for name in source.tensors if name.startswith(TUNED_ENCODER)]
  paths = [found[0] for name in tuned if (found := rules.to_jax(name))]
  known = paraformer.shapes(heard)
  expected = {path: known[path] for path in paths if path in known}
  encoder_leaves = map_in(source, rules, expected, problems, names=tuned).leaves
  rest = [name for name in source.tensors if not name.startswith(TUNED_ENCODER)]
  shapes = connector_shapes(config, heard, width)
  leaves = map_in(source, ADAPTER, shapes, problems, names=rest).leaves
  return Adapter(config, leaves | encoder_leaves, tuple(expected), source.ignored)


def find_llm(folder: Path, problems: Problems) -> Path | None:
  """The one folder in a release that holds a config.json; None, with the reason, if not one."""
  found = sorted(
    {path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json")}
  )
  if len(found) == 1:
    return found[0]
  what = "no folder with a config.json" if not found else f"several: {', '.join(map(str, found))}"
  problems.add(f"{folder}: {what}; name the LLM's folder with --llm")
  return None


def find_lora(folder: Path) -> Path:
  """Where the LoRA of a task's folder lies: lora_weights/, or new_llm/ as training wrote it."""
  saved = folder / SAVED_LORA_FOLDER
  return saved if saved.is_dir() and not (folder / LORA_FOLDER).exists() else folder / LORA_FOLDER


def connector_config(source: Source, width: int, problems: Problems) -> LinearConfig | None:
  """Reads the sizes off the tensors; None, with the reason, if that fails.

  Args:
    source: with the adapter's tensors.
    width: of the encoder's frames.
    problems: gets the reason.
  """
  name = "encoder_projector.linear1.weight"
  if name not in source.tensors or len(source.tensors[name].shape) != 2:
    problems.add(f"{source.path}: {name} is missing or no matrix")
    return None
  hidden, joined = source.tensors[name].shape
  if joined % width:
    problems.add(f"{name} takes {joined} values, which are no whole frames of {width}")
    return None
  return LinearConfig(stack=joined // width, hidden_width=hidden)


def connector_shapes(config: LinearConfig, heard: SANMConfig, width: int) -> dict[str, tuple]:
  """connector/… -> shape, between an encoder and an LLM of this width."""
  return {
    "connector/linear1/kernel": (config.stack * heard.width, config.hidden_width),
    "connector/linear1/bias": (config.hidden_width,),
    "connector/linear2/kernel": (config.hidden_width, width),
    "connector/linear2/bias": (width,),
  }


def _llm_name(folder: Path) -> str:
  """What the LLM's folder is called when the release is written again."""
  name = folder.resolve().name
  taken = (*TASK_PROMPTS, ENCODER_FOLDER)
  return "llm" if folder.is_file() or name in taken else name


def export(about: Checkpoint, folder: Path, *, shard_bytes: int) -> None:
  """Writes a checkpoint as a release folder.

  Args:
    about: of a speech LLM with SAN-M and a linear adapter.
    folder: to write into; it exists.
    shard_bytes: size that a file of the LLM does not exceed unless one tensor does.

  Raises:
    ConversionError, ValueError: if the checkpoint holds something that has no place there, or that
      who reads the release would take for something else.
  """
  config = from_json(about.config)
  style = style_of(about, "mooer")
  task = released_task(about, config)
  encoder_folder, task_folder = folder / ENCODER_FOLDER, folder / task
  encoder_folder.mkdir()
  task_folder.mkdir()
  paraformer.export(about, encoder_folder / ENCODER_FILE, prefix=style.get("encoder_prefix", ""))
  problems = Problems()
  paths = [path for path in tree.flatten(about.params) if path.startswith("connector/")]
  tensors: list[Outgoing] = map_out(about, ADAPTER, paths, problems)
  tensors += map_out(
    about, paraformer.table(TUNED_ENCODER), style.get("tuned_encoder", ()), problems
  )
  problems.check(str(about.folder))
  write_torch(task_folder / ADAPTER_FILE, tensors, read_out(about, tensors))
  if config.decoder.lora_rank:
    (task_folder / LORA_FOLDER).mkdir()
    peft.export(
      about,
      config.decoder,
      task_folder / LORA_FOLDER,
      style=style_of(about, "peft"),
      original=kept_json(about, "lora", lora.CONFIG_FILE),
    )
  llm_folder = folder / style.get("llm", "llm")
  llm_folder.mkdir()
  language_model.export_folder(about, config.decoder, llm_folder, shard_bytes=shard_bytes)
  # Heads, features, limits: whatever no file tells is seen by reading them again.
  problems = Problems()
  again = open_release(folder, problems, task=task, with_lora=bool(config.decoder.lora_rank))
  if again is not None:
    check_same(config, again.config, problems)
  problems.check(str(about.folder))


def released_task(about: Checkpoint, config: SpeechLLMConfig) -> str:
  """The task of a model that a release can carry: one, asked with MooER's own words.

  Raises:
    ConversionError: if the model has other prompts, another template or another limit.
  """
  problems = Problems()
  where = about.folder / "config.json"
  known = " or ".join(f"{{{task!r}: {prompt!r}}}" for task, prompt in TASK_PROMPTS.items())
  tasks = [pair[0] for pair in config.prompts]
  if len(tasks) > 1:
    problems.add(
      f"prompts: a release is for one task, this model was trained for {', '.join(tasks)}; leave"
      f" the one that is meant in 'prompts' of {where}, and export once for each"
    )
  for task, prompt in config.prompts:
    if TASK_PROMPTS.get(task) != prompt:
      problems.add(
        f"prompts: {{{task!r}: {prompt!r}}} is none that a release knows, which are {known}; train"
        " with one of them (config.model.prompts)"
      )
  if not tasks:
    problems.add(f"prompts: none; train with {known} (config.model.prompts)")
  if config.template != SpeechLLMConfig.template:
    problems.add(
      f"template={config.template!r}: releases are asked in {SpeechLLMConfig.template!r}; train"
      " with that (config.model.template)"
    )
  if config.max_audio_s != SpeechLLMConfig.max_audio_s:
    problems.add(
      f"max_audio_s={config.max_audio_s:g}: a release tells no limit, and is taken for"
      f" {SpeechLLMConfig.max_audio_s:g} s; train with that (config.model.max_audio_s), or set it"
      f" in {where} if the model is good for it"
    )
  problems.check(f"{about.folder} cannot be a release")
  return tasks[0]
