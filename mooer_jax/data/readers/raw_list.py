"""Raw lists of WeNet: a JSON object with "key", "wav" and "txt" on each line."""

import contextlib
import dataclasses
import functools
import math
import posixpath
import re
import sys
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from mooer_jax import storage
from mooer_jax.audio.decode import AudioError
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance, is_text, parse_line
from mooer_jax.data.readers.segments import SegmentError, SegmentReader
from mooer_jax.data.readers.tars import TARS

# `LIST#FIRST@START-END`: number of the first line, and where the lines are in the file.
_PART = re.compile(r"(.+)#(\d+)@(\d+)-(\d+)", re.DOTALL)
_LINES = 64  # of a part, which is shuffled as one shard; more if there would be too many parts
_MAX_PARTS = 1 << 17  # their names are in the memory of every worker
_BOM = b"\xef\xbb\xbf"
_REMEDY = 'write {"key": …, "wav": …, "txt": …} on one line, in UTF-8'
_NO_WAV = 'no "wav", which only tasks whose prompt contains <TextHere> do without'


def is_raw_list(path: str | Path) -> bool:
  """Whether the first line of a file that is not blank begins a JSON object."""
  if not storage.is_file(path):
    return False
  with storage.open_binary(path) as file:
    while line := file.readline(1 << 16):
      if line := line.removeprefix(_BOM).strip():
        return line.startswith(b"{")
  return False


def parts(path: str) -> list[str]:
  """Names of blocks of lines, which are read like shards.

  Raises:
    ValueError: if a line is the path of a tar.
  """
  starts, end = [], 0
  with storage.open_binary(path) as file:
    for number, line in enumerate(file):
      if number % _LINES == 0:
        starts.append(end)
      end += len(line)
      if not line.startswith(b"{") and line.strip().endswith(tuple(map(str.encode, TARS))):
        raise ValueError(
          f"{path}:{number + 1}: {line.strip()[:80].decode(errors='replace')!r} is the path of a"
          " tar, but the first line is JSON; write two lists, and name the one to read"
        )
  step = math.ceil(len(starts) / _MAX_PARTS)
  return [
    f"{path}#{first * _LINES + 1}@{starts[first]}-"
    f"{starts[first + step] if first + step < len(starts) else end}"
    for first in range(0, len(starts), step)
  ]


def list_of_part(name: str) -> str | None:
  """The list that has a part; None if the name is not one of `parts`."""
  match = _PART.fullmatch(name)
  return match[1] if match else None


def audio_files(path: str) -> list[str]:
  """The list, which has the segments, and the recordings that its lines name, in order."""
  with storage.open_binary(path) as file:
    fields = (parse_line(line, ("wav",)) for line in file)
    clips = {about["wav"]: None for about, problem in fields if not problem}
  folder = storage.parent(path)
  return [path, *(storage.join(folder, clip) for clip in clips if is_text(clip))]


def read_part(name: str) -> Generator[RawUtterance | SkippedUtterance]:
  """Yields the utterances of a part, in order, each with a loader of its audio, or skipped.

  Besides "key", "wav" (a URL, or relative to the folder of the list) and "txt", a line may have
  "start" and "end" in seconds (default: of the recording), "task", "Q", and other fields for
  data.filter. A line with "Q" may lack "wav": an utterance without audio.
  """
  match = _PART.fullmatch(name)
  assert match is not None
  path, (first, start, end) = match[1], map(int, match.groups()[1:])
  try:
    block = storage.read_range(path, start, end)
    if len(block) < end - start:
      raise OSError(f"{path}: shorter than when it was opened; start again")
  except OSError as error:
    yield SkippedUtterance("bad shard", "", name, str(error))
    return
  seen: set[str] = set()
  with contextlib.closing(SegmentReader()) as segments:
    for number, line in enumerate(block.split(b"\n"), first):
      if not line.removeprefix(_BOM).strip():
        continue
      about, problem = _fields(line)
      if problem:
        detail = f"{path}:{number}: {problem}; {_REMEDY}"
        yield SkippedUtterance("bad label", f"{posixpath.basename(path)}:{number}", name, detail)
      elif about["key"] in seen:
        yield SkippedUtterance("duplicate key", about["key"], name, f"{path}:{number}")
      else:
        yield _utterance(about, name, path, number, segments)
        seen.add(about["key"])


def _fields(line: bytes) -> tuple[dict[str, Any], str]:
  """The fields of a line, and what is wrong with them; of a segment also its "duration"."""
  about, problem = parse_line(line, ("key", "txt"))
  if not problem and not isinstance(about.get("wav"), str) and ("wav" in about or "Q" not in about):
    problem = f"no string 'wav': {line[:60]!r}"
  if problem:
    return about, problem
  wrong = next(_wrong(about), None)
  if wrong:
    return about, f"{wrong}={about[wrong]!r}"
  start_s, end_s = _segment(about)
  if end_s != -1:
    about["duration"] = end_s - start_s
  return about, ""


def _segment(about: Mapping[str, Any]) -> tuple[float, float]:
  """Start and end in seconds; (0, -1) is the whole recording."""
  start_s, end_s = about.get("start"), about.get("end")
  return (0.0 if start_s is None else start_s), (-1 if end_s is None else end_s)


def _wrong(about: dict[str, Any]) -> Iterator[str]:
  for name in ("key", "wav"):
    if name in about and (not is_text(about[name]) or not about[name].strip()):
      yield name
  if re.search(r"\s", about["key"]):  # keys are written to files of `KEY text` lines
    yield "key"
  for name in ("task", "Q"):
    if not is_text(about.get(name, "")):
      yield name
  for name in ("start", "end"):
    value = about.get(name)
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.inf
    if value is not None and ("wav" not in about or not abs(number) <= sys.float_info.max):
      yield name


def _utterance(
  about: dict[str, Any], shard: str, path: str, number: int, segments: SegmentReader
) -> RawUtterance:
  return RawUtterance(
    about["key"],
    shard,
    Path(about.get("wav", "")).suffix[1:].lower(),
    b"",
    about["txt"].encode("utf-8", "surrogatepass"),
    about.get("task", ""),
    about.get("Q", ""),
    about=about,
    has_audio="wav" in about,
    loader=functools.partial(_load, list_file=path, line=number, segments=segments),
  )


def _load(
  raw: RawUtterance, *, list_file: str, line: int, segments: SegmentReader
) -> RawUtterance | SkippedUtterance:
  if not raw.has_audio:
    return raw.skip("no audio", f"{list_file}:{line}: {_NO_WAV}")
  clip = storage.join(storage.parent(list_file), raw.about["wav"])
  segment = _segment(raw.about)
  try:
    audio = storage.read_bytes(clip) if segment == (0, -1) else segments.read(clip, *segment)
  except OSError as error:
    cause, detail = "no audio", f"{clip}: {error.strerror}" if error.strerror else str(error)
  except AudioError as error:
    cause, detail = error.cause, str(error)
  except SegmentError as error:
    cause, detail = "bad segment", str(error)
  else:
    return dataclasses.replace(raw, audio=audio)
  return raw.skip(cause, f"{list_file}:{line}: {detail}")
