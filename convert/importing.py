"""`convert import KIND SRC OUT`: files of PyTorch become a checkpoint."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mooer_jax.checkpoint import Lazy, describe, find
from mooer_jax.config import part_from_json, part_to_json, to_json
from mooer_jax.prompts import read_prompts

from .core.engine import map_in
from .core.errors import Problems
from .core.folders import check_target, copier, keep_apart, save_checkpoint
from .families import mooer, mooer_training, salmonn
from .parts import beats, funasr_config, language_model, lora, paraformer, whisper
from .readers import open_source


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command line says beyond kind, source and target.

  Attributes:
    task: mooer: which of the release's models; deepspeed: what it was trained for.
    llm: salmonn: folder of the LLM; mooer: the same, if it is not inside SRC.
    lora: mooer: False for a release without lora_weights/.
    merge_lora: mooer, salmonn: add the LoRA to the LLM's weights.
    base: peft: checkpoint of the model that the LoRA belongs to; deepspeed: of the release.
    lora_config: deepspeed, salmonn: adapter_config.json of training, or its folder.
    whisper: salmonn: folder or file with Whisper's encoder.
    beats: salmonn: file of BEATs, if the model has it.
    prompts: salmonn: JSON of what each task is asked, one prompt for each.
    overwrite: replace what is there.
  """

  task: str | None = None
  llm: Path | None = None
  lora: bool = True
  merge_lora: bool = False
  base: Path | None = None
  lora_config: Path | None = None
  whisper: Path | None = None
  beats: Path | None = None
  prompts: Path | None = None
  overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
  """What was imported.

  Attributes:
    folder: the checkpoint.
    leaves: path -> (shape, dtype).
    ignored: names of tensors and entries that no leaf is made of.
    notes: what a user should know.
  """

  folder: Path
  leaves: dict[str, Lazy]
  ignored: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


def import_checkpoint(kind: str, src: Path, out: Path, options: Options = Options()) -> Report:
  """Makes a checkpoint of files of PyTorch, tensor by tensor.

  Args:
    kind: a name in KINDS.
    src: the folder or file that the kind is made of.
    out: the checkpoint's folder; it is complete when it is there.
    options: what else the kind may need.

  Raises:
    FileNotFoundError, FileExistsError: for the source and the target.
    ConversionError: with every tensor and option that does not fit.
    ReadError: if a file is broken or holds values that are not finite.
  """
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r}: choose one of {sorted(KINDS)}")
  if not src.exists():
    raise FileNotFoundError(f"{src}: no such file or folder")
  read = (getattr(options, name) for name in _PATHS)
  keep_apart(out, (src, *read))
  check_target(out, overwrite=options.overwrite)
  unused = [
    name
    for name, value in vars(options).items()
    if value != getattr(Options, name) and name not in (*_TAKEN[kind], "overwrite")
  ]
  if unused:
    raise ValueError(f"--{unused[0].replace('_', '-')} means nothing for the kind {kind!r}")
  if options.merge_lora and not options.lora:
    raise ValueError("--merge-lora and --no-lora: choose one of them")
  return KINDS[kind](src, out, options)


def _language_model(kind: str) -> Callable[[Path, Path, Options], Report]:
  def run(src: Path, out: Path, options: Options) -> Report:
    problems = Problems()
    opened = language_model.open_model(src, problems, kind=kind)
    problems.check(str(src))
    assert opened is not None
    save_checkpoint(
      out,
      opened.leaves,
      config={"decoder": part_to_json(opened.config)},
      kind=kind,
      style={"llm": {"head_present": opened.head_present}},
      tokenizer=opened.tokenizer,
      kept={"llm": opened.kept},
      overwrite=options.overwrite,
    )
    return Report(out, opened.leaves, opened.ignored, opened.notes)

  return run


def _encoder_json(opened: paraformer.Encoder | beats.BEATs | whisper.Encoder) -> dict[str, Any]:
  """Content of config.json for an encoder alone."""
  return {
    "encoders": [part_to_json(opened.config)],
    "frontends": [part_to_json(opened.frontend)],
  }


def _paraformer(src: Path, out: Path, options: Options) -> Report:
  if not (src / paraformer.FUNASR_FILE).is_file():
    hint = ""
    if (src / mooer.ENCODER_FILE).is_file():
      hint = "; this is the encoder of a MooER release: import that with the kind mooer"
    raise FileNotFoundError(
      f"{src / paraformer.FUNASR_FILE}: not found; SRC is FunASR's folder with"
      f" {paraformer.FUNASR_FILE} and {paraformer.CMVN_FILE}{hint}"
    )
  problems = Problems()
  described = src / funasr_config.FILE
  kept = (described,) if described.is_file() else ()
  conf = funasr_config.read_yaml(described) if kept else {}
  source = open_source(src / paraformer.FUNASR_FILE)
  opened = paraformer.open_encoder(source, src / paraformer.CMVN_FILE, problems, conf=conf)
  problems.check(str(src))
  assert opened is not None
  save_checkpoint(
    out,
    opened.leaves,
    config=_encoder_json(opened),
    kind="paraformer",
    style={"paraformer": {"prefix": opened.prefix}},
    kept={"encoder": kept},
    overwrite=options.overwrite,
  )
  return Report(out, opened.leaves, opened.ignored, (*source.notes, *funasr_config.notes(conf)))


def _beats(src: Path, out: Path, options: Options) -> Report:
  problems = Problems()
  opened = beats.open_beats(src, problems)
  problems.check(str(src))
  assert opened is not None
  save_checkpoint(
    out,
    opened.leaves,
    config=_encoder_json(opened),
    kind="beats",
    style={"beats": opened.style},
    overwrite=options.overwrite,
  )
  return Report(out, opened.leaves, opened.ignored, opened.notes)


def _peft(src: Path, out: Path, options: Options) -> Report:
  problems = Problems()
  opened = lora.open_folder(src, problems)
  problems.check(str(src))
  assert opened is not None
  tokenizer = copier(())
  generation: dict[str, Any] = {}
  base = None
  if options.base is None:
    leaves = map_in(opened.source, opened.table, lora.shapes_alone(opened), problems).leaves
    config: dict[str, Any] = {"lora": opened.to_json()}
  else:
    about = describe(find(options.base))
    if "decoder" not in about.config:
      raise ValueError(f"{about.folder} has no LLM that a LoRA could be added to")
    decoder = opened.added_to(part_from_json(about.config["decoder"], "decoder"))
    leaves = lora.map_lora(opened, decoder, problems).leaves
    if own := lora.paths(about):
      problems.add(
        f"{about.folder} has a LoRA of its own (on {own[0]} and {len(own) - 1} more): import that"
        " model with --no-lora, or with --merge-lora if this one was trained on the merged weights"
      )
    config = {**about.config, "decoder": part_to_json(decoder)}
    base, generation = about.folder, about.generation
    tokenizer = copier(sorted(about.tokenizer.iterdir()))
  problems.check(str(src))
  save_checkpoint(
    out,
    leaves,
    config=config,
    kind="peft",
    style={"peft": opened.style},
    tokenizer=tokenizer,
    kept={"lora": (src / lora.CONFIG_FILE,)},
    generation=generation,
    base=base,
    overwrite=options.overwrite,
  )
  return Report(out, leaves, opened.source.ignored, opened.source.notes)


def _deepspeed(src: Path, out: Path, options: Options) -> Report:
  if options.base is None:
    raise ValueError("deepspeed needs the imported release that training began with: --base CKPT")
  task = None if options.task is None else _known(options.task)
  about = describe(find(options.base))
  problems = Problems()
  opened = mooer_training.open_training(
    src, about, problems, lora_config=options.lora_config, task=task
  )
  problems.check(str(src))
  assert opened is not None
  kept = {}
  if options.lora_config is not None:
    kept["lora"] = (lora.config_file(options.lora_config),)
  save_checkpoint(
    out,
    opened.leaves,
    config=to_json(opened.config),
    kind="deepspeed",
    style=opened.style,
    tokenizer=copier(sorted(about.tokenizer.iterdir())),
    kept=kept,
    generation=about.generation,
    base=about.folder,
    overwrite=options.overwrite,
  )
  return Report(out, opened.leaves, opened.ignored, opened.notes)


def _known(task: str | None) -> str:
  if task not in mooer.TASK_PROMPTS:
    said = "no --task" if task is None else f"--task {task}"
    raise ValueError(f"{said}: choose one of {', '.join(mooer.TASK_PROMPTS)}")
  return task


def _mooer(src: Path, out: Path, options: Options) -> Report:
  task = _known(options.task)
  problems = Problems()
  opened = mooer.open_release(
    src,
    problems,
    task=task,
    llm=options.llm,
    with_lora=options.lora,
    merge_lora=options.merge_lora,
  )
  problems.check(str(src))
  assert opened is not None
  save_checkpoint(
    out,
    opened.leaves,
    config=to_json(opened.config),
    kind="mooer",
    style=opened.style,
    tokenizer=opened.tokenizer,
    kept=opened.kept,
    generation=mooer.decoding(language_model.read_tokenizer(opened.tokenizer).eos_id),
    overwrite=options.overwrite,
  )
  return Report(out, opened.leaves, opened.ignored, opened.notes)


def _whisper(src: Path, out: Path, options: Options) -> Report:
  problems = Problems()
  opened = whisper.open_encoder(src, problems)
  problems.check(str(src))
  assert opened is not None
  save_checkpoint(
    out,
    opened.leaves,
    config=_encoder_json(opened),
    kind="whisper",
    style={"whisper": opened.style},
    kept={"whisper": opened.kept},
    overwrite=options.overwrite,
  )
  return Report(out, opened.leaves, opened.ignored, opened.notes)


def _salmonn(src: Path, out: Path, options: Options) -> Report:
  if options.whisper is None or options.llm is None:
    raise ValueError("salmonn needs --whisper and --llm: its file holds only what was trained")
  prompts = None
  if options.prompts is not None:
    listed = read_prompts(options.prompts)
    if several := [task for task, texts in listed.items() if len(texts) > 1]:
      raise ValueError(f"{options.prompts}: several prompts for {several[0]!r}; leave one of them")
    prompts = {task: text for task, [text] in listed.items()}
  problems = Problems()
  opened = salmonn.open_model(
    src,
    problems,
    whisper_path=options.whisper,
    beats_path=options.beats,
    llm=options.llm,
    lora_config=options.lora_config,
    merge_lora=options.merge_lora,
    prompts=prompts,
  )
  problems.check(str(src))
  assert opened is not None
  save_checkpoint(
    out,
    opened.leaves,
    config=to_json(opened.config),
    kind="salmonn",
    style=opened.style,
    tokenizer=opened.tokenizer,
    kept=opened.kept,
    generation=salmonn.decoding(language_model.read_tokenizer(opened.tokenizer).eos_id),
    overwrite=options.overwrite,
  )
  return Report(out, opened.leaves, opened.ignored, opened.notes)


KINDS: dict[str, Callable[[Path, Path, Options], Report]] = {
  "mooer": _mooer,
  "qwen2": _language_model("qwen2"),
  "llama": _language_model("llama"),
  "peft": _peft,
  "paraformer": _paraformer,
  "whisper": _whisper,
  "beats": _beats,
  "deepspeed": _deepspeed,
  "salmonn": _salmonn,
}
_PATHS = ("llm", "base", "lora_config", "whisper", "beats", "prompts")
_TAKEN = {
  "mooer": ("task", "llm", "lora", "merge_lora"),
  "qwen2": (),
  "llama": (),
  "peft": ("base",),
  "paraformer": (),
  "whisper": (),
  "beats": (),
  "deepspeed": ("base", "lora_config", "task"),
  "salmonn": ("whisper", "beats", "llm", "lora_config", "merge_lora", "prompts"),
}
