"""The config of training and evaluation, read once into frozen dataclasses."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mooer_jax import checkpoint, storage
from mooer_jax.config import (
  SpeechLLMConfig,
  build,
  convert,
  model_config,
  part_kinds,
  unknown_key,
  with_new_names,
)
from mooer_jax.data.config import DataConfig
from mooer_jax.evaluation.error_rate import METRICS
from mooer_jax.evaluation.speech_scores import SpeechConfig
from mooer_jax.evaluation.translation import TOKENIZERS, check_tokenizer
from mooer_jax.generation import GenerationConfig
from mooer_jax.generation.loading import merge_options
from mooer_jax.kernels.choice import check_backend
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.prompts import TASKS, read_prompts, task_prompt
from mooer_jax.sharding import MeshConfig, make_mesh
from mooer_jax.training.optimizer import OptimizerConfig
from mooer_jax.training.vocoder import VocoderTrainingConfig


def _check_counts(config: Any, section: str, *, but: str = "") -> None:
  """Raises ValueError for an integer below 1; all integers of these sections are counts."""
  for field in dataclasses.fields(config):
    if field.type is int and field.name != but and (value := getattr(config, field.name)) < 1:
      raise ValueError(f"{section}.{field.name}={value}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The training loop.

  Attributes:
    objective: "answers", or "vocoder": recordings of the answers (data.target_audio).
    steps: number of optimizer steps.
    gradient_accumulation_steps: micro-batches per optimizer step; data.batch_size is their sum.
    log_every: steps between two lines of metrics.
    save_every: steps between two checkpoints; the last step always saves.
    max_to_keep: number of checkpoints to keep, the newest ones.
    cmvn: "estimate" from the first batches, path of an `am.mvn`, or "": the initial checkpoint's.
    max_bad_steps: number of bad steps in a row that are skipped, which leaves the parameters and
      the optimizer as they were; one more stops the run. A step is bad if its loss or gradient norm
      is not finite. 0: the first bad step stops the run.
    mirror: URL of a folder in an object store, to which each checkpoint is copied while training
      goes on; a workdir without checkpoints is restored from it. "": none.
    max_loss_ratio: a step is also bad if its loss exceeds this multiple of the running mean of the
      losses of about the last 100 good steps; 0: no limit.
  """

  RENAMED: ClassVar = {"accumulation": "gradient_accumulation_steps", "keep": "max_to_keep"}
  objective: Literal["answers", "vocoder"] = "answers"
  steps: int = 100_000
  gradient_accumulation_steps: int = 1
  log_every: int = 20
  save_every: int = 1000
  max_to_keep: int = 3
  cmvn: str = ""
  mirror: str = ""
  max_bad_steps: int = 0
  max_loss_ratio: float = 0.0

  def __post_init__(self):
    _check_counts(self, "train", but="max_bad_steps")
    if self.mirror and not storage.is_url(self.mirror):
      raise ValueError(
        f"train.mirror={self.mirror}: must be a URL, such as s3://bucket/runs/mooer or"
        " file:///runs/mooer"
      )
    if self.max_bad_steps < 0:
      raise ValueError(f"train.max_bad_steps={self.max_bad_steps}: must be at least 0")
    if self.max_loss_ratio and not 1 < self.max_loss_ratio < math.inf:
      raise ValueError(
        f"train.max_loss_ratio={self.max_loss_ratio:g}: must be above 1, or 0 for no limit"
      )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Test set, decoding and scoring.

  Batches have the buckets of `data`, and one more for max_s if that is longer.

  Attributes:
    shards: `data.list` of the test set, or its annotation file (.json).
    references: a `text` file (key, transcript); "": the one beside the data.list, as in MooER's
      test sets, else the transcripts in the shards or the annotation.
    task: task of all utterances; "": each utterance's own task; each task is scored separately.
    batch_size: utterances per batch.
    out: folder for `text` and the reports; "": `eval/NAME` in the run's folder. NAME is the folder
      of the data.list, FOLDER-FILE of an annotation file, "salmonn", "perplexity" or "lora_sweep".
    metric: metric of report.json: "mixed" (MooER's), "character" or "word".
    space_mark: meaning of `▁` in a transcript: "space" (as in training), "keep" (a character, as in
      MooER's script) or "auto" (see `ScoreConfig`).
    skip_missing: leave out utterances without a hypothesis, as MooER's script does.
    max_s: longest clip, in seconds; default: the model's limit. Longer clips are reported and
      scored as not decoded.
    truncate: truncate longer clips to max_s instead, as SALMONN does; their number is printed.
    lora_scale: scale of LoRA; default: that of training.
    bleu_tokenize: sacrebleu's tokenizer for the language of the texts: "13a", "zh", "char", …; "":
      that of `evaluation.translation.TOKENIZERS`. Required for the BLEU of other tasks.
  """

  RENAMED: ClassVar = {"cut_longer": "truncate"}
  shards: str = ""
  references: str = ""
  task: str = "asr"
  batch_size: int = 16
  out: str = ""
  metric: str = "mixed"
  space_mark: str = "space"
  skip_missing: bool = False
  max_s: float | None = None
  truncate: bool = False
  lora_scale: float | None = None
  bleu_tokenize: str = ""

  def __post_init__(self):
    if self.space_mark == "blank":  # its name in version 0.1
      object.__setattr__(self, "space_mark", "space")
    for name, allowed in (("metric", sorted(METRICS)), ("space_mark", ["auto", "space", "keep"])):
      if getattr(self, name) not in allowed:
        raise ValueError(f"eval.{name}={getattr(self, name)!r}: choose one of {allowed}")
    _check_counts(self, "eval")
    if self.max_s is not None and not 0 < self.max_s < math.inf:
      raise ValueError(
        f"eval.max_s={self.max_s:g}: must be above 0 seconds; leave it out for the model's limit"
      )
    if self.lora_scale is not None and not self.lora_scale >= 0:
      raise ValueError(
        f"eval.lora_scale={self.lora_scale:g}: must be at least 0; leave it out for the scale of"
        " training"
      )
    if self.bleu_tokenize:
      check_tokenizer(self.bleu_tokenize)
      if self.task in TASKS and self.task not in TOKENIZERS:
        raise ValueError(
          f"eval.bleu_tokenize={self.bleu_tokenize!r} has no effect: the task {self.task!r} does"
          " not translate"
        )
      if not self.task:
        raise ValueError(
          f"eval.bleu_tokenize={self.bleu_tokenize!r} applies to one task; set eval.task, or leave"
          " it out, and each task is scored with its own tokenizer"
        )

  def require_shards(self) -> None:
    """Raises ValueError if no test set is named."""
    if not self.shards:
      raise ValueError(
        "eval.shards is missing: name the data.list or annotation file of a test set"
      )


@dataclasses.dataclass(frozen=True)
class ActivationConfig:
  """Activation tuning: training on texts generated at a lower LoRA scale.

  Attributes:
    shards: annotation file (.json) of the clips; "": no activation tuning.
    task: task of the prompt, which should allow long and diverse texts.
    lora_scale: LoRA scale of generation.
    clips: number of clips, the first ones (SALMONN: 12).
    review: stop after generation, to edit the texts by hand; rerun with False to train on them.
  """

  shards: str = ""
  task: str = ""
  lora_scale: float = 0.0
  clips: int = 12
  review: bool = False

  def __post_init__(self):
    if self.shards and not self.shards.endswith(".json"):
      raise ValueError(f"activation.shards={self.shards!r}: must be an annotation file (.json)")
    if self.shards and not self.task:
      raise ValueError("activation.task is missing: set it to the task of the prompt")
    _check_counts(self, "activation")
    if not self.lora_scale >= 0:
      raise ValueError(f"activation.lora_scale={self.lora_scale:g}: must be at least 0")


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
  """Perplexity evaluation during training, by task.

  Attributes:
    shards: test set, each utterance with its own task; "": no evaluation.
    instructions: tasks whose prompts are measured, besides no prompt.
    every: steps between two measurements; the first and the last model are always measured.
    batch_size: utterances per batch.
  """

  shards: str = ""
  instructions: tuple[str, ...] = ()
  every: int = 1
  batch_size: int = 16

  def __post_init__(self):
    _check_counts(self, "perplexity")


@dataclasses.dataclass(frozen=True)
class Run:
  """The whole config of `train.py` and `eval.py`, read once; a field is a key of the config.

  Attributes:
    model: the model that is trained, with `compute.scan`; evaluation takes the checkpoint's.
    compute: how the model runs; `scan` is set by training and decoding themselves.
    generation: options that override those of the checkpoint (or of init_from).
    vocoder_training: losses and discriminators of train.objective="vocoder".
    trainable: patterns of parameter paths; everything else stays frozen.
    workdir: folder of the run.
    seed: of everything random.
    init_from: checkpoint that training starts from: a folder, or a URL.
    tokenizer: folder of a tokenizer; "": the checkpoint's, or one made of `characters`.
    characters, specials, eos: a tokenizer of single characters, special tokens and the end token.
  """

  RENAMED: ClassVar = {"probe": "perplexity"}
  model: SpeechLLMConfig
  compute: ExecutionConfig
  data: DataConfig
  optimizer: OptimizerConfig
  train: TrainConfig
  mesh: MeshConfig
  generation: dict[str, Any]
  eval: EvalConfig
  activation: ActivationConfig
  perplexity: PerplexityConfig
  speech: SpeechConfig
  vocoder_training: VocoderTrainingConfig
  trainable: tuple[str, ...]
  workdir: Path
  seed: int = 0
  init_from: str | Path | None = None
  tokenizer: str = ""
  characters: str = ""
  specials: tuple[str, ...] = ()
  eos: str = ""

  @classmethod
  def read(cls, config: Mapping[str, Any]) -> "Run":
    """Reads and checks a config.

    Raises:
      ValueError: for a key or section that is unknown, missing, mistyped or out of range.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    config = with_new_names(config, cls.RENAMED, "config")
    for name in config:
      if name not in names:
        raise ValueError(unknown_key(name, names))
    for name in ("model", "data", "workdir", "trainable"):
      if name not in config:
        raise ValueError(f"the config has no {name!r}")
    values: dict[str, Any] = {
      name: build(section_class, config.get(name, {}), name)
      for name, section_class in SECTIONS.items()
    }
    for key, why in _DERIVED.items():
      section, _, name = key.partition(".")
      if name in config.get(section, {}):
        raise ValueError(f"{key}: {why}")
    hints = {**typing.get_type_hints(cls), "workdir": str, "init_from": str | None}
    for name in ("trainable", "workdir", *_VALUES):
      if name in config:
        value = str(config[name]) if isinstance(config[name], Path) else config[name]
        values[name] = convert(hints[name], value, name)
    if not values["workdir"]:
      raise ValueError("workdir='': name the folder of the run")
    folders = {name: values.get(name) or "" for name in ("workdir", "init_from", "tokenizer")}
    if storage.is_url(folders["init_from"]):
      del folders["init_from"]
    folders |= {
      "eval.out": values["eval"].out,
      "data.cache_features": values["data"].cache_features,
    }
    for name, folder in folders.items():
      if fault := storage.path_fault(folder):
        raise ValueError(
          f"{name}={folder}: {fault}. train.mirror copies checkpoints to a URL, and data.shards and"
          " init_from may be one"
          if storage.is_url(folder)
          else f"{name}={folder}: {fault}"
        )
    seed = values.get("seed", 0)
    if not 0 <= seed < 2**32:
      raise ValueError(f"seed={seed}: must be between 0 and 2**32 - 1")
    values["data"] = dataclasses.replace(values["data"], seed=seed)
    model = model_config(config["model"], {**config.get("compute", {}), "scan": True})
    listed = read_prompts(values["data"].prompts) if values["data"].prompts else {}
    own = dict(model.prompts)
    new = [(task, prompts[0]) for task, prompts in listed.items() if task not in own]
    values["model"] = model.replace(prompts=(*model.prompts, *new))
    build(GenerationConfig, config.get("generation", {}), "generation")
    values["generation"] = dict(config.get("generation", {}))
    values["workdir"] = Path(values["workdir"])
    start = values.get("init_from") or None
    values["init_from"] = Path(start) if start and not storage.is_url(start) else start
    return cls(**values)

  def decoding_defaults(self) -> GenerationConfig:
    """Generation options of the run's checkpoints: the config's, over those of init_from."""
    saved = checkpoint.describe(self.init_from).generation if self.init_from else {}
    return merge_options(saved, self.generation)

  def check_training(self) -> None:
    """Raises FileNotFoundError or ValueError for a run that cannot be trained on these devices."""
    attention = self.model.compute.attention
    check_backend(attention)
    dropout: Any = getattr(self.model.connector, "dropout", None)
    if attention not in ("auto", "xla") and dropout:
      raise ValueError(
        f"compute.attention={attention!r} does not support dropout, which model.qformer.dropout"
        " asks for in training; set compute.attention='auto', or the dropout to 0"
      )
    if self.compute.quantization != "none":
      raise ValueError(
        f"compute.quantization={self.compute.quantization!r} is for decoding; leave it out to train"
      )
    self.check_features()
    if self.init_from is not None:
      folder = checkpoint.locate(self.init_from)
      if folder != str(self.init_from).rstrip("/"):
        # A fine-tune points to its base for good, and a resumed run deletes its older steps.
        raise ValueError(
          f"init_from={self.init_from} is the folder of a run; name the checkpoint: {folder}"
        )
      if self.train.cmvn:
        raise ValueError(
          f"train.cmvn={self.train.cmvn!r}, but the encoder of init_from was trained with its own"
          " CMVN; set train.cmvn=''"
        )
    mesh = make_mesh(**dataclasses.asdict(self.mesh)).shape
    ways = mesh["data"] * mesh["fsdp"]
    by = f"mesh.data={mesh['data']} x mesh.fsdp={mesh['fsdp']}"
    if self.perplexity.shards and self.perplexity.batch_size % ways:
      raise ValueError(
        f"perplexity.batch_size={self.perplexity.batch_size} must be divisible by {by}; make it a"
        f" multiple of {ways}"
      )
    micro_batches = self.train.gradient_accumulation_steps
    if self.data.batch_size % (micro_batches * ways):
      raise ValueError(
        f"data.batch_size={self.data.batch_size} must be divisible by"
        f" train.gradient_accumulation_steps={micro_batches} x {by}; make it a multiple of"
        f" {micro_batches * ways}"
      )
    if self.optimizer.decay != "constant" and self.train.steps > self.optimizer.total_steps:
      raise ValueError(
        f"train.steps={self.train.steps} exceeds optimizer.total_steps="
        f"{self.optimizer.total_steps}, where the learning rate is {self.optimizer.end_lr:g};"
        " set both to the same number"
      )
    longest, limit = self.data.answer_buckets[-1], self.decoding_defaults().max_new_tokens
    if limit < longest:
      raise ValueError(
        f"generation.max_new_tokens={limit} would truncate answers that are trained on:"
        f" data.answer_buckets go up to {longest}; set it to at least that"
      )
    if self.data.max_s > self.model.max_audio_s:
      raise ValueError(
        f"data.max_s={self.data.max_s} is longer than model.max_audio_s={self.model.max_audio_s}"
      )
    if self.perplexity.shards and not storage.is_file(self.perplexity.shards):
      raise FileNotFoundError(f"perplexity.shards={self.perplexity.shards}: no such file")
    for instruction in self.perplexity.instructions:
      task_prompt(instruction, dict(self.model.prompts))

  def check_features(self) -> None:
    """Raises ValueError if compute.features has no effect on training."""
    if self.compute.features == "device" and self.data.cache_features:
      raise ValueError(
        "compute.features='device' has no effect on training with"
        f" data.cache_features={self.data.cache_features!r}, which reads encoder frames instead of"
        " features; set compute.features='host', or data.cache_features=''"
      )


# Sections that are dataclasses with defaults, and the plain values of a config.
SECTIONS: dict[str, type] = {
  field.name: cast(type, field.type)
  for field in dataclasses.fields(Run)
  if dataclasses.is_dataclass(field.type) and field.name != "model"
}
_VALUES = [
  field.name for field in dataclasses.fields(Run) if field.default is not dataclasses.MISSING
]
_DERIVED = {
  "compute.scan": "training scans layers and decoding unrolls them; leave it out",
  "compute.platform": "programs run on the backend of JAX; leave it out",
  "data.seed": "one seed determines everything; set config.seed",
}


def renamed_keys() -> dict[str, str]:
  """Deprecated keys of a config and their new names, such as "train.keep": "train.max_to_keep"."""
  renamed = dict(Run.RENAMED)
  parts = {f"model.{kind}": part for kind, part in part_kinds().items()}
  for section, section_class in {**SECTIONS, "model": SpeechLLMConfig, **parts}.items():
    names = getattr(section_class, "RENAMED", {})
    renamed |= {f"{section}.{old}": f"{section}.{new}" for old, new in names.items()}
  return renamed


def default_config() -> ConfigDict:
  """A config for `train.py` and `eval.py` with the defaults of its sections.

  Keys without a default are absent: a config file assigns workdir, trainable and `model`.
  `generation` holds only what a file sets, since it overrides the checkpoint's.
  """
  config = ConfigDict()
  config.seed = 0
  config.init_from = ""
  config.tokenizer = ""
  config.model = ConfigDict()
  config.generation = ConfigDict()
  for name, section_class in SECTIONS.items():
    config[name] = ConfigDict()
    for field in dataclasses.fields(section_class):
      made = field.default_factory
      default = field.default if made is dataclasses.MISSING else made()
      if dataclasses.is_dataclass(default) and not isinstance(default, type):
        default = ConfigDict(dataclasses.asdict(default))
      if default is None and field.type == float | None:
        default = placeholder(float)  # a flag needs the type
      if default is not dataclasses.MISSING and f"{name}.{field.name}" not in _DERIVED:
        config[name][field.name] = default
  return config
