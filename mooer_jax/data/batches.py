"""Examples collated into padded batches of a few fixed shapes."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import grain
import jax
import numpy as np

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import Example
from mooer_jax.data.feature_cache import DTYPE
from mooer_jax.data.mixture import MixedStream
from mooer_jax.data.readers.entries import SkippedUtterance
from mooer_jax.data.targets import collate, target_shapes
from mooer_jax.data.utterances import BadDataError, Position, UtteranceStream
from mooer_jax.inputs import encoder_inputs, padded_lengths
from mooer_jax.speech_llm import Batch

_static = functools.partial(flax.struct.field, pytree_node=False)


@flax.struct.dataclass
class HostBatch:
  """A batch in NumPy and what it was made from."""

  # Arrays of B rows; rows beyond len(keys) are padding. Of `eval_batches`, None without a key.
  batch: Batch
  keys: tuple[str, ...] = _static()  # of the utterances, row by row
  texts: tuple[str, ...] = _static()  # their transcripts
  tasks: tuple[str, ...] = _static()  # the tasks of their prompts
  seconds: tuple[float, ...] = _static()  # lengths of their audio, after truncation
  skipped: tuple[SkippedUtterance, ...] = _static()  # since the previous batch, each once
  num_truncated: int = _static(default=0)  # clips longer than max_s, which were truncated
  places: tuple[tuple[int, int], ...] = _static(default=())  # of their shards, and in these
  # Of a single pass: entries in the shards that were read to their ends, of all processes.
  entries: int = _static(default=0)

  @property
  def audio_s(self) -> float:
    """Length of all audio in the batch, seconds."""
    return sum(self.seconds)


def lengths_of(batch: Batch) -> tuple[int, ...]:
  """The padded lengths that differ between batches: of the features by encoder, and of labels."""
  return (*(x.shape[1] for x in batch.features), batch.labels_BS.shape[1])


def widen(batch: Batch, lengths: Sequence[int]) -> Batch:
  """Pads a batch further, to lengths as of `lengths_of`."""

  def padded(x, length, value):
    more = length - x.shape[1]
    return np.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), constant_values=value)

  *of_features, of_labels = lengths
  features = zip(batch.features, of_features, strict=True)
  return dataclasses.replace(
    batch,
    features=tuple(padded(x, length, 0) for x, length in features),
    labels_BS=padded(batch.labels_BS, of_labels, -1),
  )


def join(hosts: Sequence[HostBatch]) -> HostBatch:
  """The rows of full batches in one, padded to the longest."""
  if len(hosts) == 1:
    return hosts[0]
  longest = [max(sizes) for sizes in zip(*(lengths_of(host.batch) for host in hosts))]
  batches = [widen(host.batch, longest) for host in hosts]
  names = ("keys", "texts", "tasks", "seconds", "places", "skipped")
  joined: dict[str, Any] = {n: sum((getattr(host, n) for host in hosts), ()) for n in names}
  return HostBatch(
    batch=jax.tree.map(lambda *parts: np.concatenate(parts), *batches),
    num_truncated=sum(host.num_truncated for host in hosts),
    **joined,
  )


class Padding(NamedTuple):
  """The shapes that the encoder inputs of a data set are padded to."""

  rows: int  # of a batch
  buckets: list[tuple[int, ...]]  # for each bucket, the lengths; see `inputs.padded_lengths`
  widths: list[tuple[int, ...]]  # shape of a frame for every encoder, or of a sample: ()
  dtype: Any

  def __call__(self, clips: Sequence[tuple[np.ndarray, ...]]):
    """Encoder inputs of at most `rows` clips; see `inputs.encoder_inputs`."""
    return encoder_inputs(clips, rows=self.rows, buckets=self.buckets, dtype=self.dtype)


def input_padding(config: DataConfig, model: SpeechLLMConfig, *, encoded: bool = False) -> Padding:
  """Determines the padded shapes of features (or waveforms) or, if `encoded`, of encoder frames.

  Raises:
    ValueError: if a clip of config.max_s does not fit into the longest bucket.
  """
  frontends = model.frontends
  longest_s = max(config.max_s, model.min_audio_s)
  longest = frontends[0].num_frames(int(longest_s * model.sample_rate_hz))
  if longest > config.buckets[-1]:
    raise ValueError(
      f"data.max_s={longest_s} makes {longest} frames, more than the longest of data.buckets="
      f"{config.buckets}; add {longest} or lower data.max_s"
    )
  on_device = model.compute.features == "device"
  assert not (encoded and on_device), "Run.check_features refuses this"
  buckets = padded_lengths(config.buckets, model)
  if not encoded:
    widths: list[tuple[int, ...]] = [(frontend.width,) for frontend in frontends]
    return Padding(config.batch_size, buckets, [()] if on_device else widths, np.float32)
  buckets = [
    tuple(e.num_outputs(n) for e, n in zip(model.encoders, lengths, strict=True))
    for lengths in buckets
  ]
  return Padding(config.batch_size, buckets, [(e.hidden_size,) for e in model.encoders], DTYPE)


class Batcher:
  """Collates examples into padded batches."""

  def __init__(
    self,
    config: DataConfig,
    model: SpeechLLMConfig,
    prompt_lengths: tuple[int, int],
    *,
    encoded: bool = False,
    targets: bool = False,
  ):
    """Pads prompts to `prompt_lengths` before and after the speech; the rest as `input_padding`.

    With `targets`, all examples have a segment of the recording of their answer.
    """
    self._pad = input_padding(config, model, encoded=encoded)
    self._config, self._encoded = config, encoded
    self._target = target_shapes(config, model, rows=self._pad.rows) if targets else None
    self._frontend = model.frontends[0]
    self._prefix, self._suffix = prompt_lengths
    # One task needs no sums of its own.
    self._task_ids = {task: i for i, (task, _) in enumerate(model.prompts)}
    self._mixed = not config.task

  def shapes(self) -> list[Batch]:
    """All shapes that a batch can have, as `ShapeDtypeStruct`s, the largest first."""

    def ints(*sizes):
      return jax.ShapeDtypeStruct((self._pad.rows, *sizes), np.int32)

    def frames(*sizes):
      return jax.ShapeDtypeStruct((self._pad.rows, *sizes), self._pad.dtype)

    return [
      Batch(
        features=tuple(frames(n, *w) for n, w in zip(lengths, self._pad.widths, strict=True)),
        frames=tuple(ints() for _ in lengths),
        prefix_BS=ints(self._prefix),
        suffix_BS=ints(self._suffix),
        labels_BS=ints(labels_length),
        task_B=ints() if self._mixed else None,
        target=self._target,
        encoded=self._encoded,
      )
      for lengths in reversed(self._pad.buckets)
      for labels_length in reversed(self._config.answer_buckets)
    ]

  def length(self, example: Example) -> int:
    """Frames of an example for the first encoder, wherever its features are computed."""
    first = example.features[0]
    return self._frontend.num_frames(len(first)) if first.ndim == 1 else len(first)

  def __call__(
    self, examples: Sequence[Example], left_over: Sequence[SkippedUtterance] = ()
  ) -> HostBatch:
    """Returns the batch of 1 to batch_size examples; missing rows are padding.

    Utterances skipped after the last example are `left_over`.
    """
    features, frames = self._pad([example.features for example in examples])
    longest = max(len(e.labels_S) for e in examples)
    labels_length = next(n for n in self._config.answer_buckets if longest <= n)
    labels_BS, prefix_BS, suffix_BS = (
      np.full((self._pad.rows, length), -1, np.int32)
      for length in (labels_length, self._prefix, self._suffix)
    )
    task_B = np.full(self._pad.rows, -1, np.int32)
    for row, example in enumerate(examples):
      labels_BS[row, : len(example.labels_S)] = example.labels_S
      prefix_BS[row, self._prefix - len(example.prefix_S) :] = example.prefix_S
      suffix_BS[row, self._suffix - len(example.suffix_S) :] = example.suffix_S
      task_B[row] = self._task_ids[example.task]
    target = None
    if self._target is not None:
      segments = [example.target for example in examples if example.target is not None]
      target = collate(segments, self._target)
    batch = Batch(
      features=features,
      frames=frames,
      prefix_BS=prefix_BS,
      suffix_BS=suffix_BS,
      labels_BS=labels_BS,
      task_B=task_B if self._mixed else None,
      target=target,
      encoded=self._encoded,
    )
    max_s = self._config.max_s
    return HostBatch(
      batch=batch,
      keys=tuple(e.key for e in examples),
      texts=tuple(e.text for e in examples),
      tasks=tuple(e.task for e in examples),
      seconds=tuple(min(e.seconds, max_s) for e in examples),
      places=tuple(e.place for e in examples),
      skipped=(*(s for e in examples for s in e.skipped), *left_over),
      num_truncated=sum(e.seconds > max_s for e in examples),
    )


class _Window:
  """Utterances that are sorted together, a multiple of the batch size.

  They are of one epoch, unless the stream is a mixture.
  """

  def __init__(self, stream: UtteranceStream | MixedStream, config: DataConfig):
    self.start = stream.position
    self.examples: list[Example] = []
    self._stream, self._full = stream, False
    self._size, self._batch_size = config.shuffle_buffer_size, config.batch_size

  @property
  def missing(self) -> int:
    return 0 if self._full else self._size - len(self.examples)

  def read(self, number: int):
    """Takes up to `number` more utterances, fewer if the window is full or the epoch ends."""
    for _ in range(number):
      complete = self.examples and len(self.examples) % self._batch_size == 0
      if complete and self._stream.peek().epoch != self.examples[0].epoch:
        self._full = True
      if not self.missing:
        return
      self.examples.append(self._stream.take())

  def batches(
    self, rng: np.random.Generator, length: Callable[[Example], int]
  ) -> list[list[Example]]:
    """Batches of utterances of similar length, in random order."""
    order = rng.permutation(len(self.examples))  # so that equal lengths mix
    lengths = np.asarray([length(example) for example in self.examples])
    order = order[np.argsort(lengths[order], kind="stable")]
    rows = rng.permutation(order.reshape(-1, self._batch_size))
    return [[self.examples[i] for i in row] for row in rows]


class TrainIterator(grain.DatasetIterator):
  """Returns the batches of one window while the next one fills."""

  def __init__(self, config: DataConfig, batcher: Batcher, stream: UtteranceStream | MixedStream):
    super().__init__()
    self._config, self._batcher, self._stream = config, batcher, stream
    self._go_to(0, 0)

  def _go_to(self, number: int, index: int) -> None:
    """Continues with batch `index` of window `number`, which starts at the stream's position."""
    self._number, self._index = number, index
    self._batches: list[list[Example]] = []
    self._next = _Window(self._stream, self._config)
    self._start = self._next.start

  def __next__(self) -> HostBatch:
    if not self._batches:
      self._begin()
    examples = self._batches[self._index]
    left = len(self._batches) - self._index - 1
    # In equal parts, so that no batch has to wait for a whole window.
    self._read(-(-self._next.missing // (left + 1)))
    self._batches[self._index] = []  # releases its memory
    self._index += 1
    if not left:
      self._number, self._index, self._batches = self._number + 1, 0, []
      self._start = self._next.start
    return self._batcher(examples)

  def get_state(self) -> dict[str, Any]:
    return {"window": self._number, "index": self._index, "start": dataclasses.asdict(self._start)}

  def set_state(self, state: dict[str, Any]):
    self._stream.restore(state["start"])
    self._go_to(state["window"], state["index"])

  def close(self):
    super().close()
    self._stream.close()

  def _begin(self):
    while self._next.missing:
      self._read(self._next.missing)
    # 1: a stream apart from the one that shuffles shards; the same in all workers and processes
    rng = np.random.default_rng([self._config.seed, 1, self._number])
    self._batches = self._next.batches(rng, self._batcher.length)
    self._batches[: self._index] = [[]] * self._index
    self._next = _Window(self._stream, self._config)

  def _read(self, number: int) -> None:
    try:
      self._next.read(number)
    except BadDataError as error:
      unused = (*itertools.chain.from_iterable(self._batches), *self._next.examples)
      error.skipped = (*(s for e in unused for s in e.skipped), *self._stream.left_over())
      raise


class EvalIterator(grain.DatasetIterator):
  """One pass in order."""

  def __init__(self, config: DataConfig, batcher: Batcher, stream: UtteranceStream):
    super().__init__()
    self._rows, self._batcher, self._stream = config.batch_size, batcher, stream
    self._position: Position | None = stream.position

  def __next__(self) -> HostBatch:
    if self._position is None:
      raise StopIteration
    examples: list[Example] = []
    left_over: tuple[SkippedUtterance, ...] = ()
    try:
      while len(examples) < self._rows:
        examples.append(self._stream.take())
      self._stream.peek()  # utterances skipped after the last one belong to its batch
      self._position = self._stream.position
    except StopIteration:
      self._position = None
      left_over = self._stream.left_over()
    except BadDataError as error:
      error.skipped = (*(s for e in examples for s in e.skipped), *self._stream.left_over())
      raise
    # Nothing may be usable in the share of a process.
    nothing = HostBatch(None, (), (), (), (), left_over)  # type: ignore[arg-type]
    host = self._batcher(examples, left_over) if examples else nothing
    return dataclasses.replace(host, entries=self._stream.entries)

  def get_state(self) -> dict[str, Any]:
    return {"position": self._position and dataclasses.asdict(self._position)}

  def set_state(self, state: dict[str, Any]):
    saved = state["position"]
    self._position = saved and Position.from_json(saved)
    if self._position is not None:
      self._stream.seek(self._position)

  def close(self):
    super().close()
    self._stream.close()
