"""A training config, read and checked before anything is loaded."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mooer_jax import checkpoint
from mooer_jax.config import SpeechLLMConfig, build, model_config
from mooer_jax.data.config import DataConfig
from mooer_jax.generation import GenerationOptions
from mooer_jax.nn.compute import Compute
from mooer_jax.prompts import read_prompts, task_prompt
from mooer_jax.training.optimizer import OptimizerConfig
from mooer_jax.training.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop.

  Attributes:
    steps: updates in all.
    accumulation: micro-batches an update; data.batch_size is for all of them together.
    log_every: updates between two lines of metrics.
    save_every: updates between two checkpoints; the last update always saves.
    keep: checkpoints that are kept, the newest ones.
    cmvn: "estimate" from the first batches, a path of an `am.mvn`, or "" for what the
      initial checkpoint has.
  """

  steps: int = 100_000
  accumulation: int = 1
  log_every: int = 20
  save_every: int = 1000
  keep: int = 3
  cmvn: str = ""

  def __post_init__(self):
    for name in ("steps", "accumulation", "log_every", "save_every", "keep"):
      if getattr(self, name) < 1:
        raise ValueError(f"train.{name}={getattr(self, name)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What is decoded and how it is scored; batch buckets are those of `data`, and one for max_s.

  Attributes:
    shards: `data.list` of the test set, or its annotation file.
    references: a `text` file (key, transcript); "" takes the one beside the data.list, as in
      MooER's test sets, else the transcripts in the shards or the annotation.
    task: the prompt; "": each utterance's own task, and each is scored by itself.
    batch_size: utterances decoded together.
    out: folder for `text` and the reports; "" is `eval/NAME` in the run's folder, NAME being that
      of the folder of the data.list, FOLDER-FILE for an annotation file, or of what else eval.py
      does: "salmonn" for that suite, "perplexity", "lora_sweep".
    metric: the one that report.json is about: "mixed" (MooER's), "character" or "word".
    space_mark: what `▁` in a transcript is; "blank", which models are trained to write for it, or
      "keep", as MooER's script does.
    skip_missing: leave utterances without a hypothesis out, as MooER's script does.
    max_s: longest clip, 0 for what the model takes; longer ones are reported, and scored as not
      decoded.
    cut_longer: take the first max_s of longer clips instead, as SALMONN does, and say of how many.
    lora_scale: of LoRA, -1 for that of training.
    bleu_tokenize: sacrebleu's tokenizer, by the language of the answers: "13a", "zh", "char", …;
      "": as `evaluation.translation.TOKENIZERS` has it for the task. A task that is not there, of
      the model's own, gets BLEU where this is set.
  """

  shards: str
  references: str = ""
  task: str = "asr"
  batch_size: int = 16
  out: str = ""
  metric: str = "mixed"
  space_mark: str = "blank"
  skip_missing: bool = False
  max_s: float = 0.0
  cut_longer: bool = False
  lora_scale: float = -1.0
  bleu_tokenize: str = ""


@dataclasses.dataclass(frozen=True)
class ActivationConfig:
  """What the model is asked at the discounted scale.

  Attributes:
    shards: annotation file (.json) of the clips; "": no activation tuning.
    task: which of the model's prompts; it should allow for long and diverse answers.
    lora_scale: while answering.
    clips: so many of the first ones (SALMONN: 12).
    review: stop when the answers are written, so that a person may edit them; the same command
      with False then trains on them.
  """

  shards: str = ""
  task: str = ""
  lora_scale: float = 0.0
  clips: int = 12
  review: bool = False

  def __post_init__(self):
    if self.shards and not self.shards.endswith(".json"):
      raise ValueError(f"activation.shards={self.shards!r}: an annotation file (.json) is needed")
    if self.shards and not self.task:
      raise ValueError("activation.task is missing: name the task whose prompt is asked")
    if self.clips < 1 or self.lora_scale < 0:
      raise ValueError(
        f"activation.clips={self.clips} must be at least 1, activation.lora_scale={self.lora_scale}"
        " at least 0"
      )


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """What a run measures of itself as it trains: perplexities of reference answers, by task.

  Attributes:
    shards: test set, each utterance with its own task; "" measures nothing.
    instructions: tasks whose prompts are given; besides, always none.
    every: updates between two measurements; the models that the run starts from and ends with are
      measured, too.
    batch_size: utterances at a time.
  """

  shards: str = ""
  instructions: tuple[str, ...] = ()
  every: int = 1
  batch_size: int = 16

  def __post_init__(self):
    for name in ("every", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"probe.{name}={getattr(self, name)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Run:
  """A config, read and checked."""

  model: SpeechLLMConfig
  data: DataConfig
  optimizer: OptimizerConfig
  train: TrainConfig
  mesh: MeshConfig
  generation: GenerationOptions
  probe: ProbeConfig
  trainable: tuple[str, ...]
  workdir: Path
  seed: int
  init_from: Path | None

  @classmethod
  def read(cls, config: ConfigDict) -> "Run":
    """Raises ValueError for anything that is unknown, mistyped or does not fit."""
    check_sections(config)
    if jax.process_count() > 1:
      raise ValueError(
        f"{jax.process_count()} processes: this version trains in one process, on all its devices"
      )
    init_from = _initial_checkpoint(config.get("init_from"))
    seed = config.get("seed", 0)
    if "seed" in config["data"]:
      raise ValueError("data.seed: one seed decides everything; set config.seed")
    data = section(config, "data", DataConfig, seed=seed)
    model = _with_tasks_of(data.prompts, read_model(config, scan=True))
    run = cls(
      model=model,
      data=data,
      optimizer=section(config, "optimizer", OptimizerConfig),
      train=section(config, "train", TrainConfig),
      mesh=section(config, "mesh", MeshConfig),
      generation=_generation(config, init_from),
      probe=section(config, "probe", ProbeConfig),
      trainable=tuple(config["trainable"]),
      workdir=Path(config["workdir"]),
      seed=seed,
      init_from=init_from,
    )
    if run.data.batch_size % run.train.accumulation:
      raise ValueError(
        f"data.batch_size={run.data.batch_size} does not divide into"
        f" train.accumulation={run.train.accumulation} micro-batches"
      )
    if run.optimizer.decay != "constant" and run.train.steps > run.optimizer.total_steps:
      raise ValueError(
        f"train.steps={run.train.steps} goes on after optimizer.total_steps="
        f"{run.optimizer.total_steps}, where the learning rate is"
        f" {run.optimizer.end_lr:g}; set both alike"
      )
    if init_from and run.train.cmvn:
      raise ValueError(
        f"train.cmvn={run.train.cmvn!r}, but the encoder of init_from was trained with its own"
        " CMVN; set train.cmvn=''"
      )
    longest = run.data.answer_buckets[-1]
    if run.generation.max_new_tokens < longest:
      raise ValueError(
        f"generation.max_new_tokens={run.generation.max_new_tokens} would cut answers that are"
        f" trained on: data.answer_buckets go up to {longest}; set it to at least that"
      )
    if run.data.max_s > model.max_audio_s:
      raise ValueError(
        f"data.max_s={run.data.max_s} is longer than model.max_audio_s={model.max_audio_s}"
      )
    if run.probe.shards and not Path(run.probe.shards).is_file():
      raise FileNotFoundError(f"probe.shards={run.probe.shards}: no such file")
    for instruction in run.probe.instructions:
      task_prompt(instruction, dict(model.prompts))
    return run


def _with_tasks_of(path: str, model: SpeechLLMConfig) -> SpeechLLMConfig:
  """Adds the tasks of a file of prompts that the model lacks, each with its first prompt."""
  own = dict(model.prompts)
  listed = read_prompts(path) if path else {}
  new = tuple((task, prompts[0]) for task, prompts in listed.items() if task not in own)
  return model.replace(prompts=(*model.prompts, *new))


def _initial_checkpoint(path: str | None) -> Path | None:
  if not path:
    return None
  folder = checkpoint.find(path)
  if folder != Path(path):
    # A fine-tune points to its base for good, and a run that goes on deletes its older steps.
    raise ValueError(f"init_from={path} is the folder of a run; name the checkpoint: {folder}")
  return folder


def _generation(config: ConfigDict, init_from: Path | None) -> GenerationOptions:
  """Decoding defaults that the run's checkpoints get: the config's, over those of init_from."""
  inherited = checkpoint.describe(init_from).generation if init_from else {}
  return build(GenerationOptions, {**inherited, **config.get("generation", {})}, "generation")


_SECTIONS = {
  "compute": Compute,
  "data": DataConfig,
  "optimizer": OptimizerConfig,
  "train": TrainConfig,
  "mesh": MeshConfig,
  "eval": EvalConfig,
  "activation": ActivationConfig,
  "probe": ProbeConfig,
}
# Decided elsewhere: by training or decoding, by the config's one seed.
_NOT_SET = ("compute.scan", "data.seed")


def default_config() -> ConfigDict:
  """A config for `train.py` and `eval.py` with the defaults of its sections.

  What has no default is absent: a file assigns workdir, trainable, `model` and `data.shards`.
  `generation` holds only what a file sets: in evaluation it goes over the checkpoint's own.
  """
  config = ConfigDict()
  config.seed = 0
  config.init_from = ""
  config.tokenizer = ""
  config.model = ConfigDict()
  config.generation = ConfigDict()
  for name, cls in _SECTIONS.items():
    config[name] = {
      field.name: _default(field)
      for field in dataclasses.fields(cls)
      if _default(field) is not dataclasses.MISSING and f"{name}.{field.name}" not in _NOT_SET
    }
  return config


def _default(field: dataclasses.Field):
  made = field.default_factory
  return field.default if made is dataclasses.MISSING else made()


SECTIONS = {
  "model", "compute", "data", "optimizer", "train", "mesh", "generation", "eval", "activation",
  "probe", "seed", "workdir", "init_from", "trainable",
  "tokenizer", "characters", "specials", "eos",
}  # fmt: skip


def check_sections(config: Mapping[str, Any]):
  """Raises ValueError for a section that nobody reads, or one that is missing."""
  for name in config:
    if name not in SECTIONS:
      close = difflib.get_close_matches(name, SECTIONS, 1)
      hint = f"; did you mean {close[0]!r}?" if close else ""
      raise ValueError(f"unknown config section {name!r}{hint} Allowed: {sorted(SECTIONS)}")
  for name in ("model", "data", "workdir", "trainable"):
    if name not in config:
      raise ValueError(f"the config has no {name!r}")
  if isinstance(config["trainable"], str):
    raise ValueError(f"trainable={config['trainable']!r}: give a tuple of patterns, not a string")


def section(config: Mapping[str, Any], name: str, cls: type, **extra):
  """One section of a config as its dataclass; a section that is absent gives the defaults."""
  return build(cls, {**dict(config.get(name, {})), **extra}, name)


def read_model(config: Mapping[str, Any], **compute) -> SpeechLLMConfig:
  """The model of a config; keyword arguments override the `compute` section."""
  return model_config(config["model"], {**dict(config.get("compute", {})), **compute})
