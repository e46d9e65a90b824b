"""The frames of frozen encoders, computed once before training."""

import hashlib
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from mooer_jax import speech_llm, tree
from mooer_jax.config import SpeechLLMConfig, to_json
from mooer_jax.data import annotation
from mooer_jax.data.batches import input_padding
from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import hear
from mooer_jax.data.feature_cache import EncodedCache, digest
from mooer_jax.data.shards import Skip
from mooer_jax.data.utterances import read, shard_names
from mooer_jax.files import lock_folder
from mooer_jax.run.config import Run
from mooer_jax.speech_llm import Batch
from mooer_jax.training.sharding import batch_sharding

# Raise it when the same weights and audio come to give other frames: what was cached is then old.
FRAMES_VERSION = 2


def fill_cache(run: Run, params: dict, mesh) -> EncodedCache:
  """Runs the encoders over all clips of the data set whose frames are not there.

  What is cached belongs to these encoders and their weights: with others, a folder of its own is
  filled. A clip is encoded once, whatever is asked about it and under whatever keys, and anew when
  its audio has changed. An interrupted pass goes on where it stopped.

  Args:
    run: with data.cache_features.
    params: of the whole model, on the mesh.
    mesh: where the encoders run.

  Raises:
    ValueError: if an encoder is trained, or there is no checkpoint that it comes from.
  """
  trained, _ = tree.partition(params, run.trainable)
  if moving := [p for p in tree.flatten(trained) if p.startswith(("encoders/", "frontend/"))]:
    raise ValueError(
      f"data.cache_features keeps what frozen encoders give, but {moving[0]} is trained; leave the"
      " encoders out of config.trainable, or unset data.cache_features"
    )
  if run.init_from is None:
    raise ValueError("data.cache_features needs the trained encoders of init_from")
  model = run.model
  widths = {encoder.kind: encoder.hidden_size for encoder in model.encoders}
  folder, name = Path(run.data.cache_features) / _stamp(run, params), dataset_name(run.data)
  cache = EncodedCache(folder, widths)
  if cache.complete(name):
    return cache
  with lock_folder(folder):
    cache = EncodedCache(folder, widths)  # another process may have written since
    _fill(cache, run, params, mesh)
    cache.mark_complete(name)
  return cache


def _fill(cache: EncodedCache, run: Run, params: dict, mesh) -> None:
  model = run.model
  encode = jax.jit(lambda params, batch: speech_llm.encode_each(params, batch, model))
  needed = {part: params.get(part, {}) for part in ("frontend", "encoders")}
  passed: Counter[str] = Counter()
  begun = (
    (clips, encode(needed, jax.device_put(clips.batch, batch_sharding(mesh))))
    for clips in uncached_batches(run.data, model, known={*cache.names()}, passed=passed)
  )
  with Progress(console=Console(stderr=True)) as progress:
    bar = progress.add_task("encoding", total=None)
    now = next(begun, None)
    while now:
      clips, streams = now
      now = next(begun, None)  # is read while the devices work on the one before
      by_name = jax.device_get(streams)
      in_order = [by_name[encoder] for encoder in cache.widths]  # jit has sorted the names
      cache.write([
        (digest, [x_BTD[row][valid_BT[row]] for x_BTD, valid_BT in in_order], seconds)
        for row, (digest, seconds) in enumerate(zip(clips.digests, clips.seconds, strict=True))
      ])  # fmt: skip
      progress.update(bar, completed=len(cache), description=f"encoded {len(cache)} clips")
  if passed:
    causes = ", ".join(f"{cause}: {n}" for cause, n in passed.most_common())
    print(f"not encoded: {causes}; the training says which, in skipped.jsonl")


def _stamp(run: Run, params: dict) -> str:
  """Names what the frames follow from, besides the audio; all stages of a training share it."""
  described = to_json(run.model)
  names = ("encoders", "frontends", "min_audio_s", "channel")
  of = {name: described[name] for name in names}
  of["version"] = FRAMES_VERSION
  of["weights"] = _hash({part: params.get(part, {}) for part in ("frontend", "encoders")})
  of["cut"] = run.data.max_s if run.data.truncate else 0
  of["dtype"] = run.model.compute.dtype
  text = json.dumps(of, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _hash(params: dict) -> str:
  digest = hashlib.blake2b(digest_size=8)
  for path, x in sorted(tree.flatten(params).items()):
    digest.update(path.encode())
    digest.update(np.asarray(x).tobytes())
  return digest.hexdigest()


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
  pad = input_padding(config, model)
  utterances = itertools.chain.from_iterable(map(read, shard_names(config.shards)))
  found = _uncached(utterances, config, model, known=known, passed=passed)
  none_BS = np.zeros((config.batch_size, 0), np.int32)
  while some := list(itertools.islice(found, config.batch_size)):
    digests, clips, seconds = zip(*some, strict=True)
    features, frames = pad(clips)
    yield Clips(Batch(features, frames, none_BS, none_BS, none_BS), digests, seconds)


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
