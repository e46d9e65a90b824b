"""Batches on the devices, ahead of the steps that train on them."""

import collections
import contextlib
import copy
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax

from mooer_jax import hosts
from mooer_jax.data.batches import HostBatch, lengths_of, widen
from mooer_jax.data.dataset import Batches
from mooer_jax.data.readers.entries import SkippedUtterance
from mooer_jax.data.utterances import BadDataError
from mooer_jax.sharding import batch_sharding
from mooer_jax.speech_llm import Batch

AHEAD = 2  # batches on the devices, besides that of the step that runs


class BatchSummary(NamedTuple):
  """Values of the batch of a step for the records of a run, of all processes together."""

  audio_s: float
  num_truncated: int
  skipped: tuple[SkippedUtterance, ...]
  # How long the loop has waited for data between two steps, in the slowest process, and how long
  # that interval was. The devices may have worked meanwhile, so it is a bound of their idle time.
  waited_s: float = 0.0
  interval_s: float = 0.0


class _Pulled(NamedTuple):
  """A batch of this process, or the error in its place."""

  host: HostBatch | Exception
  state: dict[str, Any]  # position of the data behind it

  @property
  def skipped(self) -> tuple[SkippedUtterance, ...]:
    return getattr(self.host, "skipped", ())


class _Placed(NamedTuple):
  summary: BatchSummary
  batch: Batch
  state: dict[str, Any]


class Feed:
  """The batches on the devices, in equal shapes on all processes, which stop together.

  `take` returns a batch that is on its way to the devices already. `refill`, called once the step
  of that batch has been queued, transfers a further one while the devices work. An error of the
  data is raised by the `take` of its batch, not earlier.

  Several processes exchange the lengths of their batches, and whether one of them stops or has
  failed. The exchange is queued before a step, so that it does not wait for that step.
  """

  def __init__(
    self,
    dataset: Batches,
    batches: grain.DatasetIterator,
    mesh: jax.sharding.Mesh,
    stop: threading.Event,
  ):
    """Transfers the first AHEAD batches.

    Args:
      dataset, batches: the data, and their iterator at the first batch.
      mesh: devices.
      stop: set when the run shall stop.
    """
    self._batches, self._stop, self._sharding = batches, stop, batch_sharding(mesh)
    self._num_lengths = len(lengths_of(dataset.shapes[0]))
    self._agreement = hosts.Agreement(mesh) if jax.process_count() > 1 else None
    self._own_wait_s = 0.0  # of this process, until it is exchanged
    self._wait_s = 0.0  # of the slowest process, until it is recorded
    self._start = time.perf_counter()  # of the interval in which it waited
    self._exchanged_s = 0.0  # length of the interval of the exchange that has started
    self._interval_s = 0.0  # until it is recorded
    self._told: set[tuple[str, str, str]] = set()
    self._placed: collections.deque[_Placed | Exception] = collections.deque()
    self._ended = self._stopping = False
    self._state: dict[str, Any] = batches.get_state()
    self._pull()
    for _ in range(AHEAD):
      self._exchange()
      self.refill()

  def take(self) -> tuple[BatchSummary, Batch, bool]:
    """(what to record, the batch, whether its step is the last) of the next step.

    Raises:
      BadDataError: if too much of the data cannot be used, or another process has failed; with all
        that was skipped, of all processes.
    """
    self._exchange()
    placed = self._placed.popleft()
    if isinstance(placed, Exception):
      raise placed
    self._state = placed.state
    if self._agreement is None:
      self._stopping = self._stop.is_set()
      self._wait_s, self._own_wait_s = self._own_wait_s, 0.0
      self._interval_s = self._end_interval()
    summary = placed.summary._replace(waited_s=self._wait_s, interval_s=self._interval_s)
    self._wait_s = self._interval_s = 0.0
    return summary, placed.batch, self._stopping

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """The time of the block, such as that of an evaluation, is part of no interval."""
    before = time.perf_counter()
    yield
    self._start += time.perf_counter() - before

  def _end_interval(self) -> float:
    """The length of the interval that ends now, seconds."""
    start, self._start = self._start, time.perf_counter()
    return self._start - start

  def state(self) -> dict[str, Any]:
    """The position of this process's data behind the batch that was taken last."""
    return self._state

  def refill(self) -> None:
    """Transfers one more batch to the devices; there is none behind an error."""
    if self._ended:
      return
    pulled = self._pulled
    host: Any = pulled.host
    lengths, failed = None, isinstance(host, Exception)
    skipped = pulled.skipped
    if self._agreement is not None:
      (*lengths, stopping, any_failed, waited_ms), sums = self._agreement.result()
      audio_s, truncated, num_new = sums
      self._stopping, failed = bool(stopping), bool(any_failed)
      # The intervals of the processes differ a little.
      self._wait_s += min(waited_ms / 1000, self._exchanged_s)
      self._interval_s += self._exchanged_s
      skipped = self._gather(pulled) if num_new else ()
    if failed:
      other = "another process failed; see its output"
      error = host if isinstance(host, Exception) else BadDataError(other)
      if self._agreement is not None:
        error.skipped = skipped  # type: ignore[attr-defined]
      self._placed.append(error)
      self._ended = True
      return
    if lengths is None:
      audio_s, truncated, batch = host.audio_s, host.num_truncated, host.batch
    else:
      audio_s, truncated, batch = round(audio_s, 3), round(truncated), widen(host.batch, lengths)
    summary = BatchSummary(audio_s, truncated, skipped)
    on_devices = hosts.from_processes(batch, self._sharding)
    self._placed.append(_Placed(summary, on_devices, pulled.state))
    self._pull()

  def _gather(self, pulled: _Pulled) -> tuple[SkippedUtterance, ...]:
    """The new skipped utterances of all processes."""
    rows = hosts.gather([dataclasses.asdict(one) for one in self._new(pulled)])
    self._told |= {(one.shard, one.key, one.cause) for one in pulled.skipped}
    return tuple(SkippedUtterance(**one) for of in rows for one in of)

  def _new(self, pulled: _Pulled) -> list[SkippedUtterance]:
    """The skipped utterances of a batch or an error that no earlier step has told of.

    An exchange of them waits for the devices; in later epochs, there are none.
    """
    return [one for one in pulled.skipped if (one.shard, one.key, one.cause) not in self._told]

  def _pull(self) -> None:
    """Takes the next batch of this process."""
    start = time.perf_counter()
    try:
      host: HostBatch | Exception = next(self._batches)
    except Exception as error:  # raised in its turn; the other processes are told first
      host = error
    self._own_wait_s += time.perf_counter() - start
    # A copy, since iterators may change what they have returned.
    self._pulled = _Pulled(host, copy.deepcopy(self._batches.get_state()))

  def _exchange(self) -> None:
    """Starts the exchange about the batch that was pulled last."""
    if self._agreement is None or self._ended:
      return
    host = self._pulled.host
    if isinstance(host, HostBatch):
      lengths, of_batch, failed = lengths_of(host.batch), (host.audio_s, host.num_truncated), False
    else:
      lengths, of_batch, failed = (0,) * self._num_lengths, (0.0, 0), True
    waited_ms, self._own_wait_s = round(1000 * self._own_wait_s), 0.0
    self._exchanged_s = self._end_interval()
    sums = [*of_batch, len(self._new(self._pulled))]
    self._agreement.start([*lengths, self._stop.is_set(), failed, waited_ms], sums)
