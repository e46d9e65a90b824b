"""Examples put together into padded batches of a few fixed shapes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import grain
import jax
import numpy as np

from mooer_jax.audio.frontend import num_frames, width
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import Asker, Example
from mooer_jax.data.feature_cache import DTYPE
from mooer_jax.data.shards import Skip
from mooer_jax.data.utterances import UtteranceStream
from mooer_jax.inputs import bucket_lengths, encoder_inputs
from mooer_jax.speech_llm import Batch


@flax.struct.dataclass
class HostBatch:
  """A batch in NumPy and what it is made of.

  Attributes:
    batch: arrays of B rows; rows beyond len(keys) are padding.
    keys: of the utterances, row by row.
    texts: their transcripts.
    tasks: what was asked of each.
    seconds: of their audio, as far as it is heard.
    skipped: what was left out since the batches before, each utterance once.
    cut: how many were longer than max_s, and are heard up to there.
  """

  batch: Batch
  keys: tuple[str, ...] = flax.struct.field(pytree_node=False)
  texts: tuple[str, ...] = flax.struct.field(pytree_node=False)
  tasks: tuple[str, ...] = flax.struct.field(pytree_node=False)
  seconds: tuple[float, ...] = flax.struct.field(pytree_node=False)
  skipped: tuple[Skip, ...] = flax.struct.field(pytree_node=False)
  cut: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def audio_s(self) -> float:
    """Seconds of audio in it."""
    return sum(self.seconds)


class Padding(NamedTuple):
  """The shapes that the encoder inputs of a data set are padded to.

  Attributes:
    rows: rows of a batch.
    buckets: for each bucket, the number of frames for every encoder.
    widths: values per frame for every encoder.
    dtype: of the inputs.
  """

  rows: int
  buckets: list[tuple[int, ...]]
  widths: list[int]
  dtype: Any

  def __call__(self, clips: Sequence[tuple[np.ndarray, ...]]):
    """Encoder inputs of at most `rows` clips; see `inputs.encoder_inputs`."""
    return encoder_inputs(clips, rows=self.rows, buckets=self.buckets, dtype=self.dtype)


def input_padding(config: DataConfig, model: SpeechLLMConfig, *, encoded: bool = False) -> Padding:
  """Determines the padded shapes.

  Args:
    config: batch size and buckets, which are lengths of the first encoder's features.
    model: determines the features of its encoders.
    encoded: whether encoder frames take the place of features.

  Raises:
    ValueError: if a clip of config.max_s does not fit into the longest bucket.
  """
  frontends = model.frontends
  longest_s = max(config.max_s, model.min_audio_s)
  longest = num_frames(int(longest_s * model.sample_rate_hz), frontends[0])
  if longest > config.buckets[-1]:
    raise ValueError(
      f"data.max_s={longest_s} makes {longest} frames, more than the longest of data.buckets="
      f"{config.buckets}; add {longest} or lower data.max_s"
    )
  buckets = [bucket_lengths(bucket, frontends) for bucket in config.buckets]
  if not encoded:
    return Padding(config.batch_size, buckets, [width(f) for f in frontends], np.float32)
  encoders = model.encoders
  buckets = [
    tuple(e.num_outputs(n) for e, n in zip(encoders, lengths, strict=True)) for lengths in buckets
  ]
  return Padding(config.batch_size, buckets, [e.hidden_size for e in encoders], DTYPE)


class Batcher:
  """Puts examples together to batches."""

  def __init__(
    self, config: DataConfig, model: SpeechLLMConfig, asker: Asker, *, encoded: bool = False
  ):
    """Works out the padded lengths; arguments and errors as of `input_padding`.

    Args:
      asker: knows the lengths of prompts.
    """
    self._pad = input_padding(config, model, encoded=encoded)
    self._rows, self._encoded = config.batch_size, encoded
    self._answer_lengths = config.answer_buckets
    self._asker = asker
    # One task needs no sums of its own.
    self._task_ids = {task: i for i, (task, _) in enumerate(model.prompts)}
    self._mixed = not config.task
    self._max_s = config.max_s

  def shapes(self) -> list[Batch]:
    """All shapes that a batch can have, as `ShapeDtypeStruct`s, the largest first."""

    def ints(*sizes):
      return jax.ShapeDtypeStruct((self._rows, *sizes), np.int32)

    return [
      Batch(
        features=tuple(
          jax.ShapeDtypeStruct((self._rows, length, channels), self._pad.dtype)  # type: ignore[misc]
          for length, channels in zip(lengths, self._pad.widths, strict=True)
        ),
        frames=tuple(ints() for _ in lengths),
        before_BS=ints(self._asker.before),
        after_BS=ints(self._asker.after),
        answer_BS=ints(answer_length),
        task_B=ints() if self._mixed else None,
        encoded=self._encoded,
      )
      for lengths in reversed(self._pad.buckets)
      for answer_length in reversed(self._answer_lengths)
    ]

  def __call__(self, examples: Sequence[Example], left_over: Sequence[Skip] = ()) -> HostBatch:
    """Returns the batch of at most batch_size examples; missing rows are padding.

    Args:
      examples: not none; their skips are handed on in order.
      left_over: skips that no example came after.
    """
    features, frames = self._pad([example.features for example in examples])
    most_answer = max(len(e.answer_S) for e in examples)
    answer_length = next(length for length in self._answer_lengths if most_answer <= length)
    answer_BS = np.full((self._rows, answer_length), -1, np.int32)
    before_BS = np.full((self._rows, self._asker.before), -1, np.int32)
    after_BS = np.full((self._rows, self._asker.after), -1, np.int32)
    task_B = np.full(self._rows, -1, np.int32)
    for row, example in enumerate(examples):
      answer_BS[row, : len(example.answer_S)] = example.answer_S
      before_BS[row, self._asker.before - len(example.before_S) :] = example.before_S
      after_BS[row, self._asker.after - len(example.after_S) :] = example.after_S
      task_B[row] = self._task_ids[example.task]
    batch = Batch(
      features=features,
      frames=frames,
      before_BS=before_BS,
      after_BS=after_BS,
      answer_BS=answer_BS,
      task_B=task_B if self._mixed else None,
      encoded=self._encoded,
    )
    return HostBatch(
      batch=batch,
      keys=tuple(e.key for e in examples),
      texts=tuple(e.text for e in examples),
      tasks=tuple(e.task for e in examples),
      seconds=tuple(min(e.seconds, self._max_s) for e in examples),
      skipped=(*(s for e in examples for s in e.skipped), *left_over),
      cut=sum(e.seconds > self._max_s for e in examples),
    )


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
    return _Window(
      self._stream, size=self._config.shuffle_buffer_size, batch_size=self._config.batch_size
    )


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
