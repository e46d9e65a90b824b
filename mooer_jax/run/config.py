"""A training config, read and checked before anything is loaded."""

import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mooer_jax import checkpoint
from mooer_jax.config import SpeechLLMConfig, build
from mooer_jax.data.config import DataConfig
from mooer_jax.generation import GenerationOptions
from mooer_jax.prompts import read_prompts, task_prompt
from mooer_jax.run.setup import ProbeConfig, TrainConfig, check_sections, read_model, section
from mooer_jax.training.optimizer import OptimizerConfig
from mooer_jax.training.sharding import MeshConfig


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
