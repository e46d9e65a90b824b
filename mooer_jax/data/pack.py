"""Packing of Kaldi-style lists of clips and transcripts into tar shards."""

import contextlib
import dataclasses
import io
import os
import shutil
import tarfile
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import regex

from mooer_jax import storage
from mooer_jax.audio.decode import AudioError, decode, read_file
from mooer_jax.data.readers.entries import SPACE
from mooer_jax.data.readers.segments import segment_slice
from mooer_jax.data.readers.shards import split_lines
from mooer_jax.data.readers.tars import AUDIO_SUFFIXES, IGNORED, VIDEO_SUFFIXES
from mooer_jax.data.workers import run_in_processes
from mooer_jax.files import LOCK_FILE, exit_on_sigterm, lock_folder, write_errors_name

_LATIN_LETTER = regex.compile(r"\p{Latin}")
_BETWEEN_LATIN = regex.compile(r"(?<=\p{Latin}\p{M}*) (?=\p{Latin})")
# Words of scripts that are written with spaces.
_WORDS = (
  r"[\p{L}\p{M}\p{N}--[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}"
  r"\p{Myanmar}\p{Tibetan}]]"
)
_LOST_SPACE = regex.compile(rf"(?V1)(?<={_WORDS}) (?={_WORDS})")


@dataclasses.dataclass(frozen=True)
class Clip:
  """An utterance to be packed: a recording, or its part from start_s to end_s."""

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


@dataclasses.dataclass(frozen=True)
class PackReport:
  """Result of `pack`."""

  data_list: str  # path of the list of shards
  shards: int  # number of tar files
  utterances: int  # number of utterances in them
  left_out: tuple[Unpacked, ...]  # could not be packed; also in `left_out.tsv` beside the list
  # Transcripts in which normalisation removed a space between two words, since only those between
  # Latin letters are kept.
  joined_words: int = 0


def pack(
  wav_scp: str | Path,
  text: str | Path,
  out: str | Path,
  *,
  segments: str | Path | None = None,
  per_shard: int = 1000,
  processes: int | None = None,
  normalise_text: bool = True,
  shuffle_seed: int | None = None,
  progress: bool = True,
) -> PackReport:
  """Writes `shards_%09d.tar`, `data.list` and `text` (the transcripts as packed) into a folder.

  Recordings that can be decoded (by their content, not their extension) are packed unchanged.
  Segments are extracted and stored as 16-bit wav. The folder appears at the end, complete, or not
  at all.

  Args:
    wav_scp, text, segments: lists, as for `read_clips`.
    out: the folder; must not exist, or be empty.
    processes: shards written at a time; None is the number of CPUs. More than one are spawned, so
      a script that calls this needs its `if __name__ == "__main__":`.
    normalise_text: whether transcripts are brought into MooER's form (see `normalise`).
    shuffle_seed: packs in a random order. Reading shuffles only whole shards and windows, so lists
      sorted by speaker or length are better shuffled here.

  Raises:
    FileNotFoundError: if a list does not exist.
    FileExistsError: if `out` has something in it.
    ValueError: for a malformed list, an option out of range, nothing to pack, an `out` that is a
      URL, or if another process packs to it.
  """
  out = storage.local(out, "out")
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise FileExistsError(f"{out}: exists already; remove it or choose another --out")
  for name, value, least in (
    ("per_shard", per_shard, 1), ("processes", processes, 1), ("shuffle_seed", shuffle_seed, 0)
  ):  # fmt: skip
    if value is not None and value < least:
      raise ValueError(f"{name}={value}: must be at least {least}")
  clips, left_out = read_clips(wav_scp, text, segments)
  joined_words = 0
  if normalise_text:
    normalised = [normalise(clip.text) for clip in clips]
    joined_words = sum(lost > 0 for _, lost in normalised)
    clips = [dataclasses.replace(c, text=t) for c, (t, _) in zip(clips, normalised, strict=True)]
  if shuffle_seed is not None:
    order = np.random.default_rng(shuffle_seed).permutation(len(clips))
    clips = [clips[i] for i in order]
  if not clips and not left_out:
    raise ValueError(f"{text}: nothing to pack; the lists are empty")
  with _partial_folder(out) as beside, exit_on_sigterm():
    done = []
    jobs = [clips[start : start + per_shard] for start in range(0, len(clips), per_shard)]
    written = _write_all(beside, jobs, processes=processes, progress=progress)
    with contextlib.closing(written):  # before the folder is removed: workers may write to it
      for name, packed, unpacked in written:
        left_out += unpacked
        if packed:
          done.append((name, packed))
    if not done:
      found = "; ".join(f"{u.cause}: {u.key} {u.detail}" for u in left_out[:3])
      raise ValueError(f"{text}: nothing to pack; {len(left_out)} utterances left out ({found} …)")
    with write_errors_name(beside):
      _write_lists(beside, done, left_out)
    (beside / LOCK_FILE).unlink()
    os.replace(beside, out)
  count = sum(len(packed) for _, packed in done)
  return PackReport(str(out / "data.list"), len(done), count, tuple(left_out), joined_words)


@contextlib.contextmanager
def _partial_folder(out: Path):
  """Yields an empty folder beside `out`, locked, which is removed unless it was renamed."""
  beside = out.with_name(f".{out.name}.partial")
  with lock_folder(beside):
    for left in beside.iterdir():  # by a process that was killed
      if left.name != LOCK_FILE:
        left.unlink()
    try:
      yield beside
    finally:
      shutil.rmtree(beside, ignore_errors=True)


def normalise(text: str) -> tuple[str, int]:
  """MooER's form of an ASR transcript, and the number of spaces between words that it lost.

  Unicode NFC; Latin letters, also with marks, in upper case; "▁" for the space between two of
  them; no other white space, no byte order mark.
  """
  text = unicodedata.normalize("NFC", text.replace("\ufeff", ""))
  text = _BETWEEN_LATIN.sub(SPACE, " ".join(text.split()))
  lost = len(_LOST_SPACE.findall(text))
  text = _LATIN_LETTER.sub(_upper, text.replace(" ", ""))
  return unicodedata.normalize("NFC", text), lost


def _upper(match: regex.Match) -> str:
  upper = match.group().upper()
  # ß stays, rather than become SS; ǰ becomes J with a mark.
  return upper if all(map(unicodedata.combining, upper[1:])) else match.group()


def read_clips(
  wav_scp: str | Path, text: str | Path, segments: str | Path | None = None
) -> tuple[list[Clip], list[Unpacked]]:
  """Joins the lists by key, in the order of `text`.

  Args:
    wav_scp: `KEY path` per line; relative paths start at the current folder, as in Kaldi.
    text: `KEY transcript` per line; the transcript may be empty.
    segments: `KEY RECORDING start_s end_s` per line; RECORDING is then the key in wav_scp. An end
      of -1 is the end of the recording.

  Returns:
    The clips, and the keys that are missing from a list, duplicate, or no name in a tar. A leading
    `./` of a key is removed, as by the reader of shards.

  Raises:
    FileNotFoundError: if a list does not exist.
    ValueError: for a line without its fields, or a command (`… |`) in place of a path.
  """
  left_out: list[Unpacked] = []
  paths = _read_table(wav_scp, left_out)
  for key, path in paths.items():
    if not path:
      raise ValueError(f"{wav_scp}: {key!r} has no path; write `KEY path` per line")
    if path.endswith("|"):
      raise ValueError(f"{wav_scp}: {key!r} is a command, {path!r}; run it and list its output")
  texts = _read_table(text, left_out)
  parts: dict[str, tuple[str, float | None, float | None]] = {k: (k, None, None) for k in paths}
  if segments is not None:
    lines = _read_table(segments, left_out)
    parts = {key: _segment(segments, key, line) for key, line in lines.items()}
  clips = []
  for key, transcript in texts.items():
    *folders, name = key.split("/")
    if {"", ".", ".."} & {*folders, name} or name.startswith(IGNORED) or "\0" in key:
      detail = "a relative path without `..`, whose name does not start with `._` or `.DS_Store`"
      left_out.append(Unpacked("bad key", key, f"in {text}; use {detail}"))
    elif key not in parts:
      left_out.append(Unpacked("no audio", key, f"not in {segments or wav_scp}"))
    elif (recording := parts[key][0]) not in paths:
      left_out.append(Unpacked("no audio", key, f"recording {recording} is not in {wav_scp}"))
    else:
      clips.append(Clip(key, paths[recording], transcript, *parts[key][1:]))
  left_out += [
    Unpacked("no transcript", key, f"not in {text}") for key in parts if key not in texts
  ]
  return clips, left_out


def _read_table(path, left_out) -> dict[str, str]:
  if Path(path).is_dir():
    raise ValueError(f"{path}: is a folder; give a list")
  if not Path(path).exists():  # it may be a pipe
    raise FileNotFoundError(f"{path}: no such list")
  table: dict[str, str] = {}
  for line in split_lines(Path(path).read_bytes(), path):
    if line.strip():
      key, _, rest = line.strip().replace("\t", " ", 1).partition(" ")
      key = key.removeprefix("./") or key
      if key in table:
        left_out.append(Unpacked("duplicate key", key, f"again in {path}"))
      else:
        table[key] = rest.strip()
  return table


def _segment(path, key, line) -> tuple[str, float, float]:
  """Recording, start and end of a line in the list of segments."""
  try:
    recording, start_s, end_s = line.split()
    return recording.removeprefix("./"), float(start_s), float(end_s)
  except ValueError:
    raise ValueError(
      f"{path}: {key!r} has {line!r}; write `KEY RECORDING start_s end_s` per line"
    ) from None


def _write_all(folder, jobs, *, processes, progress):
  """Yields (shard name, clips packed, left out), in order."""
  names = [str(folder / f"shards_{number:09d}.tar") for number in range(len(jobs))]
  return run_in_processes(
    write_shard,
    list(zip(names, jobs, strict=True)),
    processes=processes,
    progress="packing utterances" if progress else "",
    sizes=[len(job) for job in jobs],
  )


def write_shard(path: str, clips: Sequence[Clip]) -> tuple[str, list[Clip], list[Unpacked]]:
  """Writes a tar of the clips that can be read, if any.

  Returns its path, the clips in it, and those left out.
  """
  packed, left_out = [], []
  with (
    write_errors_name(path),
    tempfile.TemporaryFile(dir=os.path.dirname(path)) as spool,
    tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar,
  ):
    segments = _extract_segments(clips, spool)
    for clip in clips:
      found = _suffix_and_audio(clip, segments, spool)
      if isinstance(found, Unpacked):
        left_out.append(found)
        continue
      suffix, audio = found
      _add(tar, f"{clip.key}.txt", clip.text.encode())
      _add(tar, f"{clip.key}.{suffix}", audio)
      packed.append(clip)
  if not packed:
    os.remove(path)
  return path, packed, left_out


def _suffix_and_audio(clip, segments, spool) -> tuple[str, bytes] | Unpacked:
  """Suffix and content of a clip: its segment in the spool, or the whole recording."""
  if clip.start_s is None:
    suffix = Path(clip.path).suffix[1:].lower()
    suffix = suffix if suffix in (*AUDIO_SUFFIXES, *VIDEO_SUFFIXES) else "audio"
    audio = _attempt(clip, _read_recording)
    return audio if isinstance(audio, Unpacked) else (suffix, audio)
  place = segments[clip.key]
  if isinstance(place, Unpacked):
    return place
  spool.seek(place.start)
  return "wav", spool.read(place.stop - place.start)


def _extract_segments(clips, spool) -> dict[str, Unpacked | slice]:
  """Writes all segments into a file, so that each recording is decoded once, in any order.

  Returns each segment's slice of the file, or why it cannot be packed, by its key.
  """
  by_recording: dict[str, list[Clip]] = {}
  for clip in clips:
    if clip.start_s is not None:
      by_recording.setdefault(clip.path, []).append(clip)
  places: dict[str, Unpacked | slice] = {}
  for parts in by_recording.values():
    recording = _attempt(parts[0], decode)
    for clip in parts:
      if isinstance(recording, Unpacked):
        places[clip.key] = dataclasses.replace(recording, key=clip.key)
        continue
      audio = _segment_audio(clip, *recording)
      start = spool.tell()
      places[clip.key] = (
        audio if isinstance(audio, Unpacked) else slice(start, start + spool.write(audio))
      )
  return places


def _attempt(clip, read):
  """The result of `read` for the path of a clip, or why the clip cannot be packed."""
  try:
    return read(clip.path)
  except AudioError as error:
    return Unpacked(error.cause, clip.key, str(error))
  except (OSError, ValueError) as error:  # ValueError: a path with NUL
    reason = getattr(error, "strerror", None) or error
    return Unpacked("no audio", clip.key, f"{clip.path!r}: {reason}")


def _read_recording(path) -> bytes:
  """Content of a recording that can be decoded."""
  audio = read_file(path)
  decode(audio, name=path)
  return audio


def _segment_audio(clip, samples_NC, rate_hz) -> bytes | Unpacked:
  import soundfile

  part = segment_slice(clip.start_s, clip.end_s, samples=len(samples_NC), rate_hz=rate_hz)
  if part is None:
    length_s = len(samples_NC) / rate_hz
    detail = f"{clip.start_s} to {clip.end_s} s of {clip.path}, which has {length_s:.3f} s"
    return Unpacked("bad segment", clip.key, detail)
  part_NC = samples_NC[part]
  # Not soundfile's own rounding, which scales by 32767 and so changes every 16-bit recording.
  part_NC = np.clip(np.rint(part_NC * 32768.0), -32768, 32767).astype(np.int16)
  file = io.BytesIO()
  soundfile.write(file, part_NC, rate_hz, format="WAV", subtype="PCM_16")
  return file.getvalue()


def _add(tar, name, content):
  info = tarfile.TarInfo(name)
  info.size = len(content)
  tar.addfile(info, io.BytesIO(content))


def _write_lists(folder, done, left_out):
  lists = {
    "data.list": [Path(name).name for name, _ in done],
    "text": [f"{clip.key} {clip.text}".rstrip() for _, packed in done for clip in packed],
    "left_out.tsv": [f"{u.cause}\t{u.key}\t{u.detail}" for u in left_out],
  }
  for name, lines in lists.items():
    if lines:
      (folder / name).write_text("".join(f"{line}\n" for line in lines), "utf-8", newline="\n")
