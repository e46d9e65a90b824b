"""Datasets of `mooer-jax data prepare`: TensorFlow Datasets (TFDS) in ArrayRecord files.

Any utterance can be read at once. TFDS reads and writes them without TensorFlow. Its Audio feature
would decode the clips with pydub and store samples; a Tensor of bytes keeps the encoded files.
"""

import collections
import dataclasses
import functools
import json
import os
import re
from collections.abc import Generator, Sequence
from typing import Any, overload

import numpy as np

from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance
from mooer_jax.files import read_json_object

SPLIT = "train"
_INFO = "dataset_info.json"
_PART = re.compile(r"(.+)#(\d+)-(\d+)", re.DOTALL)  # `FOLDER#START-END`: indices of utterances
_UTTERANCES = 64  # of a part in a single pass
_TEXTS = ("key", "suffix", "task", "question")
_SURROGATES = "surrogatepass"  # JSON may have them


def features():
  """The `tfds.features.FeaturesDict` of an utterance; the names are those of `RawUtterance`."""
  import tensorflow_datasets as tfds

  encoded = tfds.features.Tensor(shape=(), dtype=np.object_)
  texts = {name: tfds.features.Text() for name in _TEXTS}
  return tfds.features.FeaturesDict({
    **texts,
    "audio": encoded,
    "text": encoded,  # UTF-8, unless the source has another encoding, which training reports
    "more": tfds.features.Sequence(encoded),
    "about": encoded,  # JSON
  })  # fmt: skip


def to_example(raw: RawUtterance) -> dict[str, Any]:
  """The features of an utterance; the inverse of `_utterance`."""
  return {
    **{name: getattr(raw, name).encode("utf-8", _SURROGATES) for name in _TEXTS},
    "audio": raw.audio,
    "text": raw.text,
    "more": [*raw.more],
    "about": json.dumps({**raw.about}).encode(),
  }


def _utterance(example: dict[str, Any], shard: str) -> RawUtterance:
  return RawUtterance(
    **{name: example[name].decode("utf-8", _SURROGATES) for name in _TEXTS},
    shard=shard,
    audio=example["audio"],
    text=example["text"],
    more=tuple(example["more"]),
    about=json.loads(example["about"]),
  )


def is_prepared(path: str) -> bool:
  """Whether this is the folder of a TFDS dataset."""
  return os.path.isfile(os.path.join(path, _INFO))


@dataclasses.dataclass(frozen=True)
class Utterances(Sequence[str]):
  """Names of parts of one utterance each, in constant memory."""

  folder: str
  indices: range

  def __len__(self) -> int:
    return len(self.indices)

  @overload
  def __getitem__(self, at: int) -> str: ...
  @overload
  def __getitem__(self, at: slice) -> "Utterances": ...
  def __getitem__(self, at):
    if isinstance(at, slice):
      return Utterances(self.folder, self.indices[at])
    return f"{self.folder}#{self.indices[at]}-{self.indices[at] + 1}"

  def open(self) -> None:
    """Opens the dataset and reads an utterance, if that is possible.

    To be called before threads read: the imports that TFDS puts off until they are needed wait for
    one another forever if several threads begin them.
    """
    collections.deque(read_part(self[0]), maxlen=0)


def utterances(path: str) -> Utterances:
  """The names of all utterances, for reading in any order; `parts` checks the files."""
  folder = os.path.normpath(path)
  return Utterances(folder, range(_split(folder).num_examples))


def parts(path: str) -> list[str]:
  """Names of blocks of utterances, which are read like shards.

  Raises:
    ValueError: if it is another TFDS dataset, or a file is missing or damaged.
  """
  folder = os.path.normpath(path)
  count = _count(folder)
  starts = range(0, count, _UTTERANCES)
  return [f"{folder}#{start}-{min(start + _UTTERANCES, count)}" for start in starts]


def audio_files(path: str) -> list[str]:
  """The ArrayRecord files."""
  instructions = _split(os.path.normpath(path)).file_instructions
  return [instruction.filename for instruction in instructions]


def file_of_part(name: str) -> str | None:
  """The description of the dataset that has a part; None if the name is not one of `parts`."""
  match = _PART.fullmatch(name)
  return os.path.join(match[1], _INFO) if match else None


def read_part(name: str) -> Generator[RawUtterance | SkippedUtterance]:
  """Yields the utterances of a part, in order; those in damaged places are skipped."""
  match = _PART.fullmatch(name)
  assert match is not None
  folder, start, end = match[1], int(match[2]), int(match[3])
  try:
    source = _open(folder, os.stat(os.path.join(folder, _INFO)).st_mtime_ns)
  except (OSError, ValueError) as error:
    yield SkippedUtterance("bad shard", "", name, str(error))
    return
  for index in range(start, end):
    try:
      yield _utterance(source[index], name)
    except (RuntimeError, ValueError, IndexError) as error:  # of ArrayRecord, TFDS, JSON and UTF-8
      key = f"{os.path.basename(folder)}#{index}"
      yield SkippedUtterance("no audio", key, name, f"{folder}, utterance {index}: {error}")


@functools.lru_cache(maxsize=64)
def _open(folder: str, written_ns: int) -> Sequence[dict[str, Any]]:
  """The data source of a dataset; threads may share it."""
  del written_ns  # opens a dataset again after a change
  return _builder(folder).as_data_source(SPLIT)


def _builder(folder: str):
  for name in (_INFO, "features.json"):
    read_json_object(os.path.join(folder, name))  # its errors name the file
  import tensorflow_datasets as tfds

  return tfds.builder_from_directory(folder)


def _split(folder: str):
  info = _builder(folder).info
  found, needed = {*(info.features or ())}, {*features()}
  if {*info.splits} != {SPLIT} or found != needed:
    raise ValueError(
      f"{folder}: a TFDS dataset with the splits {sorted(info.splits)} and the features"
      f" {sorted(found)}; only those of `mooer-jax data prepare` are read, which have {[SPLIT]} and"
      f" {sorted(needed)}"
    )
  return info.splits[SPLIT]


def _count(folder: str) -> int:
  """The number of utterances; raises ValueError if the files do not have as many."""
  from tensorflow_datasets.core.file_adapters import ArrayRecordFileAdapter

  split = _split(folder)
  for path, count in zip(split.filepaths, split.shard_lengths, strict=True):
    try:
      found = ArrayRecordFileAdapter.num_examples(path)
    except RuntimeError as error:
      found = str(error)
    if found != count:
      raise ValueError(
        f"{path}: must hold {count} utterances, but has {found}; copy the file again, or prepare"
        " the dataset again"
      )
  return split.num_examples
