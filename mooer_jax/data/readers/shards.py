"""Shards: tars in which the files of an utterance are adjacent, of WeNet and WebDataset."""

import collections
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from mooer_jax import storage
from mooer_jax.data.readers.entries import TEXT, RawUtterance, SkippedUtterance, is_text
from mooer_jax.data.readers.tars import (
  AUDIO_SUFFIXES,
  TARS,
  VIDEO_SUFFIXES,
  DamagedShard,
  read_members,
)
from mooer_jax.files import LFS_POINTER, LFS_REMEDY

_SLOTS = dict.fromkeys(AUDIO_SUFFIXES, "audio") | dict.fromkeys(VIDEO_SUFFIXES, "video")
_READ = ("txt", "json", *_SLOTS)
_TOGETHER = (
  "the members of an utterance must be adjacent; if others are elsewhere in the tar, create it"
  " again with tar --sort=name"
)


def read_list(path: str | Path) -> list[str]:
  """Returns the paths and URLs of the tars of a `data.list`, itself a path or URL.

  Relative paths start at the list's folder.

  Raises:
    FileNotFoundError: if the list or a shard that it names does not exist.
    OSError: if the list is not a regular file.
    ValueError: if it is empty, names a shard twice, or contains lines of JSON.
    RemoteError: if a URL cannot be read.
  """
  path = str(path)
  try:
    if path.endswith(TARS):
      raise ValueError(f"{path}: is a tar; name its folder, or a list with its path on a line")
    lines = [line for line in map(str.strip, read_lines(path)) if line]
  except FileNotFoundError as error:
    advice = "no such list of shards; `mooer-jax pack` writes one"
    raise FileNotFoundError(f"{path}: {advice}") from error
  if not lines:
    raise ValueError(f"{path}: lists nothing; write one tar path a line, or one JSON object")
  for line in lines:
    if line.startswith("{"):
      raise ValueError(
        f"{path}: {line[:80]!r} is JSON, but the first line is a path; write two lists, and name"
        " the one to read"
      )
  shards = [storage.join(storage.parent(path), line) for line in lines]
  if (most := collections.Counter(shards).most_common(1)[0])[1] > 1:
    raise ValueError(f"{path}: lists {most[0]} more than once; each utterance would repeat")
  found = storage.sizes(shards)
  if missing := [shard for shard in shards if shard not in found]:
    raise FileNotFoundError(
      f"{path}: {len(missing)} of {len(shards)} shards do not exist, first {missing[0]}"
    )
  return shards


def read_lines(path: str | Path) -> list[str]:
  """Lines of a file; errors as of `storage.open_binary` and `split_lines`."""
  return split_lines(storage.read_bytes(path), path)


def split_lines(content: bytes, path: str | Path) -> list[str]:
  """Lines of a UTF-8 file; raises ValueError for another, a CR in a line, or an LFS pointer."""
  if content.startswith(LFS_POINTER):
    raise ValueError(f"{path}: {LFS_REMEDY}")
  try:
    lines = content.decode("utf-8-sig").split("\n")
  except UnicodeDecodeError as error:
    number = content.count(b"\n", 0, error.start) + 1
    raise ValueError(f"{path}:{number}: not UTF-8; convert the file to UTF-8") from error
  for number, line in enumerate(lines, 1):
    if "\r" in line.rstrip("\r"):
      raise ValueError(f"{path}:{number}: a carriage return within the line; end lines with \\n")
  return lines


def read_shard(path: str) -> Generator[RawUtterance | SkippedUtterance]:
  """Yields the utterances of a tar, in order, each either complete or skipped.

  Members of one utterance are adjacent, in any order, and share the name up to the last dot: audio,
  the transcript (.txt) and further fields (.json), among them "text", which takes the place of a
  .txt, "task" and "Q". Members with other suffixes than AUDIO_SUFFIXES and VIDEO_SUFFIXES are
  ignored, as are macOS' `._NAME` and .DS_Store.
  """
  damaged = DamagedShard  # see `read_members`
  seen: dict[str, bool] = {}
  key = ""
  parts: dict[str, tuple[str, bytes]] = {}
  try:
    for stem, suffix, content in read_members(path, _READ):
      slot = _SLOTS.get(suffix, suffix)
      if parts and (stem != key or slot in parts):
        yield _utterance(key, parts, path, seen=seen)
        key, parts = "", {}
      key = stem
      parts[slot] = (suffix, content)
    if parts:
      yield _utterance(key, parts, path, seen=seen)
  except damaged as error:
    if error.stem != key and parts.keys() & {"audio", "video"} and parts.keys() & {"txt", "json"}:
      yield _utterance(key, parts, path, seen=seen)
      key = ""
    yield SkippedUtterance("bad shard", error.stem or key, path, str(error))


def _utterance(key, parts, shard, *, seen) -> RawUtterance | SkippedUtterance:
  suffix, audio = parts.get("audio") or parts.get("video") or ("", b"")
  about: dict[str, Any] = {}
  problem = ""
  if "json" in parts:
    about, problem = _about(f"{key}.json", parts["json"][1], with_text="txt" not in parts)
  _, text = parts.get("txt", ("", str(about.get("text", "")).encode("utf-8", "surrogatepass")))
  complete = bool(suffix) and ("txt" in parts or "text" in about)
  detail = "only " + ", ".join(f".{s}" if s else "no suffix" for s, _ in parts.values())
  if key in seen:
    if seen[key]:
      return SkippedUtterance("duplicate key", key, shard)
    return SkippedUtterance("members apart", key, shard, f"{detail} here; {_TOGETHER}")
  seen[key] = complete
  task, question = about.get("task", ""), about.get("Q", "")
  raw = RawUtterance(key, shard, suffix, audio, text, task, question, about=about)
  if problem and suffix:
    return raw.skip("bad task", problem)
  if not complete:
    return raw.skip("no transcript" if suffix else "no audio", f"{detail}; {_TOGETHER}")
  return raw


def _about(name: str, content: bytes, *, with_text: bool) -> tuple[dict[str, Any], str]:
  """The fields of a .json, without those of a wrong type, and what is wrong with it."""
  try:
    about = json.loads(content)
    if not isinstance(about, dict):
      raise ValueError(f"{str(about)[:40]!r} is not an object")
  except (ValueError, RecursionError) as error:
    return {}, f"{name}: {error}"
  wrong = {field: TEXT for field in ("task", "Q") if not is_text(about.get(field, ""))}
  if with_text and not isinstance(about.get("text", ""), str):
    wrong["text"] = "a string"
  problem = next((f"{name}: {field} must be {kind}" for field, kind in wrong.items()), "")
  return {field: value for field, value in about.items() if field not in wrong}, problem
