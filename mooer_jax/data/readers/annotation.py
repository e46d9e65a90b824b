"""SALMONN's annotation files: paths, texts, tasks and questions in one JSON."""

import dataclasses
import functools
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mooer_jax import storage
from mooer_jax.data.readers.entries import TEXT, RawUtterance, SkippedUtterance, as_key, is_text
from mooer_jax.files import parse_json_object

_AT_A_TIME = 64  # entries that are shuffled as one shard


def is_annotation(shards: str | Path) -> bool:
  """Whether this is an annotation file rather than a data.list."""
  return str(shards).endswith(".json")


def read_annotation(path: str) -> list[dict[str, Any]]:
  """The entries of `{"annotation": [{"path", "text", "task", "Q", "expand_wav"}, …]}`.

  Relative paths start at the file's folder. The file and the clips may be URLs.

  Raises:
    FileNotFoundError, OSError: if there is no such file, or it is not a regular one.
    ValueError: if it is not such JSON, or an entry (named by its number) lacks its path or text.
    RemoteError: if a URL cannot be read.
  """
  try:
    found = storage.stat_file(str(path))
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{path}: no such annotation file") from error
  return _entries(str(path), found)


@functools.lru_cache(maxsize=4)
def _entries(path: str, found: storage.Stat) -> list[dict[str, Any]]:
  del found  # reads a file again after a change
  entries = parse_json_object(storage.read_bytes(path), path).get("annotation")
  if not isinstance(entries, list) or not entries:
    raise ValueError(f'{path}: no entries; it must contain {{"annotation": [{{"path": …}}, …]}}')
  for number, entry in enumerate(entries):
    where = f"{path}: annotation[{number}]"
    if not isinstance(entry, dict):
      raise ValueError(f"{where} is {entry!r}, not an object")
    for name, default in (("path", None), ("text", None), ("task", ""), ("Q", "")):
      if not is_text(value := entry.get(name, default)):
        raise ValueError(f"{where} has {name}={value!r}; it must be {TEXT}")
    more = entry.get("expand_wav", [])
    if not isinstance(more, list) or not all(map(is_text, more)):
      raise ValueError(f"{where} has expand_wav={more!r}; it must be a list of paths")
  return entries


def entry_key(number: int, entry: Mapping[str, Any]) -> str:
  """The key of an entry's utterance: its number in the file and its clip's name."""
  return f"{number:07d}-{as_key(Path(entry['path']).stem)}"


def tasks(path: str) -> set[str]:
  """Tasks that the entries name."""
  return {entry["task"] for entry in read_annotation(path) if entry.get("task")}


def pieces(path: str) -> list[str]:
  """Names of the parts that are read like shards: `FILE.json#START`."""
  return [f"{path}#{start}" for start in range(0, len(read_annotation(path)), _AT_A_TIME)]


def audio_files(path: str) -> list[str]:
  """The clips that the entries name, in order."""
  return [clip for entry in read_annotation(path) for clip in _clips(path, entry)]


def _clips(path: str, entry: Mapping[str, Any]) -> list[str]:
  folder = storage.parent(path)
  return [storage.join(folder, clip) for clip in (entry["path"], *entry.get("expand_wav", []))]


def is_piece(name: str) -> bool:
  """Whether this is the name of a part, as of `pieces`, rather than of a shard."""
  return ".json#" in name


def read_piece(name: str) -> Generator[RawUtterance]:
  """Yields the utterances of a part, in order, each with a loader of its audio."""
  path, _, start = name.rpartition("#")
  first = int(start)
  for number, entry in enumerate(read_annotation(path)[first : first + _AT_A_TIME], first):
    yield RawUtterance(
      entry_key(number, entry),
      name,
      Path(entry["path"]).suffix[1:].lower(),
      b"",
      entry["text"].encode(),
      task=entry.get("task", ""),
      question=entry.get("Q", ""),
      about=entry,
      loader=functools.partial(_load, clips=_clips(path, entry)),
    )


def _load(raw: RawUtterance, *, clips: Sequence[str]) -> RawUtterance | SkippedUtterance:
  try:
    audio, *more = map(storage.read_bytes, clips)
  except OSError as error:
    named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return raw.skip("no audio", named)
  return dataclasses.replace(raw, audio=audio, more=tuple(more))
