"""The frames of frozen encoders, computed once before training."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from mooer_jax import speech_llm, tree
from mooer_jax.config import to_json
from mooer_jax.data.cache import EncodedCache
from mooer_jax.data.uncached import dataset_name, uncached_batches
from mooer_jax.run.config import Run
from mooer_jax.training.sharding import batch_sharding

# Raise it when the same weights and audio come to give other frames: what was cached is then old.
FRAMES_VERSION = 1


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
  widths = {encoder.kind: encoder.width for encoder in model.encoders}
  folder, name = Path(run.data.cache_features) / _stamp(run, params), dataset_name(run.data)
  cache = EncodedCache(folder, widths)
  if cache.complete(name):
    return cache
  with cache.alone():
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
  of["cut"] = run.data.max_s if run.data.cut_longer else 0
  of["dtype"] = run.model.compute.dtype
  text = json.dumps(of, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _hash(params: dict) -> str:
  digest = hashlib.blake2b(digest_size=8)
  for path, x in sorted(tree.flatten(params).items()):
    digest.update(path.encode())
    digest.update(np.asarray(x).tobytes())
  return digest.hexdigest()
