"""What a cache of encoder frames lacks: clips, whatever is asked about them."""

import itertools
import os
import zlib
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data import annotation
from mooer_jax.data.batching import Padder
from mooer_jax.data.cache import digest
from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import hear
from mooer_jax.data.shards import Skip
from mooer_jax.data.stream import read, shard_names
from mooer_jax.speech_llm import Batch


class Clips(NamedTuple):
  """A batch without prompts and answers, and digest and length (seconds) of what is in its rows."""

  batch: Batch
  digests: tuple[str, ...]
  seconds: tuple[float, ...]


def uncached_batches(
  config: DataConfig, model: SpeechLLMConfig, *, known: set[str], passed: Counter[str]
) -> Generator[Clips]:
  """One pass over the clips within the limits of length that a cache lacks, each of them once.

  What cannot be heard is passed over; training, which meets it again, reports it by name.

  Args:
    config: shards, batch size, buckets, limits of length.
    model: what features its encoders take.
    known: digests of the clips that it has; those that are read are added.
    passed: counts what is passed over, by cause.

  Raises:
    FileNotFoundError, ValueError: for a bad list, or buckets too short.
  """
  pad = Padder(config, model)
  utterances = itertools.chain.from_iterable(map(read, shard_names(config.shards)))
  found = _uncached(utterances, config, model, known=known, passed=passed)
  none_BS = np.zeros((config.batch_size, 0), np.int32)
  while some := list(itertools.islice(found, config.batch_size)):
    digests, clips, seconds = zip(*some, strict=True)
    yield Clips(Batch(*pad(clips), none_BS, none_BS, none_BS), digests, seconds)


def _uncached(utterances, config, model, *, known, passed):
  for raw in utterances:
    if isinstance(raw, Skip):
      passed[raw.cause] += 1
    elif (name := digest(raw)) in known:
      continue
    elif isinstance(heard := hear(raw, config, model), Skip):
      passed[heard.cause] += 1
    else:
      known.add(name)
      yield name, *heard


def dataset_name(config: DataConfig) -> str:
  """Names what can be heard of a data set: its files, as they are now, and the limits of length."""
  annotated = annotation.is_annotation(config.shards)
  audio: Sequence[str | Path] = (
    annotation.audio_files(config.shards) if annotated else shard_names(config.shards)
  )
  files = "\n".join(map(_as_it_is, audio))
  return f"{zlib.crc32(files.encode()):08x} {config.min_s} {config.max_s}"


def _as_it_is(path: str | Path) -> str:
  try:
    found = os.stat(path)
  except FileNotFoundError:
    return f"{path} absent"
  return f"{path} {found.st_size} {found.st_mtime_ns}"
