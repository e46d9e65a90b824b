"""Decoding a test set, and what it is read with."""

import dataclasses
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import Progress

from mooer_jax import checkpoint
from mooer_jax.audio.frontend import num_frames
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import Batches, eval_batches
from mooer_jax.data.shards import SkippedUtterance
from mooer_jax.generation import generate
from mooer_jax.generation.loading import Loaded, load_model
from mooer_jax.run.config import EvalConfig, Run


def data_of(run: Run, options: EvalConfig, model: SpeechLLMConfig) -> DataConfig:
  """The data config of a test set: every clip that the model takes, in order.

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
  longest = num_frames(int(longest_s * model.sample_rate_hz), frontend)
  buckets = run.data.buckets
  return dataclasses.replace(
    run.data,
    shards=options.shards,
    batch_size=options.batch_size,
    shuffle_buffer_size=options.batch_size,
    min_s=0.0,  # what makes no speech token is skipped
    task=options.task,
    task_weights={},
    prompts="",
    cache_features="",
    truncate=options.truncate,
    max_bad_share=1.0,
    max_s=longest_s,
    buckets=(*buckets, longest) if longest > buckets[-1] else buckets,
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
  skipped: list[SkippedUtterance]
  audio_s: float = 0.0
  cut: list[str] = dataclasses.field(default_factory=list)


def load(run: Run, folder: Path, base: str | None = None) -> Loaded:
  """Loads a checkpoint to run as the sections `compute` and `generation` of a config say.

  Raises:
    ValueError: if the config asks for a mesh of several devices, and as `load_model`.
  """
  if asked := {n: k for n, k in dataclasses.asdict(run.mesh).items() if k > 1}:
    sizes = ", ".join(f"mesh.{name}={size}" for name, size in asked.items())
    raise ValueError(
      f"{sizes}: evaluation runs on one device; set"
      f" {' '.join(f'--config.mesh.{name}=1' for name in asked)}"
    )
  return load_model(folder, run.compute, base_checkpoint=base, generation=run.generation)


def batches_of(run: Run, options: EvalConfig, loaded: Loaded) -> Batches:
  """The batches of a test set; making them checks everything but the clips.

  Raises:
    FileNotFoundError, ValueError: for a bad list or annotation, limits that the model does not
      take, or tasks that it has no prompt for.
  """
  if not options.shards:
    raise ValueError("eval.shards is missing: name the data.list or annotation file of a test set")
  data = data_of(run, options, loaded.model)
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


def decode_set(run: Run, options: EvalConfig, loaded: Loaded) -> Decoded:
  """Decodes every utterance of a test set that can be read, in the order of its shards.

  Says how many answers were cut off.
  """
  params, model, tokenizer, generation = loaded
  key = jax.random.key(run.seed)
  decoded = Decoded({}, {}, {}, [])
  batches = batches_of(run, options, loaded)
  shortened = 0
  with Progress(console=Console(stderr=True)) as progress:
    bar = progress.add_task("decoding", total=None)
    for number, host_batch in enumerate(batches):
      batch_key = jax.random.fold_in(key, number)
      generated = jax.device_get(
        generate(
          params, host_batch.batch, model, generation, key=batch_key, lora_scale=options.lora_scale
        )
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
      shortened += host_batch.num_truncated
      done = len(decoded.hypotheses)
      progress.update(bar, completed=done, description=f"decoded {done} utterances")
  if shortened:
    print(f"{shortened} clips were too long and cut (eval.truncate)")
  if decoded.cut:
    print(f"{len(decoded.cut)} answers were cut off by generation.max_new_tokens")
  return decoded
