"""Decoding a test set, and what it is read with."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from mooer_jax import checkpoint
from mooer_jax.audio.frontend import num_frames
from mooer_jax.config import SpeechLLMConfig, build
from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import Batches, eval_batches
from mooer_jax.data.shards import Skip
from mooer_jax.generation import generate
from mooer_jax.generation.loading import Loaded, load_model
from mooer_jax.nn.compute import Compute
from mooer_jax.run.config import EvalConfig, section


def data_of(config: Mapping[str, Any], options: EvalConfig, model: SpeechLLMConfig) -> DataConfig:
  """How a test set is read: every clip that the model takes, in order.

  Raises:
    ValueError: if eval.max_s is more than the model takes.
  """
  longest_s = options.max_s or model.max_audio_s
  if longest_s > model.max_audio_s:
    raise ValueError(
      f"eval.max_s={longest_s:g} is longer than the model takes ({model.max_audio_s:g} s)"
    )
  frontend = model.frontends[0]
  longest_s = max(longest_s, model.min_audio_s)
  longest = num_frames(int(longest_s * frontend.sample_rate_hz), frontend)
  buckets = section(config, "data", DataConfig).buckets
  return section(
    config,
    "data",
    DataConfig,
    shards=options.shards,
    batch_size=options.batch_size,
    window=options.batch_size,
    min_s=0.0,  # what makes no speech token is skipped
    task=options.task,
    task_weights={},
    prompts="",
    cache_features="",
    cut_longer=options.cut_longer,
    max_bad_share=1.0,
    max_s=longest_s,
    **({"buckets": (*buckets, longest)} if longest > buckets[-1] else {}),
  )


@dataclasses.dataclass
class Decoded:
  """What came of a test set.

  Attributes:
    hypotheses: answers by key.
    transcripts: references by key, also of what could not be decoded.
    tasks: by key the same, where each utterance has its own task.
    skipped: what could not be decoded.
    audio_s: length of what could be.
    cut: keys of the answers that max_new_tokens cut off.
  """

  hypotheses: dict[str, str]
  transcripts: dict[str, str]
  tasks: dict[str, str]
  skipped: list[Skip]
  audio_s: float = 0.0
  cut: list[str] = dataclasses.field(default_factory=list)


def load(config: Mapping[str, Any], folder: Path, base: str | None = None) -> Loaded:
  """Loads a checkpoint to run as the sections `compute` and `generation` of a config say."""
  compute = build(Compute, {**dict(config.get("compute", {})), "scan": False}, "compute")
  return load_model(folder, compute, base=base, generation=config.get("generation", {}))


def batches_of(config: Mapping[str, Any], options: EvalConfig, loaded: Loaded) -> Batches:
  """The batches of a test set; to make them checks all but the clips.

  Raises:
    FileNotFoundError, ValueError: for a bad list or annotation, limits that the model does not
      take, or tasks that it has no prompt for.
  """
  data = data_of(config, options, loaded.model)
  return eval_batches(data, loaded.tokenizer, loaded.model)


def out_folder(options: EvalConfig, folder: Path, name: str) -> Path:
  """Where results go: eval.out, or eval/NAME in the run's folder, which is made.

  Raises:
    ValueError: if eval.out is not set and the checkpoint `folder` is not in the folder of a run.
  """
  if not options.out and checkpoint.latest(folder.parent) is None:
    raise ValueError(
      f"{folder} is not in the folder of a run; say where to write: --config.eval.out=DIR"
    )
  out = Path(options.out) if options.out else folder.parent / "eval" / name
  out.mkdir(parents=True, exist_ok=True)
  return out


def decode_set(config: Mapping[str, Any], options: EvalConfig, loaded: Loaded) -> Decoded:
  """Decodes every utterance of a test set that can be read, in the order of its shards.

  Says how many answers were cut off.
  """
  params, model, tokenizer, generation = loaded
  lora_scale = None if options.lora_scale < 0 else options.lora_scale
  key = jax.random.key(config.get("seed", 0))
  decoded = Decoded({}, {}, {}, [])
  batches = batches_of(config, options, loaded)
  shortened = 0
  with Progress(console=Console(stderr=True)) as progress:
    bar = progress.add_task("decoding", total=None)
    for number, host_batch in enumerate(batches):
      batch_key = jax.random.fold_in(key, number)
      generated = jax.device_get(
        generate(params, host_batch.batch, model, generation, key=batch_key, lora_scale=lora_scale)
      )
      for row, name in enumerate(host_batch.keys):
        tokens = generated.tokens_BS[row, : generated.lengths_B[row]]
        if not generated.finished_B[row]:
          decoded.cut.append(name)
        decoded.hypotheses[name] = tokenizer.decode(tokens)
        decoded.transcripts[name] = host_batch.texts[row]
        if not options.task:
          decoded.tasks[name] = host_batch.tasks[row]
      for skip in host_batch.skipped:
        if skip.text:
          decoded.transcripts[skip.key] = skip.text
        if skip.task and not options.task:
          decoded.tasks[skip.key] = skip.task
      decoded.skipped += host_batch.skipped
      decoded.audio_s += host_batch.audio_s
      shortened += host_batch.cut
      done = len(decoded.hypotheses)
      progress.update(bar, completed=done, description=f"decoded {done} utterances")
  if shortened:
    print(f"{shortened} clips were too long and cut (eval.cut_longer)")
  if decoded.cut:
    print(f"{len(decoded.cut)} answers were cut off by generation.max_new_tokens")
  return decoded
