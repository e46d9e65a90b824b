"""WeNet-style tar shards, read one utterance after another."""

import collections
import dataclasses
import gzip
import json
import tarfile
import zlib
from collections.abc import Generator
from pathlib import Path

from mooer_jax.audio.decode import CAUSES as AUDIO_CAUSES

SPACE = "▁"  # marks the space between two words in Latin letters in transcripts
# Suffixes of audio members; the content determines the decoder.
AUDIO_SUFFIXES = (
  *("wav", "flac", "mp3", "m4a", "ogg", "opus", "wma", "webm", "aac"),
  *("aif", "aifc", "aiff", "amr", "au", "caf", "mka", "oga", "sph", "w64", "audio"),
)
VIDEO_SUFFIXES = ("mp4", "mkv", "mov", "avi", "3gp")  # used if no member is audio
_SLOTS = dict.fromkeys(AUDIO_SUFFIXES, "audio") | dict.fromkeys(VIDEO_SUFFIXES, "video")
IGNORED = ("._", ".DS_Store")  # names of files that macOS adds start with these
CAUSES = (
  "bad shard",  # truncated or damaged tar; the rest of it is lost
  "duplicate key",
  "members apart",  # the members of an utterance are not adjacent
  "no audio",
  "no transcript",
  "transcript not UTF-8",
  "empty transcript",
  "bad task",  # the .json beside the audio cannot be read
  "unknown task",  # the model has no prompt for it
  "no question",
  "bad question",
  "prompt too long",
  "unknown character",  # the tokenizer has no token for it
  "answer too long",
  *AUDIO_CAUSES,
  "too long",
  "not cached",  # audio that changed after the cache was filled, or could not be decoded then
  "scores not finite",  # of the model, for this utterance
)
_TOGETHER = (
  "the members of an utterance must be adjacent; if others are elsewhere in the tar, create it"
  " again with tar --sort=name"
)


@dataclasses.dataclass(frozen=True)
class SkippedUtterance:
  """An utterance that was skipped."""

  cause: str  # one of CAUSES
  key: str  # empty if the shard is damaged between utterances
  shard: str  # path of the tar
  detail: str = ""
  text: str = ""  # the transcript, if known; evaluation scores it as not decoded
  task: str = ""  # the utterance's own task, if known


@dataclasses.dataclass(frozen=True)
class RawUtterance:
  """An utterance of a shard."""

  key: str
  shard: str
  suffix: str  # of the audio file, such as "wav"
  audio: bytes  # content of the audio file
  text: bytes  # reference text in UTF-8, such as the transcript
  task: str = ""  # the utterance's own task, if the shard has it
  question: str = ""  # replaces `{}` in prompts that take a question
  more: tuple[bytes, ...] = ()  # further audio files, which follow the first after a pause

  def skip(self, cause: str, detail: str = "") -> SkippedUtterance:
    try:
      text = self.transcript()
    except UnicodeDecodeError:
      text = ""
    return SkippedUtterance(cause, self.key, self.shard, detail, text, self.task)

  def transcript(self) -> str:
    """The reference text; raises UnicodeDecodeError if it is not UTF-8."""
    return self.text.decode("utf-8-sig").strip()


def read_list(path: str | Path) -> list[str]:
  """Returns the tar paths of a `data.list`; relative paths start at the list's folder.

  Raises:
    FileNotFoundError: if the list or a shard that it names does not exist.
    ValueError: if it is empty, names a shard twice, or contains URLs or JSON lines.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such list of shards; `mooer-jax pack` writes one")
  lines = [line for line in map(str.strip, read_lines(path)) if line]
  if not lines:
    raise ValueError(f"{path}: lists no shard; write one tar path a line")
  for line in lines:
    if line.startswith("{") or "://" in line:
      kind = "a JSON line" if line.startswith("{") else "a URL"
      raise ValueError(f"{path}: {line[:80]!r} is {kind}; only paths of tar files are read here")
  shards = [str(path.parent / line) for line in lines]
  if (most := collections.Counter(shards).most_common(1)[0])[1] > 1:
    raise ValueError(f"{path}: lists {most[0]} more than once; each utterance would repeat")
  if missing := [shard for shard in shards if not Path(shard).is_file()]:
    raise FileNotFoundError(
      f"{path}: {len(missing)} of {len(shards)} shards do not exist, first {missing[0]}"
    )
  return shards


def read_lines(path: Path) -> list[str]:
  """Lines of a UTF-8 file; raises ValueError with a line that is not UTF-8 or holds a CR."""
  content = path.read_bytes()
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

  Members of one utterance are adjacent, in any order, and share the name up to the last dot.
  Members with other suffixes than .txt, .json, AUDIO_SUFFIXES and VIDEO_SUFFIXES are ignored, as
  are macOS' `._NAME` and .DS_Store. The tar, which may be compressed, is read as a stream, so one
  utterance at a time is in memory.
  """
  seen: dict[str, bool] = {}
  key = ""
  parts: dict[str, tuple[str, bytes]] = {}
  # A local name, since a reader that is left open at exit outlives the module's globals.
  damage = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, OSError)
  try:
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
      while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # or it would remember every header
        if not member.isfile():
          continue
        # Escapes what is not UTF-8, since keys are written to text files.
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        name = name.removeprefix("./")
        if name.rpartition("/")[2].startswith(IGNORED):
          continue
        stem, dot, suffix = name.rpartition(".")
        suffix = suffix.lower() if dot and "/" not in suffix else ""
        stem = stem if suffix else name
        slot = _SLOTS.get(suffix, suffix)
        if parts and (stem != key or slot in parts):
          yield _utterance(key, parts, path, seen=seen)
          key, parts = "", {}
        key = stem
        content = b""
        if slot in ("txt", "audio", "video", "json"):
          content = tar.extractfile(member).read()  # type: ignore[union-attr]  # it is a file
          if (size := len(content)) < member.size:
            raise tarfile.ReadError(f"{member.name} ends after {size} of {member.size} bytes")
        parts[slot] = (suffix, content)
      if parts:
        yield _utterance(key, parts, path, seen=seen)
        key = ""
      _check_end(file, tar.offset)
  except damage as error:
    yield SkippedUtterance("bad shard", key, path, f"{type(error).__name__}: {error}")


def _utterance(key, parts, shard, *, seen) -> RawUtterance | SkippedUtterance:
  suffix, audio = parts.get("audio") or parts.get("video") or ("", b"")
  complete = bool(suffix) and "txt" in parts
  detail = "only " + ", ".join(f".{s}" if s else "no suffix" for s, _ in parts.values())
  if key in seen:
    if seen[key]:
      return SkippedUtterance("duplicate key", key, shard)
    return SkippedUtterance("members apart", key, shard, f"{detail} here; {_TOGETHER}")
  seen[key] = complete
  task = question = problem = ""
  try:
    about = json.loads(parts["json"][1]) if "json" in parts else {}
    task, question = about.get("task", ""), about.get("Q", "")
    if not isinstance(task, str) or not isinstance(question, str):
      raise ValueError("task and Q must be strings")
  except (ValueError, AttributeError, RecursionError) as error:
    problem = f"{key}.json: {error}"
    task = task if isinstance(task, str) else ""
  _, text = parts.get("txt", ("", b""))
  raw = RawUtterance(key, shard, suffix, audio, text, task, question)
  if not complete:
    return raw.skip("no transcript" if suffix else "no audio", f"{detail}; {_TOGETHER}")
  return raw.skip("bad task", problem) if problem else raw


def _check_end(file, offset):
  """Detects damaged headers, which tarfile takes for the end of the tar; a real end is zeros."""
  file.seek(0)
  if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7"):
    return  # compressed: the codec has its own checksum
  file.seek(offset)
  block = file.read(tarfile.BLOCKSIZE)
  if len(block) < tarfile.BLOCKSIZE:
    raise tarfile.ReadError(f"ends at byte {offset + len(block)} without the end-of-tar mark")
  if block.strip(b"\0"):
    raise tarfile.ReadError(f"damaged header at byte {offset}")
