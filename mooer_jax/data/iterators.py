"""How a stream of utterances is cut into batches, with states that restore exactly.

A training iterator fills a window of utterances, shuffles and sorts them by length, cuts them into
batches and shuffles those. Its state is the position where the window began and the number of
batches taken from it, so that it stays small and a restored iterator goes on bit for bit.
"""

from typing import Any

import grain
import numpy as np

from mooer_jax.data.batching import Batcher, HostBatch
from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import Example
from mooer_jax.data.shards import Skip
from mooer_jax.data.stream import UtteranceStream


class _Window:
  """Utterances of one epoch that are sorted together; a whole number of batches."""

  def __init__(self, stream: UtteranceStream, *, size: int, batch_size: int):
    self.start = stream.position()
    self._stream, self._size, self._batch_size = stream, size, batch_size
    self._examples: list[Example] = []
    self._full = False

  @property
  def missing(self) -> int:
    return 0 if self._full else self._size - len(self._examples)

  def read(self, count: int):
    """Takes up to `count` more utterances, fewer if the window is full or the epoch ends."""
    for _ in range(count):
      whole = self._examples and len(self._examples) % self._batch_size == 0
      if whole and self._stream.peek().epoch != self._examples[0].epoch:
        self._full = True
      if not self.missing:
        return
      self._examples.append(self._stream.take())

  def cut(self, rng: np.random.Generator) -> list[list[Example]]:
    """Batches of utterances of like length, in random order."""
    order = rng.permutation(len(self._examples))  # so that equal lengths mix
    lengths = np.asarray([len(e.features[0]) for e in self._examples])
    order = order[np.argsort(lengths[order], kind="stable")]
    batches = order.reshape(-1, self._batch_size)
    return [[self._examples[i] for i in row] for row in rng.permutation(batches)]


class TrainIterator(grain.DatasetIterator):
  """Gives the batches of one window while the next one fills."""

  def __init__(self, config: DataConfig, batcher: Batcher, stream: UtteranceStream):
    super().__init__()
    self._config, self._batcher, self._stream = config, batcher, stream
    self._number, self._index = 0, 0
    self._batches: list = []
    self._next = self._new_window()
    self._start = self._next.start

  def __next__(self) -> HostBatch:
    if not self._batches:
      self._begin()
    examples = self._batches[self._index]
    self._batches[self._index] = None  # lets go of its memory
    self._index += 1
    left = len(self._batches) - self._index
    # In equal parts, so that no batch has to wait for a whole window.
    self._next.read(-(-self._next.missing // (left + 1)))
    if not left:
      self._number, self._index, self._batches = self._number + 1, 0, []
      self._start = self._next.start
    return self._batcher(examples)

  def get_state(self) -> dict[str, Any]:
    return {"window": self._number, "index": self._index, "start": self._start}

  def set_state(self, state: dict[str, Any]):
    self._number, self._index, self._start = state["window"], state["index"], state["start"]
    self._stream.seek(self._start)
    self._batches = []
    self._next = self._new_window()

  def close(self):
    super().close()
    self._stream.close()

  def _begin(self):
    while self._next.missing:
      self._next.read(self._next.missing)
    # 1: apart from the numbers that shuffle shards. The same in all workers and processes.
    rng = np.random.default_rng([self._config.seed, 1, self._number])
    self._batches = self._next.cut(rng)
    self._batches[: self._index] = [None] * self._index
    self._next = self._new_window()

  def _new_window(self) -> _Window:
    return _Window(self._stream, size=self._config.window, batch_size=self._config.batch_size)


class EvalIterator(grain.DatasetIterator):
  """One pass in order."""

  def __init__(self, config: DataConfig, batcher: Batcher, stream: UtteranceStream):
    super().__init__()
    self._rows, self._batcher, self._stream = config.batch_size, batcher, stream
    self._state: dict[str, Any] | None = stream.position()

  def __next__(self) -> HostBatch:
    if self._state is None:
      raise StopIteration
    examples: list[Example] = []
    left_over: tuple[Skip, ...] = ()
    try:
      while len(examples) < self._rows:
        examples.append(self._stream.take())
      self._stream.peek()  # skips behind the last utterance belong to its batch
      self._state = self._stream.position()
    except StopIteration:
      self._state = None
      left_over = self._stream.left_over()
    return self._batcher(examples, left_over)

  def get_state(self) -> dict[str, Any]:
    return {"position": self._state}

  def set_state(self, state: dict[str, Any]):
    self._state = state["position"]
    if self._state is not None:
      self._stream.seek(self._state)

  def close(self):
    super().close()
    self._stream.close()
