"""Utterances from shards, endless or once through, with a position that can be restored."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import Example, num_copies
from mooer_jax.data.readers import read
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance
from mooer_jax.data.readers.prepared import Utterances
from mooer_jax.data.sources import Source, list_sources
from mooer_jax.files import LFS_REMEDY, is_lfs_pointer

Entries = Iterator[RawUtterance | SkippedUtterance]

_COPIES_PER_EPOCH = 1000  # for which version 0.1 numbered readings
# Of random access, whose latency threads hide; the buffer holds encoded audio.
_READ_AHEAD = grain.ReadOptions(num_threads=16, prefetch_buffer_size=64)


class BadDataError(ValueError):
  """Too much of the data cannot be used.

  `skipped` are the utterances that no batch has reported, with several workers only those of the
  worker that stopped.
  """

  skipped: tuple[SkippedUtterance, ...] = ()


@dataclasses.dataclass(frozen=True)
class Position:
  """Place of the next reading in an `UtteranceStream`, and the counts up to it."""

  epoch: int = 0
  shard: int = 0  # place in the epoch's order of shards
  entry: int = 0  # number of the utterance in the shard
  copy: int = 0  # number of the reading of this utterance in the epoch
  read: int = 0  # utterances read so far, usable or not
  usable: int = 0  # usable utterances of this epoch
  passed: bool = False  # whether a task weight below 1 left an utterance out of this epoch
  read_before: int = 0  # utterances read before this epoch
  left_out: int = 0  # readings that data.filter has left out so far
  skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)  # number by cause
  damaged: tuple[int, ...] = ()  # indices of the damaged shards of this epoch

  @classmethod
  def from_json(cls, saved: Mapping[str, Any]) -> "Position":
    """The inverse of `dataclasses.asdict`; early positions lack copy, passed and read_before."""
    return cls(**{**saved, "damaged": tuple(saved["damaged"])})

  def add_skipped(self, cause: str, shard: int) -> "Position":
    return dataclasses.replace(
      self,
      read=self.read + 1,
      skipped={**self.skipped, cause: self.skipped.get(cause, 0) + 1},
      damaged=(*self.damaged, shard) if cause == "bad shard" else self.damaged,
    )

  def next_epoch(self) -> "Position":
    return Position(
      self.epoch + 1,
      read=self.read,
      read_before=self.read,
      left_out=self.left_out,
      skipped=self.skipped,
    )


class Reading(NamedTuple):
  """A step of `EpochReader`."""

  entry: RawUtterance | SkippedUtterance | None  # None at the end of a shard
  copy: int | None  # number of this reading in the epoch; None if a task weight leaves it out
  after: tuple[int, int, int]  # shard, entry and copy of the `Position` behind it
  size: int = 0  # at the end of a shard: the number of its entries


@dataclasses.dataclass(frozen=True)
class EpochReader:
  """Reads the shards of one epoch.

  Attributes:
    shards: names that `readers.read` reads; `Utterances` are read ahead.
    seed: seed of the order of the shards; None reads them as listed, and each key once.
    task_weights: mean number of readings of an utterance in an epoch, by task; default: 1.
    task: task of all utterances, in place of their own; "": their own.
    share: (i, n) of a process: without a seed, it gets every nth entry, from the ith on.
  """

  shards: Sequence[str]
  epoch: int
  seed: int | None
  task_weights: Mapping[str, float]
  task: str = ""
  share: tuple[int, int] = (0, 1)

  @functools.cached_property
  def order(self) -> Sequence[int]:
    """Indices of the shards in the order in which this epoch reads them."""
    if self.seed is None:
      return range(len(self.shards))
    # 0: a stream apart from the one that shuffles windows with the same seed
    seeds = [self.seed, 0, self.epoch]
    if not isinstance(self.shards, Utterances):
      return np.random.default_rng(seeds).permutation(len(self.shards)).tolist()
    # Grain computes a place when it is needed. `start` differs between streams and workers: in one
    # order, all of them would read neighbouring utterances at the same time.
    rng = np.random.default_rng([*seeds, self.shards.indices.start])
    return grain.MapDataset.range(len(self.shards)).shuffle(seed=int(rng.integers(2**32)))

  def read_from(self, shard: int, entry: int, copy: int) -> Generator[Reading]:
    """Yields the readings from a place on; closing the generator closes the open shard."""
    keys: set[str] = set()
    index_of_process, processes = self.share
    start = 0 if self.seed is None else shard
    with contextlib.closing(self._open_from(start)) as opened:
      for place, stored in enumerate(opened, start):
        entries, size = self._distinct(stored, keys), entry
        if place < shard:
          collections.deque(entries, maxlen=0)  # only for their keys
          continue
        for number, raw in enumerate(itertools.islice(entries, entry, None), entry):
          size = number + 1
          if (place + number) % processes != index_of_process:
            continue
          copies = 1
          if self.task_weights and isinstance(raw, RawUtterance):
            weights, seed = self.task_weights, self.seed or 0
            copies = num_copies(raw.task, weights, seed=seed, epoch=self.epoch, key=raw.key)
          if not copies:
            yield Reading(raw, None, (place, number + 1, 0))
          for index in range(copy, copies):
            last = index + 1 == copies
            yield Reading(raw, index, (place, number + last, 0 if last else index + 1))
          copy = 0
        entry = 0
        yield Reading(None, None, (place + 1, 0, 0), size)

  def _open_from(self, start: int) -> Generator[Entries]:
    """Yields the entries of each shard from a place on, open until the next one."""
    if isinstance(order := self.order, grain.MapDataset):
      assert isinstance(self.shards, Utterances)
      self.shards.open()
      shards = order[start:].map(lambda index: [*read(self.shards[index])])
      with contextlib.closing(iter(shards.to_iter_dataset(_READ_AHEAD))) as ahead:
        yield from map(iter, ahead)
    else:
      for index in self.order[start:]:
        with contextlib.closing(read(self.shards[index])) as entries:
          yield entries

  def _distinct(self, entries: Entries, keys: set[str]) -> Entries:
    """The entries of a shard; of a single pass, each key once, and those are added to `keys`."""
    for entry in entries:
      if self.task:
        entry = dataclasses.replace(entry, task=self.task)
      if self.seed is None and entry.key:
        problem = entry.cause if isinstance(entry, SkippedUtterance) else ""
        if entry.key in keys and problem not in ("members apart", "bad shard"):
          entry = SkippedUtterance("duplicate key", entry.key, entry.shard)
        keys.add(entry.key)
      yield entry


class UtteranceStream:
  """Iterates over the usable utterances of some shards.

  Skipped utterances are counted and returned with the next usable one. A stream that seeks a
  position continues exactly as the stream from which the position was taken.
  """

  def __init__(
    self,
    shards: Sequence[str],
    preprocess: Callable[[RawUtterance, int | str], Example | SkippedUtterance],
    config: DataConfig,
    *,
    share: tuple[int, int] | None,
    source: Source | None = None,
    rows: float = 0,
  ):
    """Starts at the first utterance.

    Args:
      shards: names that `readers.read` reads.
      preprocess: makes an example of a raw utterance and the identifier of its reading.
      config: seed, weights of the tasks, and limits of unusable data.
      share: that of a process in a single pass, as of `EpochReader`; None: epoch follows epoch in
        new orders, and these shards are read whole.
      source: the data set of a mixture; default: the only one of the config.
      rows: of a batch that are taken from this stream. If an epoch has fewer utterances, a line is
        printed once.
    """
    self._rows = rows
    self._shards, self._preprocess, self._config = shards, preprocess, config
    self._seed, self._share_of = (config.seed if share is None else None), share or (0, 1)
    self._task_weights = config.task_weights if share is None else {}
    if source is None:
      (source,) = list_sources(config)
    self._source = source
    self.seek(Position())

  def restore(self, saved: Mapping[str, Any]) -> None:
    """Continues from a position in the form of `dataclasses.asdict`."""
    self.seek(Position.from_json(saved))

  def seek(self, position: Position) -> None:
    self._pending: list[SkippedUtterance] = []
    self._peeked: tuple[Example, Position] | None = None
    self.entries = 0  # of all processes, in the shards that were read to their ends
    self._start_reading(position)

  @property
  def position(self) -> Position:
    """Where the next utterance starts, and the skipped ones before it."""
    if self._peeked is not None:
      return self._peeked[1]
    assert not self._pending, "positions are taken between utterances"
    return self._position

  def peek(self) -> Example:
    """Returns the next utterance without taking it; raises as `take`."""
    if self._peeked is None:
      before = self.position
      self._peeked = (self._advance(), before)
    return self._peeked[0]

  def take(self) -> Example:
    """Returns the next utterance; raises StopIteration after the last one of a single pass.

    Raises:
      BadDataError: if more than the allowed share of utterances was skipped or of shards is
        damaged, or an epoch had no usable utterance.
    """
    example = self.peek()
    self._peeked = None
    return example

  def close(self) -> None:
    self._readings.close()

  def left_over(self) -> tuple[SkippedUtterance, ...]:
    """Utterances skipped since the last usable one; at the end, those behind it."""
    left, self._pending = tuple(self._pending), []
    return left

  def _start_reading(self, position: Position) -> None:
    self._position = position
    options = self._seed, self._task_weights, self._source.task, self._share_of
    self._epoch = EpochReader(self._shards, position.epoch, *options)
    self._readings = self._epoch.read_from(position.shard, position.entry, position.copy)

  def _advance(self) -> Example:
    while True:
      reading = next(self._readings, None)
      if reading is None:
        self._end_epoch()
        continue
      shard, entry, copy = reading.after
      here = dataclasses.replace(self._position, shard=shard, entry=entry, copy=copy)
      self._position = here
      if reading.entry is None:
        self.entries += reading.size
        self._check_shards()
      elif reading.copy is None:
        # Unless its task's weight is 0, another epoch reads it.
        passed = here.passed or self._task_weights[reading.entry.task] > 0
        self._position = dataclasses.replace(here, passed=passed)
      elif (raw := self._source.filter.select(reading.entry)) is None:
        self._position = dataclasses.replace(here, left_out=here.left_out + 1)
      else:
        # One pass takes the same prompts whenever it runs.
        identifier = 0 if self._seed is None else reading_id(here.epoch, reading.copy)
        made = raw if isinstance(raw, SkippedUtterance) else self._preprocess(raw, identifier)
        if isinstance(made, Example):
          self._position = dataclasses.replace(here, read=here.read + 1, usable=here.usable + 1)
          place = (shard, entry - (not copy))
          return dataclasses.replace(made, epoch=here.epoch, place=place, skipped=self.left_over())
        self._pending.append(made)
        self._position = here.add_skipped(made.cause, self._epoch.order[shard])
        self._check_share(self._config.tolerance)

  def _end_epoch(self) -> None:
    here = self._position
    idle = here.passed and here.read == here.read_before
    # Another process may have usable ones.
    if not here.usable and not idle and self._share_of == (0, 1):
      raise self._error(f"no usable utterance in {len(self._shards)} shards: {self._summary()}")
    self._check_share(1)
    if self._seed is None:
      raise StopIteration
    if not idle and here.usable < self._rows:
      print(
        f"{self._source.shards}: one batch takes {self._rows / here.usable:.1f} epochs: its"
        f" {self._rows:g} rows are more than the usable utterances, {here.usable} in"
        f" {len(self._shards)} of its shards; lower data.batch_size, or name more data",
        file=sys.stderr,
        flush=True,
      )
      self._rows = 0
    self._start_reading(here.next_epoch())

  def _check_shards(self) -> None:
    """Raises BadDataError if too many of the shards of the epoch that were read are damaged."""
    damaged, read, share = self._position.damaged, self._position.shard, self._config.max_bad_share
    if len(damaged) > share * read and (read >= 2 or read == len(self._shards)):
      more = ", …" if len(damaged) > 5 else ""
      paths = [self._shards[i] for i in damaged[:5]]
      remedy = f"copy or pack them again, or raise data.max_bad_share={share}"
      if any(os.path.isfile(path) and is_lfs_pointer(path) for path in paths):
        remedy = f"there is {LFS_REMEDY}"
      raise self._error(
        f"{len(damaged)} of {read} shards read are truncated or damaged: {', '.join(paths)}{more};"
        f" {remedy}"
      )

  def _check_share(self, least_read: int) -> None:
    """Raises BadDataError if too many utterances were skipped, once `least_read` were read."""
    read, share = self._position.read, self._config.max_bad_share
    bad = sum(self._position.skipped.values())
    if read >= least_read and bad > share * read:
      raise self._error(
        f"{bad} of {read} utterances cannot be used: {self._summary()}; repair the data or raise"
        f" data.max_bad_share={share}"
      )

  def _error(self, message: str) -> BadDataError:
    name = self._source.name
    return BadDataError(f"{name}: {message}" if name else message)

  def _summary(self) -> str:
    skipped = sorted(self._position.skipped.items(), key=lambda item: -item[1])
    counts = ", ".join(f"{cause} {n}" for cause, n in skipped)
    if self._pending:
      last = self._pending[-1]
      why = f"{last.cause}: {last.detail}" if last.detail else last.cause
      return f"{counts} (last: {last.key or 'no key'} in {last.shard}: {why})"
    weights = self._config.task_weights
    if self._position.left_out:
      left_out = f"{self._source.filter} leaves out {self._position.left_out}"
      few = "; if others have some, lower data.streams or data.workers, or name less data"
      return f"{left_out}, {counts}" if counts else left_out + few
    if weights and not counts:
      return f"they are empty, or data.task_weights={weights} leaves nothing of them"
    return counts or "the shards are empty"


def reading_id(epoch: int, copy: int) -> int | str:
  """Identifies a reading of an utterance; with the key, it determines which prompt is sampled."""
  if copy < _COPIES_PER_EPOCH:
    return _COPIES_PER_EPOCH * epoch + copy
  return f"{epoch}.{copy}"  # a number would be that of a later epoch
