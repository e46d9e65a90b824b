"""Readers of stored utterances: one file for each format, and the tables of them."""

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

from mooer_jax import storage
from mooer_jax.data.readers import annotation, emilia, prepared, raw_list, shards
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance

Entries = Generator[RawUtterance | SkippedUtterance]


class Listing(NamedTuple):
  """A way to list shards: a kind of `data.shards`.

  Attributes:
    recognises: whether a path, by its name and content, is of the kind.
    shards: names of the shards, or of parts that are read like shards.
    files: paths of the files that hold the audio.
    utterances: the names of all utterances, if any of them can be read at once.
  """

  recognises: Callable[[str], bool]
  shards: Callable[[str], list[str]]
  files: Callable[[str], Sequence[str]]
  utterances: Callable[[str], prepared.Utterances | None] = lambda path: None


class Reader(NamedTuple):
  """A format.

  Attributes:
    recognises: whether a shard, by its name and the files beside it, has the format.
    read: yields the utterances of a shard, in order, each either complete or skipped.
  """

  recognises: Callable[[str], bool]
  read: Callable[[str], Entries]


# Of both tables, the first that recognises a name applies.
LISTINGS = (
  Listing(annotation.is_annotation, annotation.pieces, annotation.audio_files),
  Listing(prepared.is_prepared, prepared.parts, prepared.audio_files, prepared.utterances),
  Listing(storage.is_folder, emilia.find_shards, emilia.find_shards),
  Listing(raw_list.is_raw_list, raw_list.parts, raw_list.audio_files),
  Listing(lambda path: True, shards.read_list, shards.read_list),
)
READERS = (
  Reader(lambda name: prepared.file_of_part(name) is not None, prepared.read_part),
  Reader(annotation.is_piece, annotation.read_piece),
  Reader(lambda name: raw_list.list_of_part(name) is not None, raw_list.read_part),
  Reader(emilia.is_recording, emilia.read_recording),
  Reader(emilia.is_batch, emilia.read_batch),
  Reader(lambda name: True, shards.read_shard),
)


def shard_names(source: str) -> list[str]:
  """Names of the shards of a data set, or of the parts that are read like shards.

  Raises:
    FileNotFoundError, ValueError: for a file, folder or URL that is of no kind in LISTINGS.
  """
  return _listing(source).shards(source)


def utterance_names(source: str) -> prepared.Utterances | None:
  """Names of parts of one utterance each, of a format with random access; None of another."""
  return _listing(source).utterances(source)


def audio_files(source: str) -> Sequence[str]:
  """Paths of the files that hold the audio of a data set; errors as of `shard_names`."""
  return _listing(source).files(source)


def file_of(name: str) -> str:
  """The file that has a shard or a part."""
  if annotation.is_piece(name):
    return name.rpartition("#")[0]
  return prepared.file_of_part(name) or raw_list.list_of_part(name) or name


def read(name: str) -> Entries:
  """The utterances of a shard, in order, each either complete or skipped."""
  return next(reader for reader in READERS if reader.recognises(name)).read(name)


def _listing(path: str) -> Listing:
  return next(listing for listing in LISTINGS if listing.recognises(path))
