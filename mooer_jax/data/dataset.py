"""Endless training batches and one-pass evaluation batches, as Grain datasets."""

import os
import signal
import sys
import zlib
from collections.abc import Sequence
from typing import Any

import grain
from absl import flags

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data import annotation
from mooer_jax.data.batches import Batcher, EvalIterator, HostBatch, TrainIterator
from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import Asker, Reader
from mooer_jax.data.feature_cache import EncodedCache
from mooer_jax.data.utterances import UtteranceStream, shard_names
from mooer_jax.speech_llm import Batch
from mooer_jax.text.tokenizer import Tokenizer


def train_batches(
  config: DataConfig,
  tokenizer: Tokenizer,
  model: SpeechLLMConfig,
  *,
  cache: EncodedCache | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> "Batches":
  """Endless stream of HostBatch, epoch after epoch in new orders; every batch is full.

  An epoch's remainder below a whole batch is completed with the next epoch's first utterances.
  Batches of all processes come in the same order of length, so that their buckets mostly agree.

  Args:
    config: see DataConfig.
    tokenizer: of the language model.
    model: its features, template and prompts.
    cache: with the encoders' frames of all clips, see `run.fill_feature_cache`.
    process_index: which of the processes (hosts) this is.
    process_count: each process reads every process_count-th shard.

  Returns:
    A dataset that knows its shapes and whose iterator has get_state() and set_state(); states are
    JSON-able dicts. Call close() on the iterator to end its workers or thread.

  Raises:
    FileNotFoundError, ValueError: for a bad list, too few shards, buckets too short, or tasks
      that the model has no prompt for.
  """
  asker = Asker(config, tokenizer, model)
  shards = _list(config, asker)
  streams = process_count * max(1, config.workers)
  if len(shards) < streams:
    raise ValueError(
      f"{config.shards}: {len(shards)} shards for {process_count} processes with data.workers="
      f"{config.workers}, but each of the {streams} streams needs a shard of its own; lower"
      " data.workers or pack again with fewer utterances a shard (--per-shard)"
    )
  batches = _TrainBatches(
    config,
    shards[process_index::process_count],
    Reader(config, tokenizer, model, asker, needs_answer=True, cache=cache),
    Batcher(config, model, asker, encoded=cache is not None),
  )
  return Batches(
    _ahead(batches, config, config.workers),
    _description(config, asker, shards, process_index, process_count),
    batches.batcher.shapes(),
  )


def eval_batches(
  config: DataConfig,
  tokenizer: Tokenizer,
  model: SpeechLLMConfig,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> "Batches":
  """One pass over the utterances as they lie in the shards; the last batch has padding rows.

  Each key is either in one batch's keys or in its `skipped`. A transcript that is empty, too long
  or not in the tokenizer's alphabet does not keep an utterance out: its answer is just padding.

  Arguments, result and errors as train_batches; at most one worker, which keeps the order.
  """
  asker = Asker(config, tokenizer, model)
  shards = _list(config, asker)
  if len(shards) < process_count:
    raise ValueError(
      f"{config.shards}: {len(shards)} shards for {process_count} processes; pack again with fewer"
      " utterances a shard (--per-shard) or evaluate with fewer processes"
    )
  batches = _EvalBatches(
    config,
    shards[process_index::process_count],
    Reader(config, tokenizer, model, asker, needs_answer=False),
    Batcher(config, model, asker),
  )
  return Batches(
    _ahead(batches, config, min(1, config.workers)),
    _description(config, asker, shards, process_index, process_count),
    batches.batcher.shapes(),
  )


def _list(config: DataConfig, asker: Asker) -> list[str]:
  """Shards, or parts of an annotation file, whose tasks are looked at before any is read."""
  names = shard_names(config.shards)
  if not annotation.is_annotation(config.shards):
    return names
  named = annotation.tasks(config.shards)
  if config.task and (other := sorted(named - {config.task})):
    raise ValueError(
      f"{config.shards} has the tasks {other}, but data.task={config.task!r} would ask all alike;"
      " set data.task='' (eval.task='') for each utterance's own"
    )
  if not config.task and (unknown := sorted(named - set(asker.tasks))):
    raise ValueError(
      f"{config.shards}: tasks {unknown} have no prompt; the model has {sorted(asker.tasks)}. It"
      " gets its prompts in training, from model.prompts and data.prompts"
    )
  if strange := sorted(set(config.task_weights) - named):
    raise ValueError(f"data.task_weights names {strange}, but {config.shards} has {sorted(named)}")
  return names


def _ahead(batches, config, workers) -> grain.IterDataset:
  if not workers:
    return grain.experimental.ThreadPrefetchIterDataset(
      batches, prefetch_buffer_size=config.prefetch
    )
  if not flags.FLAGS.is_parsed():  # Grain asks absl's flags, which a plain script never parses
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(
    num_workers=workers, per_worker_buffer_size=config.prefetch
  )
  return batches.mp_prefetch(options, worker_init_fn=_start_worker)


def _start_worker(index, count):
  """Keeps a worker off the GPU or TPU, which it would take from the training, and from Ctrl-C."""
  del index, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training stops in order and then ends it
  os.environ["JAX_PLATFORMS"] = "cpu"
  if "jax" in sys.modules:  # too late for the variable, early enough for the setting
    sys.modules["jax"].config.update("jax_platforms", "cpu")


def _description(config, asker, shards, process_index, process_count) -> dict[str, Any]:
  """What must be the same for a saved state to mean the same batches."""
  names = (
    "batch_size", "window", "seed", "workers", "min_s", "max_s", "cut_longer", "buckets",
    "answer_buckets", "task", "task_weights", "prompt_tokens",
  )  # fmt: skip
  settings = {f"data.{name}": getattr(config, name) for name in names}
  files = "\n".join(os.path.basename(shard) for shard in shards)
  return {
    **{name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()},
    "checksum of the prompts": asker.checksum,
    "shards in the list": len(shards),
    "checksum of their names": zlib.crc32(files.encode()),
    "process": [process_index, process_count],
  }


class _Batches(grain.IterDataset):
  """What both kinds of batches are made from; Grain slices it between workers."""

  def __init__(self, config: DataConfig, shards: list[str], reader: Reader, batcher: Batcher):
    super().__init__()
    self.config, self.shards = config, shards
    self.reader, self.batcher = reader, batcher

  def set_slice(self, sl: slice, sequential_slice: bool = False):
    """Called by mp_prefetch in each worker, which then owns these shards."""
    assert not sequential_slice
    self.shards = self.shards[sl]

  def stream(self, seed: int | None) -> UtteranceStream:
    return UtteranceStream(
      self.shards,
      self.reader,
      seed=seed,
      max_bad_share=self.config.max_bad_share,
      tolerance=self.config.tolerance,
      task_weights=None if seed is None else self.config.task_weights,
    )


class _TrainBatches(_Batches):
  def __iter__(self) -> grain.DatasetIterator[HostBatch]:
    return TrainIterator(self.config, self.batcher, self.stream(self.config.seed))


class _EvalBatches(_Batches):
  def __iter__(self) -> grain.DatasetIterator[HostBatch]:
    return EvalIterator(self.config, self.batcher, self.stream(None))


class Batches(grain.IterDataset):
  """Batches of a few shapes, whose iterators have states that belong to them alone.

  Each state says what it is of, and the state of another pipeline is refused.

  Attributes:
    shapes: all that a batch can have, as `ShapeDtypeStruct`s, the largest first.
  """

  def __init__(
    self, parent: grain.IterDataset, description: dict[str, Any], shapes: Sequence[Batch]
  ):
    super().__init__(parent)
    self._description, self.shapes = description, tuple(shapes)

  def __iter__(self) -> grain.DatasetIterator[HostBatch]:
    return _DescribedIterator(iter(self.parents[0]), self._description)


class _DescribedIterator(grain.DatasetIterator):
  def __init__(self, parent: grain.DatasetIterator, description: dict[str, Any]):
    super().__init__(parent)
    self._inner, self._description = parent, description

  def __next__(self) -> HostBatch:
    return next(self._inner)

  def get_state(self) -> dict[str, Any]:
    return {"of": self._description, "reader": self._inner.get_state()}

  def set_state(self, state: dict[str, Any]):
    changed = [
      f"{name} was {state['of'].get(name)!r} and is {value!r}"
      for name, value in self._description.items()
      # A state of version 0.1 lacks what it did not know of yet.
      if name in state["of"] and state["of"][name] != value
    ]
    if changed:
      raise ValueError(
        f"the saved data position belongs to other settings: {'; '.join(changed)}; set them back,"
        " or start without the data position"
      )
    self._inner.set_state(state["reader"])
