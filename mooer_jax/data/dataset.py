"""Endless training batches and one-pass evaluation batches, as Grain datasets."""

import dataclasses
import os
import signal
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
from absl import flags

from mooer_jax import storage
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.augment import Augmentation, AugmentConfig
from mooer_jax.data.batches import Batcher, EvalIterator, HostBatch, TrainIterator, join
from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import Preprocessor, PromptSampler
from mooer_jax.data.feature_cache import EncodedCache
from mooer_jax.data.labels import LabelFile, LabelOptions, Labels, check_prompts, describe
from mooer_jax.data.mixture import MixedStream
from mooer_jax.data.readers import file_of, utterance_names
from mooer_jax.data.sources import Source, find_shards
from mooer_jax.data.targets import Targets
from mooer_jax.data.targets import describe as describe_targets
from mooer_jax.data.utterances import BadDataError, UtteranceStream
from mooer_jax.data.workers import end_with_parent
from mooer_jax.speech_llm import Batch
from mooer_jax.text.tokenizer import Tokenizer


def train_batches(
  config: DataConfig,
  tokenizer: Tokenizer,
  model: SpeechLLMConfig,
  *,
  cache: EncodedCache | None = None,
  process: tuple[int, int] = (0, 1),
) -> "Batches":
  """Endless stream of HostBatch, epoch after epoch in new orders; every batch is full.

  An epoch's remainder below a full batch is completed with the next epoch's first utterances. The
  data sets of a mixture have epochs of their own.
  Batches of all processes come in the same order of length, so their buckets mostly agree.

  Args:
    config: shards, augmentation, batches and limits.
    tokenizer, model: of the speech LLM; the model determines features, template and prompts.
    cache: frames of the encoders for all clips, see `run.fill_feature_cache`.
    process: index of this process (host) and their number; the streams of the data are shared
      among them in equal parts.

  Returns:
    A dataset that knows its shapes. Its iterator has get_state() and set_state(), whose states are
    JSON-able dicts, and close(), which ends its workers or thread.

  Raises:
    FileNotFoundError, ValueError: for a bad list, too few shards, buckets too short, tasks for
      which the model has no prompt, recordings that cannot be mixed into clips, or recordings of
      answers that the model cannot speak.
  """
  return _pipeline(config, tokenizer, model, endless=True, process=process, cache=cache)


def eval_batches(
  config: DataConfig,
  tokenizer: Tokenizer,
  model: SpeechLLMConfig,
  *,
  process: tuple[int, int] = (0, 1),
) -> "Batches":
  """One pass over the utterances in the order of the shards; the last batch has padding rows.

  Each key is either in one batch's keys or in its `skipped`. An utterance whose transcript is
  empty, too long or not in the tokenizer's alphabet is kept; its labels are padding. Nothing is
  augmented.

  Args:
    config, tokenizer, model: as in `train_batches`, but for a mixture; there is at most one worker,
      which keeps the order. Each process has batches of config.batch_size.
    process: index of this process and their number n; each gets every nth utterance.

  Returns, Raises:
    As `train_batches`.
  """
  if config.mixture:
    raise ValueError(
      f"data.mixture ({', '.join(config.mixture)}) is for training; to evaluate one of its data"
      " sets, name it in data.shards and set data.mixture={}"
    )
  return _pipeline(config, tokenizer, model, endless=False, process=process)


def _pipeline(
  config: DataConfig,
  tokenizer: Tokenizer,
  model: SpeechLLMConfig,
  *,
  endless: bool,
  process: tuple[int, int],
  cache: EncodedCache | None = None,
) -> "Batches":
  sampler = PromptSampler(config, tokenizer, model)
  shards: dict[Source, Sequence[str]] = {**find_shards(config, sampler.tasks)}
  # A single pass has one stream, of which each process reads its share.
  index, count = process if endless else (0, 1)
  workers = config.workers if endless else min(1, config.workers)
  streams = (config.streams if endless else 0) or count
  _check_streams(config, streams, count)
  description = _description(config, sampler, shards, streams=streams)
  if endless:
    shards = {source: utterance_names(source.shards) or of for source, of in shards.items()}
  for source, names in shards.items():
    if len(names) < streams * max(1, workers):
      raise ValueError(
        f"{source.shards}: {len(names)} shards for {streams} streams with data.workers={workers},"
        " but each worker needs a shard of its own; lower data.workers or data.streams, run fewer"
        " processes, or pack again with fewer utterances a shard (--per-shard)"
      )
  of_stream = dataclasses.replace(
    config,
    batch_size=config.batch_size // streams,
    shuffle_buffer_size=config.shuffle_buffer_size // streams,
  )
  augment = config.augment if endless else AugmentConfig()
  augmentation = Augmentation.load(augment, model, seed=config.seed)
  targets = Targets.load(config, tokenizer, model) if endless and config.target_audio else None
  preprocess = Preprocessor(
    config,
    tokenizer,
    model,
    sampler,
    needs_labels=endless,
    cache=cache,
    augmentation=augmentation,
    targets=targets,
  )
  labels = {source: _labels(source.labels, sampler) for source in shards}

  def batcher(config: DataConfig) -> Batcher:
    return Batcher(
      config, model, sampler.lengths, encoded=cache is not None, targets=targets is not None
    )

  own = {
    stream: _prefetch(
      _Batches(
        {source: names[stream::streams] for source, names in shards.items()},
        {source: dataclasses.replace(preprocess, labels=of) for source, of in labels.items()},
        batcher(of_stream),
        of_stream,
        share=None if endless else process,
      ),
      workers,
    )
    for stream in range(index * streams // count, (index + 1) * streams // count)
  }
  description["data.augment"] = augmentation.description()
  return Batches(own, description, batcher(config).shapes())


def _check_streams(config: DataConfig, streams: int, processes: int) -> None:
  """Raises ValueError unless every process has whole streams, and every stream whole batches."""
  if streams % processes:
    raise ValueError(
      f"data.streams={streams} is not divisible by the {processes} processes; set it to a multiple"
    )
  for name in ("batch_size", "shuffle_buffer_size"):
    if (value := getattr(config, name)) % streams:
      raise ValueError(f"data.{name}={value} is not divisible by the {streams} streams of the data")


def _labels(options: LabelOptions, sampler: PromptSampler) -> Labels | None:
  if not options.file:
    return None
  if options.mode == "instruction":
    check_prompts(sampler.prompts)
  return Labels(LabelFile(options.file), options.mode, options.separator)


def _description(
  config: DataConfig,
  sampler: PromptSampler,
  shards_of: Mapping[Source, Sequence[str]],
  *,
  streams: int,
) -> dict[str, Any]:
  """The settings that must be equal for a saved state to mean the same batches."""
  shards = [shard for names in shards_of.values() for shard in names]
  names = (
    "batch_size", "shuffle_buffer_size", "seed", "workers", "min_s", "max_s", "truncate", "buckets",
    "answer_buckets", "task", "task_weights", "prompt_tokens", "filter",
  )  # fmt: skip
  old = {new: old for old, new in DataConfig.RENAMED.items()}  # states of version 0.1 have these
  settings = {f"data.{old.get(name, name)}": getattr(config, name) for name in names}
  names_of_shards = "\n".join(os.path.basename(shard) for shard in shards)
  files = {*map(file_of, shards)}
  return {
    **{name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()},
    "checksum of the prompts": sampler.checksum,
    "shards in the list": len(shards),
    "checksum of their names": zlib.crc32(names_of_shards.encode()),
    "bytes in the shards": sum(storage.sizes(files).values()),
    "data.streams": streams,
    "data.labels": describe(config.labels, config.labels_mode, config.labels_separator),
    "data.target_audio": describe_targets(config),
    "data.mixture": {
      source.name: {
        "weight": source.weight,
        "task": source.task,
        "filter": source.filter.text,
        "shards": len(names),
        # Early states have none.
        **({"labels": describe(*source.labels)} if source.labels.file else {}),
      }
      for source, names in shards_of.items()
      if source.name
    },
  }


def _by_name(description: Mapping[str, Any]) -> dict[str, Any]:
  """A description with each setting of data.augment by itself; without any, all are unset."""
  augment = Augmentation().description() | description.get("data.augment", {})
  named = {f"data.augment.{name}": value for name, value in augment.items()}
  return {name: value for name, value in description.items() if name != "data.augment"} | named


class _Batches(grain.IterDataset):
  def __init__(
    self,
    shards: Mapping[Source, Sequence[str]],
    preprocess: Mapping[Source, Preprocessor],
    batcher: Batcher,
    config: DataConfig,
    *,
    share: tuple[int, int] | None,
  ):
    """Endless without a `share` of a single pass."""
    super().__init__()
    self.config, self.shards, self.share = config, shards, share
    self.preprocess, self.batcher = preprocess, batcher

  def set_slice(self, sl: slice, sequential_slice: bool = False):
    """Called by mp_prefetch in each worker, which then owns these shards."""
    assert not sequential_slice
    self.shards = {source: names[sl] for source, names in self.shards.items()}

  def __iter__(self) -> grain.DatasetIterator[HostBatch]:
    weights = sum(source.weight for source in self.shards)
    streams = [
      UtteranceStream(
        names,
        self.preprocess[source],
        self.config,
        share=self.share,
        source=source,
        rows=self.config.batch_size * source.weight / weights,
      )
      for source, names in self.shards.items()
    ]
    if self.share:
      return EvalIterator(self.config, self.batcher, streams[0])
    mixed = MixedStream(streams, [source.weight for source in self.shards])
    stream = mixed if self.config.mixture else streams[0]
    return TrainIterator(self.config, self.batcher, stream)


def _prefetch(batches: _Batches, workers: int) -> grain.IterDataset:
  ahead = batches.config.prefetch
  if not workers:
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=ahead)
  if not flags.FLAGS.is_parsed():  # Grain reads absl's flags, which a plain script never parses
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
  return batches.mp_prefetch(options, worker_init_fn=_start_worker)


def _start_worker(index, count):
  """Keeps a worker off the GPU or TPU, which the training needs, and off Ctrl-C.

  Grain's workers would outlive a training that is killed.
  """
  del index, count
  end_with_parent()
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training stops in order and then ends it
  os.environ["JAX_PLATFORMS"] = "cpu"
  if "jax" in sys.modules:  # too late for the variable, early enough for the setting
    sys.modules["jax"].config.update("jax_platforms", "cpu")


class Batches(grain.IterDataset):
  """Batches of a few known `shapes`; iterators refuse the saved state of other settings.

  A batch has rows of each stream of this process. `shapes` are those of all processes together.
  """

  def __init__(
    self,
    streams: Mapping[int, grain.IterDataset],
    description: dict[str, Any],
    shapes: Sequence[Batch],
  ):
    super().__init__([*streams.values()])
    self._numbers = [*streams]
    self._description, self.shapes = description, tuple(shapes)

  def __iter__(self) -> grain.DatasetIterator[HostBatch]:
    streams = {str(n): iter(parent) for n, parent in zip(self._numbers, self.parents, strict=True)}
    return _DescribedIterator(streams, self._description)


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The states of the iterators of all processes in one, for `set_state` of any of them."""
  merged = dict(states[0])
  if "streams" in merged:
    merged["streams"] = {number: s for state in states for number, s in state["streams"].items()}
  return merged


class _DescribedIterator(grain.DatasetIterator):
  def __init__(self, streams: dict[str, grain.DatasetIterator], description: dict[str, Any]):
    super().__init__([*streams.values()])
    self._streams, self._description = streams, description

  def __next__(self) -> HostBatch:
    parts: list[HostBatch] = []
    try:
      for stream in self._streams.values():
        parts.append(next(stream))
    except BadDataError as error:
      error.skipped = (*(s for part in parts for s in part.skipped), *error.skipped)
      raise
    return join(parts)

  def get_state(self) -> dict[str, Any]:
    streams = {number: stream.get_state() for number, stream in self._streams.items()}
    return {"of": self._description, "streams": streams}

  def set_state(self, state: dict[str, Any]):
    try:
      # Early states lack some names.
      added = {"data.streams": 1, "data.filter": "", "data.labels": "", "data.mixture": {}}
      saved = _by_name({**added, **state["of"]})
      changed = [
        f"{name} was {saved[name]!r} and is {value!r}"
        for name, value in _by_name(self._description).items()
        if saved.get(name, value) != value
      ]
      if changed:
        raise ValueError(
          f"the saved data position belongs to other settings: {'; '.join(changed)}; set them back,"
          " or start another run with init_from"
        )
      # A state of earlier versions is of one stream.
      of_stream = state["streams"] if "streams" in state else {"0": state["reader"]}
      for number, stream in self._streams.items():
        stream.set_state(of_stream[number])
    except (AttributeError, IndexError, KeyError, TypeError) as error:
      raise ValueError(
        f"the saved data position is damaged ({type(error).__name__}: {error}); restore its file,"
        " or resume from another checkpoint"
      ) from error
