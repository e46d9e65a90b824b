"""Weighted mixtures of data sets, with a position that can be restored."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mooer_jax.data.examples import Example
from mooer_jax.data.readers.entries import SkippedUtterance
from mooer_jax.data.utterances import Position, UtteranceStream


@dataclasses.dataclass(frozen=True)
class MixedPosition:
  """Place of the next utterance in a `MixedStream`; both fields are in the order of its streams."""

  taken: tuple[int, ...]  # utterances so far
  streams: tuple[Position, ...]


class MixedStream:
  """Takes utterances from endless streams, in shares by their weights.

  The next utterance is of the stream that is furthest behind its share. So after n utterances, a
  stream of share p has given more than n p - k + 1 and fewer than n p + 1 of them, if there are k
  streams. Each stream has its own epochs, and its own limits of unusable data.
  """

  def __init__(self, streams: Sequence[UtteranceStream], weights: Sequence[float]):
    self._streams = tuple(streams)
    self._shares = [weight / sum(weights) for weight in weights]
    self._taken = [0] * len(streams)

  @property
  def position(self) -> MixedPosition:
    return MixedPosition(tuple(self._taken), tuple(stream.position for stream in self._streams))

  def restore(self, saved: Mapping[str, Any]) -> None:
    """Continues from a position in the form of `dataclasses.asdict`."""
    self._taken = list(saved["taken"])
    for stream, position in zip(self._streams, saved["streams"], strict=True):
      stream.restore(position)

  def peek(self) -> Example:
    """Returns the next utterance without taking it; raises as `take`."""
    # Utterances of all epochs are sorted and batched together.
    return dataclasses.replace(self._streams[self._next()].peek(), epoch=0)

  def take(self) -> Example:
    """Returns the next utterance; raises BadDataError as its stream."""
    number = self._next()
    example = self._streams[number].take()
    self._taken[number] += 1
    return dataclasses.replace(example, epoch=0)

  def left_over(self) -> tuple[SkippedUtterance, ...]:
    return tuple(skipped for stream in self._streams for skipped in stream.left_over())

  def close(self) -> None:
    for stream in self._streams:
      stream.close()

  def _next(self) -> int:
    total = sum(self._taken) + 1
    behind = [total * share - taken for share, taken in zip(self._shares, self._taken)]
    return behind.index(max(behind))
