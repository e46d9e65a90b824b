"""Examples put together into padded batches of a few fixed shapes."""

from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

from mooer_jax.audio.frontend import Frontend, num_frames, width
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.asking import Asker
from mooer_jax.data.cache import DTYPE
from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import Example
from mooer_jax.data.shards import Skip
from mooer_jax.speech_llm import Batch


@flax.struct.dataclass
class HostBatch:
  """A batch in NumPy and what it is made of.

  Attributes:
    batch: arrays of B rows; rows beyond len(keys) are padding.
    keys: of the utterances, row by row.
    texts: their transcripts.
    tasks: what was asked of each.
    digests: of their audio, where a cache is read or made.
    seconds: of their audio.
    skipped: what was left out since the batches before, each utterance once.
  """

  batch: Batch
  keys: tuple[str, ...] = flax.struct.field(pytree_node=False)
  texts: tuple[str, ...] = flax.struct.field(pytree_node=False)
  tasks: tuple[str, ...] = flax.struct.field(pytree_node=False)
  digests: tuple[str, ...] = flax.struct.field(pytree_node=False)
  seconds: tuple[float, ...] = flax.struct.field(pytree_node=False)
  skipped: tuple[Skip, ...] = flax.struct.field(pytree_node=False)

  @property
  def audio_s(self) -> float:
    """Seconds of audio in it."""
    return sum(self.seconds)


class Batcher:
  """Pads examples to the smallest bucket that holds them all."""

  def __init__(
    self, config: DataConfig, model: SpeechLLMConfig, asker: Asker, *, encoded: bool = False
  ):
    """Works out the padded lengths.

    Args:
      config: batch size and buckets, which are lengths of the first encoder's features.
      model: what features its encoders take.
      asker: knows the lengths of prompts.
      encoded: whether examples hold encoder frames instead of features.

    Raises:
      ValueError: if the longest bucket does not hold a clip of config.max_s.
    """
    frontends = model.frontends
    longest_s = max(config.max_s, model.min_audio_s)
    longest = num_frames(int(longest_s * frontends[0].sample_rate_hz), frontends[0])
    if longest > config.buckets[-1]:
      raise ValueError(
        f"data.max_s={longest_s} makes {longest} frames, more than the longest of data.buckets="
        f"{config.buckets}; add {longest} or lower data.max_s"
      )
    self._rows = config.batch_size
    self._widths = [width(f) for f in frontends]
    self._lengths = [_lengths(bucket, frontends) for bucket in config.buckets]
    self._encoded = encoded
    if encoded:
      self._widths = [encoder.width for encoder in model.encoders]
      self._lengths = [
        tuple(e.num_outputs(n) for e, n in zip(model.encoders, lengths, strict=True))
        for lengths in self._lengths
      ]
    self._answer_lengths = config.answer_buckets
    self._asker = asker
    # One task needs no sums of its own.
    self._task_ids = {task: i for i, (task, _) in enumerate(model.prompts)}
    self._mixed = not config.task

  def shapes(self) -> list[Batch]:
    """All shapes that a batch can have, as `ShapeDtypeStruct`s, the largest first."""

    def ints(*sizes):
      return jax.ShapeDtypeStruct((self._rows, *sizes), np.int32)

    return [
      Batch(
        features=tuple(
          jax.ShapeDtypeStruct(
            (self._rows, length, channels), DTYPE if self._encoded else np.float32
          )  # type: ignore[misc]
          for length, channels in zip(lengths, self._widths, strict=True)
        ),
        frames=tuple(ints() for _ in lengths),
        before_BS=ints(self._asker.before),
        after_BS=ints(self._asker.after),
        answer_BS=ints(answer_length),
        task_B=ints() if self._mixed else None,
        encoded=self._encoded,
      )
      for lengths in reversed(self._lengths)
      for answer_length in reversed(self._answer_lengths)
    ]

  def __call__(self, examples: Sequence[Example], left_over: Sequence[Skip] = ()) -> HostBatch:
    """Returns the batch of at most batch_size examples; missing rows are padding.

    Args:
      examples: not none; their skips are handed on in order.
      left_over: skips that no example came after.
    """
    assert 0 < len(examples) <= self._rows
    most = [max(len(e.features[i]) for e in examples) for i in range(len(self._widths))]
    lengths = next(c for c in self._lengths if all(a <= b for a, b in zip(most, c, strict=True)))
    most_answer = max(len(e.answer_S) for e in examples)
    answer_length = next(length for length in self._answer_lengths if most_answer <= length)
    features = tuple(
      np.zeros((self._rows, length, channels), DTYPE if self._encoded else np.float32)
      for length, channels in zip(lengths, self._widths, strict=True)
    )
    frames = tuple(np.zeros(self._rows, np.int32) for _ in lengths)
    answer_BS = np.full((self._rows, answer_length), -1, np.int32)
    before_BS = np.full((self._rows, self._asker.before), -1, np.int32)
    after_BS = np.full((self._rows, self._asker.after), -1, np.int32)
    task_B = np.full(self._rows, -1, np.int32)
    for row, example in enumerate(examples):
      for x_BTF, frames_B, made in zip(features, frames, example.features, strict=True):
        x_BTF[row, : len(made)] = made
        frames_B[row] = len(made)
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
      digests=tuple(e.digest for e in examples),
      seconds=tuple(e.seconds for e in examples),
      skipped=(*(s for e in examples for s in e.skipped), *left_over),
    )


def _lengths(bucket: int, frontends: Sequence[Frontend]) -> tuple[int, ...]:
  """Frames of each frontend for the longest clip whose first features are `bucket` long."""
  if len(frontends) == 1:
    return (bucket,)
  low, high = 1, 1
  while num_frames(high, frontends[0]) <= bucket:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if num_frames(middle, frontends[0]) <= bucket else (low, middle)
  return (bucket, *(num_frames(low, frontend) for frontend in frontends[1:]))
