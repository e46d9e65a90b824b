"""MooER's release folders in the published layout: in and out."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

from mooer_jax.checkpoint import Checkpoint, LazyArray
from mooer_jax.config import SpeechLLMConfig, from_json, to_json
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.prompts import task_prompt

from ..core.engine import map_in, map_out, paths_of, read_out
from ..core.errors import ConversionError, Problems
from ..core.folders import check_roundtrip, style_of
from ..core.kind import Kind, Opened, Original, Request, combine
from ..core.options import Options
from ..core.rules import Table, linear
from ..core.shapes import connector_shapes, encoder_shapes, shape_of
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
  *linear("encoder_projector.{x:linear1|linear2}", "connector/{x}"),
  *paraformer.table(TUNED_ENCODER).rules,
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


def known_task(task: str | None, prompts: Mapping[str, str]) -> str:
  """Returns the task. Raises ValueError if it is not one of `prompts`, those of the releases."""
  if task is None or task not in prompts:
    given = "no --task" if task is None else f"--task {task}"
    raise ValueError(f"{given}: choose one of {', '.join(prompts)}")
  return task


@dataclasses.dataclass(frozen=True)
class Files:
  """Files of a release: encoder, adapter, folder of the LoRA, folder of the LLM."""

  encoder: Path
  adapter: Path
  lora: Path
  llm: Path

  @property
  def cmvn(self) -> Path:
    return self.encoder.with_name(paraformer.CMVN_FILE)


def open_release(folder: Path, options: Options, problems: Problems) -> Opened:
  """Opens a folder with paraformer_encoder/, a folder per task, and the LLM's folder."""
  task = known_task(options.task, TASK_PROMPTS)
  encoder, adapter = folder / ENCODER_FOLDER / ENCODER_FILE, folder / task / ADAPTER_FILE
  lora_folder = find_lora(folder / task)
  check_files([encoder, adapter], lora_folder, options, problems)
  if lora_folder.name == LORA_FOLDER and (folder / task / SAVED_LORA_FOLDER).is_dir():
    problems.add(f"{folder / task}: has {LORA_FOLDER} and {SAVED_LORA_FOLDER}; remove one of them")
  llm_folder = options.llm or problems.attempt(find_llm, folder)
  problems.check(str(folder))
  assert llm_folder is not None
  files = Files(encoder=encoder, adapter=adapter, lora=lora_folder, llm=llm_folder)
  opened = open_files(folder, files, options, problems)
  llm_name, taken = llm_folder.resolve().name, (*TASK_PROMPTS, ENCODER_FOLDER)
  style = opened.style["mooer"]
  style["llm"] = "llm" if llm_folder.is_file() or llm_name in taken else llm_name
  style["task"] = task
  [eos_id] = opened.generation["eos_token_id"]
  return dataclasses.replace(
    opened,
    config={**opened.config, "prompts": {task: TASK_PROMPTS[task]}},
    generation={**DECODING, **opened.generation, "sequence_bias": [[eos_id, EOS_BIAS]]},
  )


def open_files(folder: Path, files: Files, options: Options, problems: Problems) -> Opened:
  """Opens the parts of a release, of which `generation` has the eos alone, as one model.

  Raises ConversionError, with all that is wrong in the parts, which begins with `folder`.
  """
  # Each part is checked as far as the others allow, so that one error lists all problems.
  encoder = problems.attempt(
    paraformer.open_encoder, open_source(files.encoder), files.cmvn, problems=problems
  )
  model = problems.attempt(language_model.open_model, files.llm, problems)
  added = problems.attempt(lora.open_folder, files.lora) if options.lora else None
  source = open_source(files.adapter)
  adapter, decoder = None, None if model is None else model.config
  if encoder is not None and decoder is not None:
    width = decoder.hidden_size
    adapter = problems.attempt(_open_adapter, source, encoder.config, width, problems=problems)
  lora_leaves: dict[str, LazyArray] = {}
  if decoder is not None and added is not None:
    decoder = added.added_to(decoder)
    lora_leaves = map_in(added.source, added.table, lora.shapes(decoder), problems=problems).leaves
  problems.check(str(folder))
  assert encoder is not None and model is not None and adapter is not None and decoder is not None

  connector, connector_leaves, tuned = adapter
  shared = combine([model, encoder], source, *([] if added is None else [added.source]))
  leaves = encoder.leaves | model.leaves | connector_leaves | lora_leaves
  if added is None and files.lora.is_dir():
    shared["notes"] += (f"{files.lora.name} is not read (--no-lora)",)
  if added is not None and options.merge_lora:
    leaves, decoder = lora.merge(leaves, added.scale), model.config
  elif added is not None:
    shared["style"]["peft"] = added.style
    shared["kept"]["lora"] = (files.lora / lora.CONFIG_FILE,)
  shared["style"]["mooer"] = {
    "encoder_prefix": encoder.style["paraformer"]["prefix"],
    "lora_merged": added is not None and options.merge_lora,
    "tuned_encoder": sorted(tuned),
  }
  shared["ignored"] += tuple(f"{ENCODER_FILE}: {path} ({ADAPTER_FILE} has it)" for path in tuned)
  config = SpeechLLMConfig(
    encoders=(encoder.config,),
    frontends=(encoder.frontend,),
    connector=connector,
    decoder=decoder,
  )
  return Opened(
    config=to_json(config),
    leaves=leaves,
    tokenizer=model.tokenizer,
    generation={"eos_token_id": [read_tokenizer(model.tokenizer).eos_id]},
    **shared,
  )


def check_files(
  needed: Collection[Path], lora_folder: Path, options: Options, problems: Problems
) -> None:
  """Adds a problem for each file of a release that does not exist."""
  for path in (*needed, *([lora_folder] if options.lora else [])):
    if not path.exists():
      hint = "; pass --no-lora for a model without" if path == lora_folder else ""
      problems.add(f"{path}: not found{hint}")


def _open_adapter(
  source: Source, encoder: SANMConfig, width: int, *, problems: Problems
) -> tuple[LinearConfig, dict[str, LazyArray], list[str]]:
  """Opens the connector and trained parts of the encoder: (config, leaves, paths of the latter)."""
  config = connector_config(source, encoder.hidden_size)
  known = encoder_shapes(encoder)
  paths = [mapped[0] for name in source.tensors if (mapped := ADAPTER.to_jax(name))]
  tuned = [path for path in paths if path in known]
  expected = connector_shapes(config, encoder.hidden_size, width)
  expected |= {path: known[path] for path in tuned}
  return config, map_in(source, ADAPTER, expected, problems=problems).leaves, tuned


def find_llm(folder: Path) -> Path:
  """Returns the only folder with a config.json. Raises ConversionError if that fails."""
  found = sorted(
    {path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json")}
  )
  if len(found) == 1:
    return found[0]
  held = ", ".join(map(str, found)) or "none"
  raise ConversionError(
    f"{folder}: must have one folder with a config.json, has {held}; pass --llm FOLDER"
  )


def find_lora(folder: Path) -> Path:
  """Returns the LoRA in the folder of a task: lora_weights/, or new_llm/ of training."""
  saved = folder / SAVED_LORA_FOLDER
  return saved if saved.is_dir() and not (folder / LORA_FOLDER).exists() else folder / LORA_FOLDER


def connector_config(source: Source, width: int) -> LinearConfig:
  """Derives the sizes from the shapes of the tensors. Raises ValueError if that fails."""
  name = "encoder_projector.linear1.weight"
  hidden, joined = shape_of(source, name, 2)
  if joined % width:
    raise ConversionError(
      f"{name} takes {joined} values, which is not a multiple of the frame width {width}"
    )
  return LinearConfig(stack=joined // width, hidden_size=hidden)


def export(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  """Writes a checkpoint as a release. Raises ValueError if that cannot express it."""
  config = from_json(about.config)
  task = released_task(about, config, TASK_PROMPTS)
  if config.speech_output is not None:
    raise ConversionError(
      f"{about.folder}: this layout has no vocoder; export it with the kind mooer-speech"
    )
  (folder / ENCODER_FOLDER).mkdir()
  (folder / task).mkdir()
  files = Files(
    encoder=folder / ENCODER_FOLDER / ENCODER_FILE,
    adapter=folder / task / ADAPTER_FILE,
    lora=folder / task / LORA_FOLDER,
    llm=folder / style_of(about, "mooer").get("llm", "llm"),
  )
  write_files(about, config, files, shard_bytes=shard_bytes)
  options = Options(task=task, lora=bool(config.decoder.lora_rank))
  check_roundtrip(about, config, lambda p: from_json(open_release(folder, options, p).config))


def write_files(
  about: Checkpoint, config: SpeechLLMConfig, files: Files, *, shard_bytes: int
) -> None:
  """Writes the parts of a release."""
  style = style_of(about, "mooer")
  paraformer.export(about, files.encoder, prefix=style.get("encoder_prefix", ""))
  paths = [*paths_of(about, "connector/"), *style.get("tuned_encoder", ())]
  tensors = map_out(about, ADAPTER, paths)
  write_torch(files.adapter, tensors, read_out(about, tensors))
  if config.decoder.lora_rank:
    files.lora.mkdir()
    peft.export(about, files.lora)
  files.llm.mkdir()
  language_model.export_folder(about, config.decoder, files.llm, shard_bytes=shard_bytes)


def released_task(about: Checkpoint, config: SpeechLLMConfig, prompts: Mapping[str, str]) -> str:
  """Returns a model's only task. Raises ConversionError for other prompts, templates or limits."""
  problems = Problems()
  where = about.folder / "config.json"
  tasks = [task for task, _ in config.prompts]
  if len(tasks) > 1:
    problems.add(
      f"prompts: a release has one task, this model was trained for {', '.join(tasks)}; leave one"
      f" in 'prompts' of {where}, and export once per task"
    )
  if not tasks or any(prompts.get(task) != prompt for task, prompt in config.prompts):
    problems.add(
      f"prompts={dict(config.prompts)}: must be one of a release, {dict(prompts)}; train with that"
      " (config.model.prompts)"
    )
  supported = f", or set it in {where} if the model supports it"
  for name, remedy in (("chat_template", ""), ("max_audio_s", supported)):
    value, usual = getattr(config, name), getattr(SpeechLLMConfig, name)
    if value != usual:
      problems.add(
        f"{name}={value!r}: releases use {usual!r}; train with that (config.model.{name}){remedy}"
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
  llm = request.options.llm or find_llm(src)
  lora_folder, notes = chosen_lora(request, find_lora(src / task))
  return reference.run(
    request,
    task,
    encoder=src / ENCODER_FOLDER / ENCODER_FILE,
    adapter=src / task / ADAPTER_FILE,
    llm=llm,
    lora=lora_folder,
    notes=notes,
  )


def chosen_lora(request: Request, folder: Path) -> tuple[Path | None, tuple[str, ...]]:
  """The LoRA of a release if the checkpoint has it, and notes: it may be without (--no-lora)."""
  trained, has_lora = bool(request.config.decoder.lora_rank), folder.is_dir()
  if trained and not has_lora:
    raise ConversionError(f"{folder}: not found, but the checkpoint has a LoRA")
  if has_lora and (trained or style_of(request.about, "mooer").get("lora_merged")):
    return folder, ()
  unused = f"{folder} is not used: the checkpoint was made without it (--no-lora)"
  return None, (unused,) if has_lora else ()


def _files(path: Path) -> list[Path]:
  """The weights of a release, of its encoder's folder, or of the folder of a task."""
  if not path.is_dir():
    return []
  if (path / ENCODER_FILE).is_file():
    return [] if (path / ADAPTER_FILE).is_file() else [path / ENCODER_FILE]
  if (path / ADAPTER_FILE).is_file():
    added = find_lora(path)
    return [path / ADAPTER_FILE, *([added] if added.is_dir() else [])]
  if not (path / ENCODER_FOLDER).is_dir():
    return []
  files = sorted(f for f in path.rglob("*") if f.name in (ENCODER_FILE, ADAPTER_FILE))
  folders = {f.parent for name in ("config.json", lora.CONFIG_FILE) for f in path.rglob(name)}
  return [*files, *sorted(folders)]


def _recognises(path: Path, names: Collection[str]) -> str | None:
  if path.is_dir():
    if (path / ENCODER_FILE).is_file():  # beside the adapter, as of mooer-speech
      return None if (path / ADAPTER_FILE).is_file() else "mooer (its encoder)"
    if (path / ADAPTER_FILE).is_file():
      return "mooer (the folder of one task)"
    return "mooer" if (path / ENCODER_FOLDER).is_dir() else None
  mapped = (ADAPTER.to_jax(name) for name in names)
  adapter = any(found and found[0].startswith("connector/") for found in mapped)
  return "mooer (its adapter alone)" if adapter and not any("llm." in n for n in names) else None


KIND = Kind(
  name="mooer",
  open=open_release,
  export=export,
  sharded=True,
  recognises=_recognises,
  files=_files,
  options=("task", "llm", "lora", "merge_lora"),
  parts=("encoders/sanm/", "connector/", "decoder/"),
  reference=run_reference,
  takes=("llm",),
)
