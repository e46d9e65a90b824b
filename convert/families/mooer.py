"""MooER's release folders in the published layout: in and out."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, LazyArray
from mooer_jax.config import SpeechLLMConfig, from_json, to_json
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.prompts import task_prompt

from ..core.engine import map_in, map_out, read_out
from ..core.errors import ConversionError, Problems
from ..core.folders import check_roundtrip, style_of
from ..core.kind import Kind, Opened, Original, Request, combine
from ..core.options import Options
from ..core.rules import TRANSPOSE, Rule, Table
from ..core.writers import write_torch
from ..parts import language_model, lora, paraformer, peft
from ..parts.tokenizer_files import read_tokenizer
from ..readers import Source, open_source
from ..verify.reference import mooer as reference

# Prompts of the released models; the multitask model replies in two lines.
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

# The original's decoding options. EOS has a bias, and is the only end of the output.
DECODING = {
  "num_beams": 4,
  "length_penalty": 0.8,
  "max_new_tokens": 200,
  "min_length": 1,
  "repetition_penalty": 1.0,
}
EOS_BIAS = -0.2


def decoding(eos_id: int) -> dict[str, Any]:
  """Returns the content of generation.json."""
  return {**DECODING, "eos_token_id": [eos_id], "sequence_bias": [[eos_id, EOS_BIAS]]}


def known_task(task: str | None) -> str:
  """Raises ValueError if it is not the task of a release."""
  if task not in TASK_PROMPTS:
    given = "no --task" if task is None else f"--task {task}"
    raise ValueError(f"{given}: choose one of {', '.join(TASK_PROMPTS)}")
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
  task = known_task(options.task)
  lora_folder = find_lora(folder / task)
  _check_files(folder, task, problems, with_lora=options.lora)
  llm_folder = options.llm or find_llm(folder, problems)
  if problems.found or llm_folder is None:
    return None
  encoder_file = folder / ENCODER_FOLDER / ENCODER_FILE
  cmvn = encoder_file.with_name(paraformer.CMVN_FILE)
  encoder = paraformer.open_encoder(open_source(encoder_file), cmvn, problems)
  model = language_model.open_model(llm_folder, problems)
  added = lora.open_folder(lora_folder, problems) if options.lora else None
  # Each part is checked as far as the others allow, so that one error lists all problems.
  adapter = None
  source = open_source(folder / task / ADAPTER_FILE)
  if encoder is not None and model is not None:
    adapter = _open_adapter(source, encoder.config, model.config.hidden_size, problems)
  lora_leaves: dict[str, LazyArray] = {}
  if model is not None and added is not None:
    lora_leaves = lora.map_lora(added, added.added_to(model.config), problems).leaves
  if problems.found:
    return None
  assert encoder is not None and model is not None and adapter is not None

  shared = combine([model, encoder])
  leaves, decoder = encoder.leaves | model.leaves | adapter.leaves | lora_leaves, model.config
  shared["notes"] += source.notes
  shared["ignored"] += source.ignored
  if added is not None:
    shared["notes"] += added.source.notes
    shared["ignored"] += added.source.ignored
  elif lora_folder.is_dir():
    shared["notes"] += (f"{lora_folder.name} is not read (--no-lora)",)
  if added is not None and options.merge_lora:
    leaves = lora.merge(leaves, added.scale)
  elif added is not None:
    decoder = added.added_to(decoder)
    shared["style"]["peft"] = added.style
    shared["kept"]["lora"] = (lora_folder / lora.CONFIG_FILE,)
  shared["style"]["mooer"] = {
    "task": task,
    "llm": _llm_name(llm_folder),
    "encoder_prefix": encoder.style["paraformer"]["prefix"],
    "lora_merged": added is not None and options.merge_lora,
    "tuned_encoder": sorted(adapter.tuned_encoder),
  }
  shared["ignored"] += tuple(
    f"{ENCODER_FILE}: {path} ({ADAPTER_FILE} has it)" for path in adapter.tuned_encoder
  )
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
    tokenizer=model.tokenizer,
    generation=decoding(read_tokenizer(model.tokenizer).eos_id),
    **shared,
  )


def _check_files(folder: Path, task: str, problems: Problems, *, with_lora: bool) -> None:
  lora_folder = find_lora(folder / task)
  needed = [folder / ENCODER_FOLDER / ENCODER_FILE, folder / task / ADAPTER_FILE]
  for path in (*needed, *([lora_folder] if with_lora else [])):
    if not path.exists():
      hint = "; pass --no-lora for a model without" if path == lora_folder else ""
      problems.add(f"{path}: not found{hint}")
  if with_lora and lora_folder.name == LORA_FOLDER and (folder / task / SAVED_LORA_FOLDER).is_dir():
    problems.add(f"{folder / task}: has {LORA_FOLDER} and {SAVED_LORA_FOLDER}; remove one of them")


@dataclasses.dataclass(frozen=True)
class Adapter:
  """adapter_project.pt: connector/… and, if they were trained, parts of the encoder."""

  config: LinearConfig
  leaves: dict[str, LazyArray]
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
  encoder_leaves = map_in(source, rules, expected, problems=problems, names=tuned).leaves
  rest = [name for name in source.tensors if not name.startswith(TUNED_ENCODER)]
  shapes = connector_shapes(config, encoder, width)
  leaves = map_in(source, ADAPTER, shapes, problems=problems, names=rest).leaves
  return Adapter(config, leaves | encoder_leaves, tuple(expected))


def find_llm(folder: Path, problems: Problems) -> Path | None:
  """Returns the only folder with a config.json; None, with the reason, if that fails."""
  found = sorted(
    {path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json")}
  )
  if len(found) == 1:
    return found[0]
  held = ", ".join(map(str, found)) or "none"
  problems.add(f"{folder}: must have one folder with a config.json, has {held}; pass --llm FOLDER")
  return None


def find_lora(folder: Path) -> Path:
  """Returns the LoRA in the folder of a task: lora_weights/, or new_llm/ of training."""
  saved = folder / SAVED_LORA_FOLDER
  return saved if saved.is_dir() and not (folder / LORA_FOLDER).exists() else folder / LORA_FOLDER


def connector_config(source: Source, width: int, problems: Problems) -> LinearConfig | None:
  """Derives the sizes from the shapes of the tensors; None, with the reason, if that fails."""
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
  """connector/… -> shape, for an LLM with this hidden size."""
  return {
    "connector/linear1/kernel": (config.stack * encoder.hidden_size, config.hidden_size),
    "connector/linear1/bias": (config.hidden_size,),
    "connector/linear2/kernel": (config.hidden_size, width),
    "connector/linear2/bias": (width,),
  }


def _llm_name(folder: Path) -> str:
  """Name of the LLM's folder in an export."""
  name = folder.resolve().name
  taken = (*TASK_PROMPTS, ENCODER_FOLDER)
  return "llm" if folder.is_file() or name in taken else name


def export(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  """Writes a checkpoint as a release into an existing folder.

  Raises:
    ConversionError, ValueError: if a release cannot express the checkpoint.
  """
  config = from_json(about.config)
  style = style_of(about, "mooer")
  task = released_task(about, config)
  encoder_folder, task_folder = folder / ENCODER_FOLDER, folder / task
  encoder_folder.mkdir()
  task_folder.mkdir()
  paraformer.export(about, encoder_folder / ENCODER_FILE, prefix=style.get("encoder_prefix", ""))
  paths = [path for path in tree.flatten(about.params) if path.startswith("connector/")]
  tensors = map_out(about, ADAPTER, paths)
  tensors += map_out(about, paraformer.table(TUNED_ENCODER), style.get("tuned_encoder", ()))
  write_torch(task_folder / ADAPTER_FILE, tensors, read_out(about, tensors))
  if config.decoder.lora_rank:
    (task_folder / LORA_FOLDER).mkdir()
    peft.export(about, task_folder / LORA_FOLDER)
  llm_folder = folder / style.get("llm", "llm")
  llm_folder.mkdir()
  language_model.export_folder(about, config.decoder, llm_folder, shard_bytes=shard_bytes)
  # Reads the files again, to find what they cannot express: heads, features, limits.
  problems = Problems()
  again = open_release(folder, Options(task=task, lora=bool(config.decoder.lora_rank)), problems)
  if again is not None:
    check_roundtrip(config, from_json(again.config), problems)
  problems.check(str(about.folder))


def released_task(about: Checkpoint, config: SpeechLLMConfig) -> str:
  """Returns the only task of a model.

  Raises:
    ConversionError: if the model has other prompts, another template or another limit.
  """
  problems = Problems()
  where = about.folder / "config.json"
  tasks = [task for task, _ in config.prompts]
  if len(tasks) > 1:
    problems.add(
      f"prompts: a release has one task, this model was trained for {', '.join(tasks)}; leave one"
      f" in 'prompts' of {where}, and export once per task"
    )
  if not tasks or any(TASK_PROMPTS.get(task) != prompt for task, prompt in config.prompts):
    problems.add(
      f"prompts={dict(config.prompts)}: must be one of a release, {TASK_PROMPTS}; train with that"
      " (config.model.prompts)"
    )
  if config.chat_template != SpeechLLMConfig.chat_template:
    problems.add(
      f"chat_template={config.chat_template!r}: releases use {SpeechLLMConfig.chat_template!r};"
      " train with that (config.model.chat_template)"
    )
  if config.max_audio_s != SpeechLLMConfig.max_audio_s:
    problems.add(
      f"max_audio_s={config.max_audio_s:g}: releases use {SpeechLLMConfig.max_audio_s:g}; train"
      f" with that (config.model.max_audio_s), or set it in {where} if the model supports it"
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
