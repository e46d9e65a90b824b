"""Kaldi-style lists: which clip has which transcript, and MooER's transcript normalisation."""

import dataclasses
import re
from pathlib import Path

from mooer_jax.data.shards import read_lines

_LATIN = "A-Za-zÀ-ÖØ-öø-ɏ"
_BETWEEN_LATIN = re.compile(rf"(?<=[{_LATIN}])\s+(?=[{_LATIN}])")
_LATIN_LETTER = re.compile(rf"[{_LATIN}]")
SPACE = "▁"


@dataclasses.dataclass(frozen=True)
class Clip:
  """An utterance to be packed: a whole recording, or the part from start_s to end_s of it."""

  key: str
  path: str
  text: str
  start_s: float | None = None
  end_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Unpacked:
  """An utterance that could not be packed."""

  cause: str
  key: str
  detail: str = ""


def normalise(text: str) -> str:
  """MooER's form of an ASR transcript.

  Latin letters in upper case, "▁" for the space between two of them, no other white space, no
  byte order mark.
  """
  text = _BETWEEN_LATIN.sub(SPACE, text.replace("\ufeff", "").strip())
  return _LATIN_LETTER.sub(_upper, re.sub(r"\s+", "", text))


def _upper(match: re.Match) -> str:
  upper = match.group().upper()
  return upper if len(upper) == 1 else match.group()  # ß stays, rather than become SS


def read_clips(
  wav_scp: str | Path, text: str | Path, segments: str | Path | None = None
) -> tuple[list[Clip], list[Unpacked]]:
  """Joins the lists by key, in the order of `text`.

  Args:
    wav_scp: `KEY path` a line; a relative path is taken from the present folder, as in Kaldi.
    text: `KEY transcript` a line; the transcript may be empty.
    segments: `KEY RECORDING start_s end_s` a line; RECORDING is then the key in wav_scp. An end of
      -1 is the end of the recording.

  Returns:
    The clips, and the keys that stand in one list but not in the other or twice.

  Raises:
    FileNotFoundError: if a list does not exist.
    ValueError: for a line without its fields, or a command (`… |`) in place of a path.
  """
  left_out: list[Unpacked] = []
  paths = _read_table(wav_scp, left_out)
  for key, path in paths.items():
    if not path:
      raise ValueError(f"{wav_scp}: {key!r} has no path; want `KEY path` a line")
    if path.endswith("|"):
      raise ValueError(f"{wav_scp}: {key!r} is a command, {path!r}; run it and list its output")
  texts = _read_table(text, left_out)
  if segments is None:
    parts: dict[str, tuple[str, float | None, float | None]] = {
      key: (key, None, None) for key in paths
    }
  else:
    parts = {
      key: _segment(segments, key, line) for key, line in _read_table(segments, left_out).items()
    }
  clips = []
  for key, transcript in texts.items():
    if key not in parts:
      missing = wav_scp if segments is None else segments
      left_out.append(Unpacked("no audio", key, f"not in {missing}"))
      continue
    recording, start_s, end_s = parts[key]
    if recording not in paths:
      left_out.append(Unpacked("no audio", key, f"recording {recording} is not in {wav_scp}"))
      continue
    clips.append(Clip(key, paths[recording], transcript, start_s, end_s))
  left_out += [
    Unpacked("no transcript", key, f"not in {text}") for key in parts if key not in texts
  ]
  return clips, left_out


def _read_table(path, left_out) -> dict[str, str]:
  if not Path(path).is_file():
    raise FileNotFoundError(f"{path}: no such list")
  table: dict[str, str] = {}
  for line in read_lines(Path(path)):
    if line.strip():
      key, _, rest = line.strip().replace("\t", " ", 1).partition(" ")
      if key in table:
        left_out.append(Unpacked("duplicate key", key, f"again in {path}"))
      else:
        table[key] = rest.strip()
  return table


def _segment(path, key, line) -> tuple[str, float, float]:
  try:
    recording, start_s, end_s = line.split()
    return recording, float(start_s), float(end_s)
  except ValueError:
    raise ValueError(
      f"{path}: {key!r} has {line!r}; want `KEY RECORDING start_s end_s` a line"
    ) from None
