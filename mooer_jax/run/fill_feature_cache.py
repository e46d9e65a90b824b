"""Encoder frames of all clips, computed once before training."""

import dataclasses
import hashlib
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress

from mooer_jax import hosts, speech_llm, storage, tree
from mooer_jax.config import SpeechLLMConfig, to_json
from mooer_jax.data.batches import input_padding
from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import load_features
from mooer_jax.data.feature_cache import EncodedCache, digest
from mooer_jax.data.readers import audio_files, read, shard_names
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance
from mooer_jax.data.sources import list_sources
from mooer_jax.files import lock_folder
from mooer_jax.run.config import Run
from mooer_jax.sharding import batch_sharding, make_mesh
from mooer_jax.speech_llm import Batch

# Raise it when the same weights and audio give other frames, so that old caches are not used.
FRAMES_VERSION = 2


def fill_cache(run: Run, params: dict, mesh) -> EncodedCache:
  """Runs the encoders over all clips of the data set that are not in the cache.

  A cache belongs to the encoders and their weights; other weights fill another folder. A clip is
  encoded once, for all prompts and keys, and again if its audio changes. An interrupted pass
  resumes. With several processes, each encodes its share of the shards on its own devices, and
  writes a part of the cache.

  Raises:
    ValueError: if an encoder is trained, or there is no init_from.
  """
  trained, _ = tree.partition(params, run.trainable)
  if moving := [p for p in tree.flatten(trained) if p.startswith(("encoders/", "frontend/"))]:
    raise ValueError(
      f"data.cache_features needs frozen encoders, but {moving[0]} is trained; leave the encoders"
      " out of config.trainable, or unset data.cache_features"
    )
  if run.init_from is None:
    raise ValueError("data.cache_features needs the trained encoders of init_from")
  params = hosts.whole({part: params.get(part, {}) for part in ("frontend", "encoders")})
  number, processes = jax.process_index(), jax.process_count()
  rows = run.data.batch_size
  if processes > 1:
    mesh = make_mesh(devices=jax.local_devices())
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    rows = -(-rows // (processes * mesh.size)) * mesh.size
  data = dataclasses.replace(run.data, batch_size=rows, shuffle_buffer_size=rows)
  widths = {encoder.kind: encoder.hidden_size for encoder in run.model.encoders}
  folder = Path(run.data.cache_features) / _stamp(run, params)
  name = hosts.on_first(lambda: dataset_name(run.data))
  if not hosts.on_first(lambda: EncodedCache(folder, widths).complete(name)):
    with lock_folder(own := folder / f"process{number}" if number else folder):
      hosts.on_first(lambda: EncodedCache(folder, widths).repair())
      known = EncodedCache(folder, widths).known
      run_of_process = dataclasses.replace(run, data=data)
      skipped = _fill(EncodedCache(own, widths), run_of_process, params, mesh=mesh, known=known)
      causes = sum((Counter(counts) for counts in hosts.gather(skipped)), Counter())
      if causes:
        said = ", ".join(f"{cause}: {n}" for cause, n in causes.most_common())
        hosts.say(f"not encoded: {said}; training lists them in skipped.jsonl")
      hosts.on_first(lambda: EncodedCache(folder, widths).mark_complete(name))
  cache = EncodedCache(folder, widths)
  if len(numbers := {*hosts.gather(len(cache.known))}) > 1:
    raise ValueError(
      f"the processes see {min(numbers)} to {max(numbers)} clips in {folder}; run the command again"
      " when the file system shows the same files to all hosts"
    )
  return cache


def _fill(cache: EncodedCache, run: Run, params: dict, *, mesh, known: set[str]) -> Counter[str]:
  """Adds the share of this process; returns the numbers of skipped clips by cause."""
  model = run.model

  @jax.jit
  def encode(params, batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for attention kernels
      return speech_llm.encode_each(params, batch, model)

  skipped: Counter[str] = Counter()
  process = jax.process_index(), jax.process_count()
  misses = cache_misses(run.data, model, known=known, skipped=skipped, process=process)
  started = (
    (digests, seconds, encode(params, jax.device_put(batch, batch_sharding(mesh))))
    for batch, digests, seconds in misses
  )
  with Progress(console=Console(stderr=True), disable=not hosts.is_first()) as progress:
    bar = progress.add_task("encoding", total=None)
    current = next(started, None)
    while current:
      digests, seconds, streams = current
      current = next(started, None)  # is read while the devices work on the previous one
      by_name = jax.device_get(streams)
      in_order = [by_name[encoder] for encoder in cache.widths]  # jit has sorted the names
      cache.write([
        (digests[row], [x_BTD[row][valid_BT[row]] for x_BTD, valid_BT in in_order], seconds[row])
        for row in range(len(digests))
      ])  # fmt: skip
      progress.update(
        bar, completed=len(cache.clips), description=f"encoded {len(cache.clips)} clips"
      )
  return skipped


def _stamp(run: Run, params: dict) -> str:
  """Hash of everything that determines the frames, besides the audio."""
  described = to_json(run.model)
  of = {name: described[name] for name in ("encoders", "frontends", "min_audio_s", "channel")} | {
    "version": FRAMES_VERSION,
    "weights": tree.digest(params),
    "cut": run.data.max_s if run.data.truncate else 0,
    "dtype": run.model.compute.dtype,
  }
  text = json.dumps(of, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def cache_misses(
  config: DataConfig,
  model: SpeechLLMConfig,
  *,
  known: set[str],
  skipped: Counter[str],
  process: tuple[int, int] = (0, 1),
) -> Generator[tuple[Batch, tuple[str, ...], tuple[float, ...]]]:
  """One pass over the clips within the limits of length that a cache lacks, each of them once.

  The data sets of a mixture are read one after another, whatever their weights.

  Clips that cannot be decoded are counted only; training skips them again and reports the keys.
  Utterances without audio have no frames.

  Args:
    config, model: shards, batch size, buckets and limits of length; the features.
    known: digests of the cached clips; those that are read are added.
    skipped: numbers of skipped clips by cause, which are added to.
    process: index of this process and their number, which share the shards.

  Yields:
    (batch without prompts and labels, digests and lengths in seconds of the clips in its rows).

  Raises:
    FileNotFoundError, ValueError: for a bad list, or buckets too short.
  """

  def entries():
    for source in list_sources(config):
      for shard in shard_names(source.shards)[index::processes]:
        yield from map(source.filter.select, read(shard))

  def misses():
    for entry in entries():
      if entry is None or (isinstance(entry, RawUtterance) and not entry.has_audio):
        continue
      raw = entry.load()
      if isinstance(raw, SkippedUtterance):
        skipped[raw.cause] += 1
      elif (name := digest(raw)) in known:
        continue
      elif isinstance(found := load_features(raw, config, model), SkippedUtterance):
        skipped[found.cause] += 1
      else:
        known.add(name)
        yield name, *found

  index, processes = process
  pad, found = input_padding(config, model), misses()
  none_BS = np.zeros((config.batch_size, 0), np.int32)
  while some := list(itertools.islice(found, config.batch_size)):
    digests, clips, seconds = zip(*some, strict=True)
    features, frames = pad(clips)
    yield Batch(features, frames, none_BS, none_BS, none_BS), digests, seconds


def dataset_name(config: DataConfig) -> str:
  """Identifies the clips of a data set: its files, as they are now, and the limits of length."""
  sources, files = list_sources(config), []
  paths = [*itertools.chain.from_iterable(audio_files(source.shards) for source in sources)]
  found = storage.stats({*paths})
  for path in paths:
    state = f"{found[path].size} {found[path].version}" if path in found else "absent"
    files.append(f"{path} {state}")
  crc = zlib.crc32("\n".join(files).encode())
  filters = " | ".join(source.filter.text for source in sources)
  # One line of a file; a filter may have several.
  return " ".join(f"{crc:08x} {config.min_s} {config.max_s} {filters}".split())
