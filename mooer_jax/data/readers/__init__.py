"""Readers of stored utterances: one file for each format, and the table of them."""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

from mooer_jax.data.readers import annotation, emilia, shards
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance

Entries = Generator[RawUtterance | SkippedUtterance]


class Reader(NamedTuple):
  """A format.

  Attributes:
    recognises: whether a shard, by its name and the files beside it, has the format.
    read: yields the utterances of a shard, in order, each either complete or skipped.
  """

  recognises: Callable[[str], bool]
  read: Callable[[str], Entries]


# The first that recognises a shard reads it.
READERS = (
  Reader(annotation.is_piece, annotation.read_piece),
  Reader(emilia.is_recording, emilia.read_recording),
  Reader(emilia.is_batch, emilia.read_batch),
  Reader(lambda name: True, shards.read_shard),
)


def shard_names(source: str) -> list[str]:
  """The parts of an annotation file, the tars below a folder, or the shards of a `data.list`.

  Raises:
    FileNotFoundError, ValueError: for a file or folder that is none of these.
  """
  if annotation.is_annotation(source):
    return annotation.pieces(source)
  return emilia.find_shards(source) if Path(source).is_dir() else shards.read_list(source)


def read(name: str) -> Entries:
  """The utterances of a shard, in order, each either complete or skipped."""
  return next(reader for reader in READERS if reader.recognises(name)).read(name)
