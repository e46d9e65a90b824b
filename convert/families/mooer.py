"""MooER's release folders in the published layout: in and out."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, Lazy
from mooer_jax.config import SpeechLLMConfig, from_json, to_json
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.prompts import task_prompt

from ..core.engine import Outgoing, map_in, map_out, read_out
from ..core.errors import ConversionError, Problems
from ..core.folders import check_roundtrip, style_of
from ..core.kind import Kind, Opened, Original, Request
from ..core.options import Options
from ..core.rules import TRANSPOSE, Rule, Table
from ..core.writers import write_torch
from ..parts import language_model, lora, paraformer, peft
from ..parts.tokenizer_files import read_tokenizer
from ..readers import Source, open_source
from ..verify.reference import mooer as reference

# The prompt of each released model; the multitask model's output to its prompt has two lines.
TASK_PROMPTS = {
  "asr": task_prompt("asr"),
  "ast": task_prompt("ast"),
  "asr_ast_mtl": task_prompt("ast"),
}
ENCODER_FOLDER, ENCODER_FILE = "paraformer_encoder", "paraformer-encoder.pth"
ADAPTER_FILE, LORA_FOLDER = "adapter_project.pt", "lora_weights"
SAVED_LORA_FOLDER = "new_llm"  # written by the original's training program
# A trained encoder is saved with the adapter, under this prefix.
TUNED_ENCODER = "encoder.model."

ADAPTER = Table((
  Rule("encoder_projector.{x:linear1|linear2}.weight", "connector/{x}/kernel", TRANSPOSE),
  Rule("encoder_projector.{x:linear1|linear2}.bias", "connector/{x}/bias"),
))  # fmt: skip

# The original's decoding options; eos has a bias, and is the only token that ends the output.
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


def known_task(task: str | None) -> str:
  """Raises ValueError if it is not the task of a release."""
  if task not in TASK_PROMPTS:
    said = "no --task" if task is None else f"--task {task}"
    raise ValueError(f"{said}: choose one of {', '.join(TASK_PROMPTS)}")
  return task


def open_release(folder: Path, options: Options, problems: Problems) -> Opened | None:
  """Opens all parts of a release.

  Args:
    folder: with paraformer_encoder/, a folder per task, and the LLM's folder.
    options: task, llm, lora, merge_lora.
    problems: receives everything that does not fit.

  Returns:
    The release; None if there were problems.

  Raises:
    ValueError: if the task is missing or unknown.
  """
  task, with_lora = known_task(options.task), options.lora
  encoder_file = folder / ENCODER_FOLDER / ENCODER_FILE
  adapter_file = folder / task / ADAPTER_FILE
  lora_folder = find_lora(folder / task)
  for path in (encoder_file, adapter_file, *([lora_folder] if with_lora else [])):
    if not path.exists():
      hint = "; pass --no-lora for a model without" if path == lora_folder else ""
      problems.add(f"{path}: not found{hint}")
  if with_lora and lora_folder.name == LORA_FOLDER and (folder / task / SAVED_LORA_FOLDER).is_dir():
    problems.add(f"{folder / task}: {LORA_FOLDER} and {SAVED_LORA_FOLDER} in it; leave one of them")
  llm_folder = options.llm or find_llm(folder, problems)
  if problems.found or llm_folder is None:
    return None
  source = open_source(adapter_file)
  cmvn = encoder_file.with_name(paraformer.CMVN_FILE)
  encoder = paraformer.open_encoder(open_source(encoder_file), cmvn, problems)
  model = language_model.open_model(llm_folder, problems)
  added = lora.open_folder(lora_folder, problems) if with_lora else None
  # Each part is checked as far as the others allow, so that one error lists everything.
  adapter = None
  if encoder is not None and model is not None:
    adapter = _open_adapter(source, encoder.config, model.config.hidden_size, problems)
  lora_leaves: dict[str, Lazy] = {}
  if model is not None and added is not None:
    lora_leaves = lora.map_lora(added, added.added_to(model.config), problems).leaves
  if problems.found:
    return None
  assert encoder is not None and model is not None and adapter is not None

  leaves = {**encoder.leaves, **model.leaves, **adapter.leaves}
  decoder, style, kept = model.config, {**model.style}, {**model.kept}
  if added is not None and options.merge_lora:
    leaves = lora.merge(leaves, lora_leaves, added.scale)
  elif added is not None:
    leaves |= lora_leaves
    decoder = added.added_to(decoder)
    style["peft"] = added.style
    kept["lora"] = (lora_folder / lora.CONFIG_FILE,)
  style["mooer"] = {
    "task": task,
    "llm": _llm_name(llm_folder),
    "encoder_prefix": encoder.style["paraformer"]["prefix"],
    "lora_merged": added is not None and options.merge_lora,
    "tuned_encoder": sorted(adapter.tuned_encoder),
  }
  notes = [*model.notes, *encoder.notes, *source.notes]
  unread: tuple[str, ...] = ()
  if added is not None:
    notes += added.source.notes
    unread = added.source.ignored
  elif lora_folder.is_dir():
    notes.append(f"{lora_folder.name} is not read (--no-lora)")
  replaced = [f"{ENCODER_FILE}: {path} ({ADAPTER_FILE} has it)" for path in adapter.tuned_encoder]
  config = SpeechLLMConfig(
    encoders=(encoder.config,),
    frontends=(encoder.frontend,),
    connector=adapter.config,
    decoder=decoder,
    prompts=((task, TASK_PROMPTS[task]),),
  )
  return Opened(
    config=to_json(config),
    leaves=leaves,
    style=style,
    tokenizer=model.tokenizer,
    kept=kept,
    generation=decoding(read_tokenizer(model.tokenizer).eos_id),
    ignored=(*encoder.ignored, *model.ignored, *source.ignored, *unread, *replaced),
    notes=tuple(notes),
  )


@dataclasses.dataclass(frozen=True)
class Adapter:
  """adapter_project.pt: connector/… and, if they were trained, parts of the encoder."""

  config: LinearConfig
  leaves: dict[str, Lazy]
  tuned_encoder: tuple[str, ...]


def _open_adapter(
  source: Source, encoder: SANMConfig, width: int, problems: Problems
) -> Adapter | None:
  config = connector_config(source, encoder.hidden_size, problems)
  if config is None:
    return None
  rules = paraformer.table(TUNED_ENCODER)
  tuned = [name for name in source.tensors if name.startswith(TUNED_ENCODER)]
  paths = [found[0] for name in tuned if (found := rules.to_jax(name))]
  known = paraformer.shapes(encoder)
  expected = {path: known[path] for path in paths if path in known}
  encoder_leaves = map_in(source, rules, expected, problems, names=tuned).leaves
  rest = [name for name in source.tensors if not name.startswith(TUNED_ENCODER)]
  shapes = connector_shapes(config, encoder, width)
  leaves = map_in(source, ADAPTER, shapes, problems, names=rest).leaves
  return Adapter(config, leaves | encoder_leaves, tuple(expected))


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
  """The LoRA in the folder of a task: lora_weights/, or new_llm/ as training writes it."""
  saved = folder / SAVED_LORA_FOLDER
  return saved if saved.is_dir() and not (folder / LORA_FOLDER).exists() else folder / LORA_FOLDER


def connector_config(source: Source, width: int, problems: Problems) -> LinearConfig | None:
  """Derives the sizes from the tensors; None, with the reason, if that fails.

  Args:
    source: tensors of the adapter.
    width: width of the encoder's frames.
    problems: receives the reason.
  """
  name = "encoder_projector.linear1.weight"
  if name not in source.tensors or len(source.tensors[name].shape) != 2:
    problems.add(f"{source.path}: {name} is missing or not a matrix")
    return None
  hidden, joined = source.tensors[name].shape
  if joined % width:
    problems.add(
      f"{name} takes {joined} values, which is not a multiple of the frame width {width}"
    )
    return None
  return LinearConfig(stack=joined // width, hidden_size=hidden)


def connector_shapes(config: LinearConfig, encoder: SANMConfig, width: int) -> dict[str, tuple]:
  """connector/… -> shape, between an encoder and an LLM of this hidden size."""
  return {
    "connector/linear1/kernel": (config.stack * encoder.hidden_size, config.hidden_size),
    "connector/linear1/bias": (config.hidden_size,),
    "connector/linear2/kernel": (config.hidden_size, width),
    "connector/linear2/bias": (width,),
  }


def _llm_name(folder: Path) -> str:
  """Name of the LLM's folder when the release is written again."""
  name = folder.resolve().name
  taken = (*TASK_PROMPTS, ENCODER_FOLDER)
  return "llm" if folder.is_file() or name in taken else name


def export(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  """Writes a checkpoint as a release folder.

  Args:
    about: a speech LLM with SAN-M and a linear adapter.
    folder: to write into; it exists.
    shard_bytes: maximum size of a file of the LLM, unless one tensor is larger.

  Raises:
    ConversionError, ValueError: if the release cannot express the checkpoint, or would be read as
      another model.
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
    peft.export(about, task_folder / LORA_FOLDER)
  llm_folder = folder / style.get("llm", "llm")
  llm_folder.mkdir()
  language_model.export_folder(about, config.decoder, llm_folder, shard_bytes=shard_bytes)
  # Reading the files again shows what they cannot express: heads, features, limits.
  problems = Problems()
  again = open_release(folder, Options(task=task, lora=bool(config.decoder.lora_rank)), problems)
  if again is not None:
    check_roundtrip(config, from_json(again.config), problems)
  problems.check(str(about.folder))


def released_task(about: Checkpoint, config: SpeechLLMConfig) -> str:
  """The task of a model that a release can express: one, with MooER's own prompt.

  Raises:
    ConversionError: if the model has other prompts, another template or another limit.
  """
  problems = Problems()
  where = about.folder / "config.json"
  known = " or ".join(f"{{{task!r}: {prompt!r}}}" for task, prompt in TASK_PROMPTS.items())
  tasks = [pair[0] for pair in config.prompts]
  if len(tasks) > 1:
    problems.add(
      f"prompts: a release has one task, this model was trained for {', '.join(tasks)}; leave one"
      f" in 'prompts' of {where}, and export once per task"
    )
  for task, prompt in config.prompts:
    if TASK_PROMPTS.get(task) != prompt:
      problems.add(
        f"prompts: {{{task!r}: {prompt!r}}} is not a prompt of a release, which are {known};"
        " train with one of them (config.model.prompts)"
      )
  if not tasks:
    problems.add(f"prompts: none; train with {known} (config.model.prompts)")
  if config.chat_template != SpeechLLMConfig.chat_template:
    problems.add(
      f"template={config.chat_template!r}: releases use {SpeechLLMConfig.chat_template!r}; train"
      " with that (config.model.chat_template)"
    )
  if config.max_audio_s != SpeechLLMConfig.max_audio_s:
    problems.add(
      f"max_audio_s={config.max_audio_s:g}: a release does not state its limit and is read with"
      f" {SpeechLLMConfig.max_audio_s:g} s; train with that (config.model.max_audio_s), or set it"
      f" in {where} if the model supports it"
    )
  problems.check(f"{about.folder} cannot be a release")
  return tasks[0]


def run_reference(request: Request) -> Original:
  """Runs the release that a checkpoint was imported from."""
  config, src, folder = request.config, request.src, request.about.folder
  if not isinstance(config.connector, LinearConfig):
    raise ConversionError(f"{folder}: its connector is {config.connector.kind}, not MooER's")
  tasks = [task for task, _ in config.prompts]
  found = [task for task in tasks if (src / task / ADAPTER_FILE).is_file()]
  if len(found) != 1:
    what = "several folders" if found else f"no folder with {ADAPTER_FILE}"
    raise ConversionError(
      f"{src}: {what} for the task of the checkpoint ({', '.join(found or tasks)}); one is needed"
    )
  [task] = found
  problems = Problems()
  llm = request.options.llm or find_llm(src, problems)
  problems.check(str(src))
  assert llm is not None
  lora_folder = find_lora(src / task)
  added: Path | None = lora_folder
  notes: tuple[str, ...] = ()
  if not lora_folder.is_dir():
    if config.decoder.lora_rank:
      raise ConversionError(f"{lora_folder}: not found, but the checkpoint has a LoRA")
    added = None
  elif not config.decoder.lora_rank and not style_of(request.about, "mooer").get("lora_merged"):
    notes = (f"{added} is not used: the checkpoint was made without it (--no-lora)",)
    added = None
  return reference.run(
    request,
    weights=src / ENCODER_FOLDER / ENCODER_FILE,
    cmvn=src / ENCODER_FOLDER / paraformer.CMVN_FILE,
    adapter=src / task / ADAPTER_FILE,
    llm=llm,
    lora=added,
    prompt=task_prompt(task, dict(config.prompts)),
    notes=notes,
  )


def _files(path: Path) -> list[Path]:
  """The weights of a release, of its encoder's folder, or of the folder of a task."""
  if not path.is_dir():
    return []
  if (path / ADAPTER_FILE).is_file():
    added = find_lora(path)
    return [path / ADAPTER_FILE, *([added] if added.is_dir() else [])]
  if (path / ENCODER_FILE).is_file():
    return [path / ENCODER_FILE]
  if not (path / ENCODER_FOLDER).is_dir():
    return []
  files = sorted(f for f in path.rglob("*") if f.name in (ENCODER_FILE, ADAPTER_FILE))
  folders = {f.parent for name in ("config.json", lora.CONFIG_FILE) for f in path.rglob(name)}
  return [*files, *sorted(folders)]


def _recognises(path: Path, names: Collection[str]) -> str | None:
  if path.is_dir():
    if (path / ADAPTER_FILE).is_file():
      return "mooer (the folder of one task)"
    if (path / ENCODER_FILE).is_file():
      return "mooer (its encoder)"
    return "mooer" if (path / ENCODER_FOLDER).is_dir() else None
  adapter = any(ADAPTER.to_jax(name) for name in names)
  return "mooer (its adapter alone)" if adapter and not any("llm." in n for n in names) else None


KIND = Kind(
  name="mooer",
  open=open_release,
  export=export,
  recognises=_recognises,
  files=_files,
  options=("task", "llm", "lora", "merge_lora"),
  parts=("encoders/sanm/", "connector/", "decoder/"),
  reference=run_reference,
  takes=("llm",),
)
