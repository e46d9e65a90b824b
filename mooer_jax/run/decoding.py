"""Decoding of a test set."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from mooer_jax import checkpoint, hosts, storage
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.augment import AugmentConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import Batches, eval_batches
from mooer_jax.data.labels import NO_LABELS
from mooer_jax.data.readers.entries import SkippedUtterance, in_order
from mooer_jax.data.utterances import BadDataError
from mooer_jax.generation import NOT_FINITE, decode_batches
from mooer_jax.generation.loading import Loaded, load_model
from mooer_jax.run.config import EvalConfig, Run
from mooer_jax.sharding import make_mesh
from mooer_jax.speech_llm import prompt_slots

_SET_OUT = "set the output folder: --config.eval.out=DIR"


@dataclasses.dataclass
class DecodingResults:
  """Decoding results of a test set.

  Attributes:
    hypotheses: generated texts by key.
    transcripts: references by key, including those of skipped utterances.
    tasks: tasks by key, if each utterance has its own.
    skipped: utterances that could not be decoded.
    audio_s: length of the decoded audio, seconds.
    unfinished: keys of the hypotheses that were truncated at max_new_tokens.
    num_truncated: number of clips that were truncated to eval.max_s.
  """

  hypotheses: dict[str, str] = dataclasses.field(default_factory=dict)
  transcripts: dict[str, str] = dataclasses.field(default_factory=dict)
  tasks: dict[str, str] = dataclasses.field(default_factory=dict)
  skipped: list[SkippedUtterance] = dataclasses.field(default_factory=list)
  audio_s: float = 0.0
  unfinished: list[str] = dataclasses.field(default_factory=list)
  num_truncated: int = 0


def find_checkpoint(path: str | Path, options: EvalConfig | None = None) -> Path:
  """`checkpoint.find`, with the same result in all processes; each host copies that of a URL.

  Raises:
    ValueError: before the copy, if the results need a folder that `options` do not name.
  """
  found = hosts.on_first(lambda: checkpoint.locate(path))
  if options and not options.out and storage.is_url(found):
    raise ValueError(f"{found} is a URL; {_SET_OUT}")
  return checkpoint.local_folder(found)


def load(
  run: Run,
  folder: Path,
  base: str | None = None,
  *,
  mesh: jax.sharding.Mesh | None = None,
  **lora: Any,
) -> Loaded:
  """Loads a checkpoint with the sections `compute`, `generation` and `mesh` of a config.

  Args:
    run, folder: the config and the checkpoint.
    base: base checkpoint path of a fine-tune, if it has moved.
    mesh: default: of config.mesh and the devices of this process, which decodes by itself.
    lora: lora_scale or merge_lora of `load_model`.

  Raises:
    ValueError: for a mesh that does not fit the devices or the model; and as `load_model`.
  """
  try:
    mesh = mesh or make_mesh(**dataclasses.asdict(run.mesh), devices=jax.local_devices())
  except ValueError as error:
    if jax.process_count() == 1:
      raise
    raise ValueError(f"each process decodes on its own devices: {error}") from error
  return load_model(
    folder,
    run.compute,
    base_checkpoint=base,
    generation=run.generation,
    mesh=mesh,
    **lora,
  )


def batches_of(
  run: Run, options: EvalConfig, loaded: Loaded, *, process: tuple[int, int] = (0, 1)
) -> Batches:
  """The batches of a test set, in order, after a check of everything but the clips.

  With several processes, `process` is the index of this one and their number, and selects its
  share; by default, each has all batches.

  Raises:
    FileNotFoundError, ValueError: for a bad list or annotation, limits that exceed the model's, or
      tasks for which it has no prompt.
  """
  options.require_shards()
  model = loaded.model
  data = eval_data(run, options, model)
  return eval_batches(data, loaded.tokenizer, model, process=process)


def eval_data(run: Run, options: EvalConfig, model: SpeechLLMConfig) -> DataConfig:
  """The data config of a test set: that of the run, with the clip limits of evaluation.

  Raises:
    ValueError: if eval.max_s exceeds the limit of the model.
  """
  buckets = run.data.buckets
  longest_s = options.max_s or model.max_audio_s
  if longest_s > model.max_audio_s:
    raise ValueError(
      f"eval.max_s={longest_s:g} exceeds the limit of the model, {model.max_audio_s:g} s"
    )
  longest_s = max(longest_s, model.min_audio_s)
  longest = model.frontends[0].num_frames(int(longest_s * model.sample_rate_hz))
  return dataclasses.replace(
    run.data,
    shards=options.shards,
    mixture={},
    filter="",
    augment=AugmentConfig(),
    **NO_LABELS,  # eval.references names other texts
    batch_size=options.batch_size,
    shuffle_buffer_size=options.batch_size,
    min_s=0.0,  # clips without a speech token are skipped
    task=options.task,
    task_weights={},
    prompts="",
    cache_features="",
    truncate=options.truncate,
    max_bad_share=1.0,
    max_s=longest_s,
    buckets=(*buckets, longest) if longest > buckets[-1] else buckets,
  )


def out_folder(options: EvalConfig, folder: Path, name: str) -> Path:
  """Creates and returns the folder of results: eval.out, or eval/NAME in the run's folder.

  All processes must call it.

  Raises:
    ValueError: if eval.out is not set and the checkpoint `folder` is not in the folder of a run, or
      is the copy of one at a URL;
      if eval.out is a file or in a checkpoint, or holds packed data or a `text` that no evaluation
      wrote.
  """
  return Path(hosts.on_first(lambda: str(_out_folder(options, folder, name))))


def _out_folder(options: EvalConfig, folder: Path, name: str) -> Path:
  out = Path(options.out) if options.out else folder.parent / "eval" / name
  url = checkpoint.url_of(folder)
  if not options.out and (url or checkpoint.latest(folder.parent) is None):
    place = f"{url} is a URL" if url else f"{folder} is not in the folder of a run"
    raise ValueError(f"{place}; {_SET_OUT}")
  data_list, text, report = (out / name for name in ("data.list", "text", "report.json"))
  if options.out and (data_list.exists() or (text.exists() and not report.exists())):
    raise ValueError(
      f"eval.out={options.out} holds a data.list, or a `text` that would be overwritten by the"
      " hypotheses: set eval.out to another folder (or, if the `text` is from an evaluation that"
      " failed, remove it)"
    )
  if out.exists() and not out.is_dir():
    raise ValueError(f"eval.out={options.out}: is not a folder; choose another one")
  if inside := checkpoint.enclosing(out):
    raise ValueError(f"eval.out={options.out} is in the checkpoint {inside}; set another folder")
  out.mkdir(parents=True, exist_ok=True)
  return out


def decode_set(
  run: Run, options: EvalConfig, loaded: Loaded, *, lora_scale: float | None = None
) -> DecodingResults:
  """Decodes a test set in the order of its shards; prints the numbers of truncations.

  Each process decodes its share of the utterances, and all return the results of all.
  `lora_scale` is for a model whose LoRA was not merged; options.lora_scale is not read.
  """
  share, places, entries = _decode_share(run, options, loaded, lora_scale)
  if len(numbers := {*hosts.gather(entries)}) > 1:
    raise ValueError(
      f"the processes find {min(numbers)} to {max(numbers)} utterances in {options.shards}; make"
      " the same files readable on all hosts"
    )
  parts = hosts.gather([dataclasses.asdict(share), places])
  results = _join(parts)
  if not any(places for _, places in parts):  # a single process raises it while it reads
    first = results.skipped[0] if results.skipped else "it is empty"
    raise BadDataError(f"{options.shards}: no usable utterance; the first: {first}")
  if results.num_truncated:
    hosts.say(f"{results.num_truncated} clips were truncated to eval.max_s (eval.truncate)")
  if results.unfinished:
    hosts.say(f"{len(results.unfinished)} texts were truncated at generation.max_new_tokens")
  return results


def _join(parts: Sequence[tuple[dict[str, Any], dict[str, Sequence[int]]]]) -> DecodingResults:
  """The results of all processes, each with the places of its keys, in the order of the shards."""
  places = {key: tuple(place) for _, of in parts for key, place in of.items()}

  def joined(name: str) -> dict[str, str]:
    found = {key: value for results, _ in parts for key, value in results[name].items()}
    # What was skipped comes last, by its key.
    return dict(sorted(found.items(), key=lambda item: places.get(item[0], (math.inf, item[0]))))

  return DecodingResults(
    **{name: joined(name) for name in ("hypotheses", "transcripts", "tasks")},
    skipped=in_order(SkippedUtterance(**s) for results, _ in parts for s in results["skipped"]),
    audio_s=sum(results["audio_s"] for results, _ in parts),
    unfinished=sorted((k for r, _ in parts for k in r["unfinished"]), key=places.__getitem__),
    num_truncated=sum(results["num_truncated"] for results, _ in parts),
  )


def _decode_share(
  run: Run, options: EvalConfig, loaded: Loaded, lora_scale: float | None
) -> tuple[DecodingResults, dict[str, tuple[int, int]], int]:
  """Results of this process, places of its keys in the order of the shards, and entries read."""
  results, places, entries = DecodingResults(), dict[str, tuple[int, int]](), 0
  process = jax.process_index(), jax.process_count()
  made = batches_of(run, options, loaded, process=process)
  iterator = iter(made)
  # Without its batch, which would stay in memory as long as the result waits.
  batches = ((dataclasses.replace(host, batch=None), host.batch) for host in iterator)
  key = jax.random.key(run.seed)
  if process[1] > 1:
    key = jax.random.fold_in(key, process[0])
  outputs = decode_batches(
    loaded.params,
    batches,
    loaded.model,
    loaded.generation,
    key=key,
    prompt_slots=max(prompt_slots(shape, loaded.model) for shape in made.shapes),
    lora_scale=lora_scale,
    mesh=loaded.mesh,
  )
  progress = Progress(console=Console(stderr=True), disable=not hosts.is_first())
  with contextlib.closing(iterator), contextlib.closing(outputs), progress:
    bar = progress.add_task("decoding", total=None)
    for host, output in outputs:
      skipped = list(host.skipped)
      places |= dict(zip(host.keys, host.places))
      entries = host.entries
      results.transcripts |= dict(zip(host.keys, host.texts))
      results.transcripts |= {s.key: s.text for s in skipped if s.text}
      if not options.task:
        results.tasks |= dict(zip(host.keys, host.tasks))
        results.tasks |= {s.key: s.task for s in skipped if s.task}
      for row, key in enumerate(host.keys):
        if not math.isfinite(output.scores_B[row]):
          skipped.append(SkippedUtterance("scores not finite", key, "", NOT_FINITE))
          continue
        tokens = output.tokens_BS[row, : output.lengths_B[row]]
        results.hypotheses[key] = loaded.tokenizer.decode(tokens)
        if not output.finished_B[row]:
          results.unfinished.append(key)
      results.skipped += skipped
      results.audio_s += host.audio_s
      results.num_truncated += host.num_truncated
      done = len(results.hypotheses)
      progress.update(bar, completed=done, description=f"decoded {done} utterances")
  return results, places, entries
