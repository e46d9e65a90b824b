"""Emilia: tars of mp3 with a file of labels beside each, and the output of Emilia-Pipe.

Its other published layout, WebDataset, is that of `shards.read_shard`.

Source: He et al., "Emilia: An Extensive, Multilingual, and Diverse Speech Dataset" (2024).
"""

import contextlib
import dataclasses
import functools
import gzip
import json
import os
import posixpath
import re
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

from mooer_jax import storage
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance, as_key, parse_line
from mooer_jax.data.readers.tars import AUDIO_SUFFIXES, IGNORED, TARS, DamagedShard, read_members

_ALL_LABELS = "openemilia_all.tar.gz"  # of OpenDataLab: no audio


def find_shards(folder: str) -> list[str]:
  """The tars below a folder and the recordings that Emilia-Pipe processed, sorted.

  Raises:
    FileNotFoundError: if there are none.
  """
  files = {path: posixpath.basename(path) for path in storage.walk(folder)}
  found = [
    path
    for path, name in files.items()
    if not name.startswith(IGNORED)
    and ((name.endswith(TARS) and name != _ALL_LABELS) or is_recording(path))
  ]
  if not found:
    raise FileNotFoundError(
      f"{folder}: no tar of audio, and no NAME/NAME.json of Emilia-Pipe; name a folder that has"
      " some, or a data.list"
      + ("; datasets of `data prepare` must be local" if storage.is_url(folder) else "")
    )
  return found


def is_batch(name: str) -> bool:
  """Whether a tar has a file of labels beside it: `EN_B00000.jsonl` and `EN_B00000.tar.gz`."""
  return _labels_file(name) is not None


def read_batch(name: str) -> Generator[RawUtterance | SkippedUtterance]:
  """Yields the utterances of a tar in its order, with the labels of the file beside it.

  A line has "id", which is the name of the audio without its suffix, "text" and other fields. The
  labels of one tar are in memory, its audio is not. Labels without audio come last.
  """
  damaged = DamagedShard  # see `read_members`
  labels: dict[str, bytes] = {}
  file = _labels_file(name)
  assert file is not None
  for number, line in enumerate(_lines(file), 1):
    about, problem = parse_line(line, ("id", "text"))
    place = f"{os.path.basename(file)}:{number}"
    if problem:
      yield SkippedUtterance("bad label", place, name, problem)
    elif (key := as_key(about["id"])) in labels:
      yield SkippedUtterance("duplicate key", key, name, place)
    else:
      labels[key] = line
  seen: set[str] = set()
  try:
    for stem, suffix, audio in read_members(name, AUDIO_SUFFIXES):
      key = stem.rpartition("/")[2]
      if suffix not in AUDIO_SUFFIXES:
        continue
      if key in seen:
        yield SkippedUtterance("duplicate key", key, name)
      elif key not in labels:
        yield SkippedUtterance("no transcript", key, name, f"no line with this id in {file}")
      else:
        yield _utterance(key, name, suffix, audio, json.loads(labels.pop(key)))
      seen.add(key)
  except damaged as error:
    yield SkippedUtterance("bad shard", "", name, str(error))
    return
  for key in labels:
    yield SkippedUtterance("no audio", key, name, f"{file} has a line of it")


def is_recording(name: str) -> bool:
  """Whether this is the `NAME/NAME.json` of a recording that Emilia-Pipe processed."""
  path = Path(name)
  return path.suffix == ".json" and path.parent.name == path.stem


def read_recording(name: str) -> Generator[RawUtterance | SkippedUtterance]:
  """Yields the segments of a recording: a list of objects with "text", and NAME_INDEX.mp3.

  Each has a loader of its audio, or is skipped.
  """
  path = Path(name)
  try:
    segments = json.loads(storage.read_bytes(name))
    if not isinstance(segments, list):
      raise ValueError("it must be a list of segments")
  except storage.RemoteError:
    raise
  except (OSError, ValueError, RecursionError) as error:
    yield SkippedUtterance("bad shard", "", name, f"{type(error).__name__}: {error}")
    return
  pattern = re.compile(
    rf"{re.escape(path.stem)}_(\d+)\.({'|'.join(AUDIO_SUFFIXES)})", re.IGNORECASE
  )
  folder = storage.parent(name)
  files = {
    int(m[1]): storage.join(folder, file)
    for file in storage.file_names(folder)
    if (m := pattern.fullmatch(file))
  }
  for index, about in enumerate(segments):
    key = f"{as_key(path.stem)}_{index}"
    if not isinstance(about, dict) or not isinstance(about.get("text"), str):
      yield SkippedUtterance("bad label", key, name, f"segment {index} has no text")
    elif index not in files:
      yield SkippedUtterance("no audio", key, name, f"no {path.stem}_{index}.mp3 beside it")
    else:
      start, end = about.get("start"), about.get("end")
      if isinstance(start, int | float) and isinstance(end, int | float):
        about = {"duration": end - start, **about}
      raw = _utterance(key, name, Path(files[index]).suffix[1:].lower(), b"", about)
      yield dataclasses.replace(raw, loader=functools.partial(_load, clip=files[index]))


def _load(raw: RawUtterance, *, clip: str) -> RawUtterance | SkippedUtterance:
  try:
    return dataclasses.replace(raw, audio=storage.read_bytes(clip))
  except OSError as error:
    return raw.skip("no audio", str(error))


def _labels_file(name: str) -> str | None:
  ending = next((ending for ending in reversed(TARS) if name.endswith(ending)), None)
  if ending is None:
    return None
  beside = (name.removesuffix(ending) + kind for kind in (".jsonl", ".jsonl.gz"))
  return next((path for path in beside if storage.is_file(path)), None)


def _lines(file: str) -> Iterator[bytes]:
  """The lines that are not blank; the rest of a damaged file is one line, which cannot be read."""
  try:
    with storage.open_binary(file) as stored, contextlib.ExitStack() as unpacked:
      lines = unpacked.enter_context(gzip.open(stored)) if file.endswith(".gz") else stored
      yield from (line for line in lines if line.strip())
  except (OSError, EOFError, zlib.error) as error:
    yield f"{type(error).__name__}: {error}".encode()


def _utterance(key, shard, suffix, audio, about) -> RawUtterance:
  text = about["text"].encode("utf-8", "surrogatepass")
  return RawUtterance(key, shard, suffix, audio, text, about=about)
