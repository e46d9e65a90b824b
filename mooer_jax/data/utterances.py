"""Utterances from shards, endless or once through, with a position that can be restored."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np

from mooer_jax.data import annotation
from mooer_jax.data.examples import Example, copies
from mooer_jax.data.shards import RawUtterance, Skip, read_list, read_shard


def shard_names(shards: str) -> list[str]:
  """The shards of a `data.list`, or the parts of an annotation file (`.json`).

  Raises:
    FileNotFoundError, ValueError: as `read_list` and `annotation.pieces`.
  """
  return annotation.pieces(shards) if annotation.is_annotation(shards) else read_list(shards)


def read(name: str) -> Generator[RawUtterance | Skip]:
  """The utterances of a shard or part, in order, each either whole or as a Skip."""
  return annotation.read_piece(name) if annotation.is_piece(name) else read_shard(name)


class BadDataError(ValueError):
  """Too much of the data cannot be used."""


class UtteranceStream:
  """Iterates over the usable utterances of some shards.

  What has to be left out is counted and handed over with the next utterance. Positions are small
  JSON-able dicts; a stream sent to a position goes on exactly as the one that it was taken from.
  """

  def __init__(
    self,
    shards: Sequence[str],
    reader: Callable[[RawUtterance, int], Example | Skip],
    *,
    seed: int | None,
    max_bad_share: float,
    tolerance: int,
    task_weights: Mapping[str, float] | None = None,
  ):
    """Starts at the first utterance.

    Args:
      shards: tar paths.
      reader: makes examples of raw utterances.
      seed: of the order of the shards in each epoch; None reads them once, as listed, and takes
        a key that another shard had already for a duplicate.
      max_bad_share: largest share of skipped utterances, and of damaged shards in an epoch, since
        nobody knows how many utterances a damaged shard has lost.
      tolerance: utterances read before that is applied to them; for shards it is two, or all.
      task_weights: how often an utterance of a task is read in an epoch; default: once.
    """
    self._shards = list(shards)
    self._reader = reader
    self._seed = seed
    self._max_bad_share = max_bad_share
    self._tolerance = tolerance
    self._task_weights = task_weights or {}
    start = {"epoch": 0, "shard": 0, "entry": 0, "copy": 0, "read": 0, "usable": 0}
    self.seek({**start, "skipped": {}, "damaged": []})

  def seek(self, position: dict):
    """Goes to what `position()` returned."""
    self._epoch, self._shard = position["epoch"], position["shard"]
    self._entry, self._copy = position["entry"], position.get("copy", 0)
    self._raw: RawUtterance | Skip | None = None
    self._read, self._usable = position["read"], position["usable"]
    # What an epoch's weights passed over, and what had been read before it.
    self._passed = position.get("passed", False)
    self._read_before = position.get("read_before", 0)
    self._counts = collections.Counter(position["skipped"])
    self._damaged = list(position["damaged"])  # indices of shards, in this epoch
    self._pending: list[Skip] = []
    self._peeked: tuple[Example, dict] | None = None
    self._order = self._shard_order()
    self._entries: Generator[RawUtterance | Skip] | None = None
    self._keys: set[str] = set()
    if self._seed is None:
      for index in self._order[: self._shard]:
        self._keys.update(e.key for e in read(self._shards[index]) if e.key)

  def position(self) -> dict:
    """Where the next utterance (with the skips before it) starts."""
    if self._peeked is not None:
      return self._peeked[1]
    assert not self._pending, "positions are taken between utterances"
    return {
      "epoch": self._epoch,
      "shard": self._shard,
      "entry": self._entry,
      "copy": self._copy,
      "read": self._read,
      "usable": self._usable,
      "passed": self._passed,
      "read_before": self._read_before,
      "skipped": dict(self._counts),
      "damaged": list(self._damaged),
    }

  def peek(self) -> Example:
    """Returns the next utterance without taking it.

    Raises:
      StopIteration, BadDataError: as `take`.
    """
    if self._peeked is None:
      before = self.position()
      self._peeked = (self._advance(), before)
    return self._peeked[0]

  def take(self) -> Example:
    """Returns the next utterance.

    Raises:
      StopIteration: after the last one, if the shards are read once.
      BadDataError: if more than the allowed share was skipped or of the shards is damaged, or an
        epoch had nothing usable.
    """
    example = self.peek()
    self._peeked = None
    return example

  def close(self):
    """Closes the shard that is being read."""
    if self._entries is not None:
      self._entries.close()

  def left_over(self) -> tuple[Skip, ...]:
    """What was left out after the last utterance; known once StopIteration was raised."""
    left, self._pending = tuple(self._pending), []
    return left

  def _advance(self) -> Example:
    while True:
      if self._shard == len(self._order):
        self._end_epoch()
      if self._entries is None:
        self._entries = self._open()
      if self._raw is None:
        self._raw = next(self._entries, None)
      entry, copy = self._raw, self._copy
      if entry is None:
        self._shard, self._entry, self._entries = self._shard + 1, 0, None
        self._check_shards()
        continue
      if copy + 1 < self._copies(entry):
        self._copy += 1
      else:
        self._entry, self._copy, self._raw = self._entry + 1, 0, None
      if copy >= self._copies(entry):
        # Its task's weight is below 1; unless it is 0, another epoch will read it.
        self._passed = self._passed or self._task_weights[entry.task] > 0
        continue
      self._read += 1
      if isinstance(entry, Skip) and entry.cause == "bad shard":
        self._damaged.append(self._order[self._shard])
      made = self._make(entry, copy)
      if isinstance(made, Example):
        self._usable += 1
        skipped, self._pending = tuple(self._pending), []
        return dataclasses.replace(made, epoch=self._epoch, skipped=skipped)
      self._pending.append(made)
      self._counts[made.cause] += 1
      self._check_share(self._tolerance)

  def _copies(self, entry: RawUtterance | Skip) -> int:
    if isinstance(entry, Skip) or not self._task_weights:
      return 1
    return copies(entry.task, self._task_weights, self._seed or 0, self._epoch, entry.key)

  def _make(self, entry: RawUtterance | Skip, copy: int) -> Example | Skip:
    if self._seed is None and entry.key:
      if entry.key in self._keys:
        return Skip("duplicate key", entry.key, entry.shard)
      self._keys.add(entry.key)
    if isinstance(entry, Skip):
      return entry
    # Evaluation reads once and asks the same whenever it runs.
    made = self._reader(entry, 0 if self._seed is None else 1000 * self._epoch + copy)
    return dataclasses.replace(made, task=entry.task) if isinstance(made, Skip) else made

  def _open(self) -> Generator[RawUtterance | Skip]:
    """Opens the current shard behind the entries that were taken already."""
    entries = read(self._shards[self._order[self._shard]])
    for passed in itertools.islice(entries, self._entry):
      if self._seed is None:
        self._keys.add(passed.key)
    return entries

  def _end_epoch(self):
    idle = self._passed and self._read == self._read_before
    if not self._usable and not idle:
      raise BadDataError(f"no usable utterance in {len(self._shards)} shards: {self._summary()}")
    self._check_share(1)
    if self._seed is None:
      raise StopIteration
    self._epoch, self._shard, self._entry, self._usable = self._epoch + 1, 0, 0, 0
    self._passed, self._read_before = False, self._read
    self._damaged = []
    self._order = self._shard_order()

  def _shard_order(self) -> list[int]:
    if self._seed is None:
      return list(range(len(self._shards)))
    # 0: apart from the numbers that shuffle windows with the same seed
    rng = np.random.default_rng([self._seed, 0, self._epoch])
    return rng.permutation(len(self._shards)).tolist()

  def _check_share(self, least_read):
    bad = self._counts.total()
    if self._read >= least_read and bad > self._max_bad_share * self._read:
      raise BadDataError(
        f"{bad} of {self._read} utterances cannot be used: {self._summary()}; repair the data or"
        f" raise data.max_bad_share={self._max_bad_share}"
      )

  def _check_shards(self):
    bad, read = len(self._damaged), self._shard
    if bad > self._max_bad_share * read and (read >= 2 or read == len(self._order)):
      names = ", ".join(self._shards[index] for index in self._damaged[:5])
      raise BadDataError(
        f"{bad} of {read} shards read are truncated or damaged: {names}{', …' if bad > 5 else ''};"
        f" copy or pack them again, or raise data.max_bad_share={self._max_bad_share}"
      )

  def _summary(self) -> str:
    counts = ", ".join(f"{cause} {n}" for cause, n in self._counts.most_common())
    if not self._pending:
      if not counts and self._task_weights:
        return f"they are empty, or data.task_weights={self._task_weights} leaves nothing of them"
      return counts or "the shards are empty"
    last = self._pending[-1]
    return f"{counts} (last: {last.key or 'no key'} in {last.shard}: {last.cause} {last.detail})"
