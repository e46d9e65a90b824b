"""Tar archives, read as streams."""

import gzip
import tarfile
import zlib
from collections.abc import Generator
from typing import NamedTuple

# Suffixes of audio members; the content determines the decoder.
AUDIO_SUFFIXES = (
  *("wav", "flac", "mp3", "m4a", "ogg", "opus", "wma", "webm", "aac"),
  *("aif", "aifc", "aiff", "amr", "au", "caf", "mka", "oga", "sph", "w64", "audio"),
)
VIDEO_SUFFIXES = ("mp4", "mkv", "mov", "avi", "3gp")  # used if no member is audio
IGNORED = ("._", ".DS_Store")  # names of files that macOS adds start with these


class DamagedShard(Exception):
  """A tar is truncated or damaged; the rest of it is lost.

  Attributes:
    at_end: whether the members before it are whole, and only the end of the tar is not as it
      should be.
  """

  def __init__(self, message: str, *, at_end: bool):
    super().__init__(message)
    self.at_end = at_end


class Member(NamedTuple):
  """A file of a tar.

  Attributes:
    stem, suffix: its name without the last dot and lowercase suffix; all of it without a suffix.
    content: empty if its suffix is not read.
  """

  stem: str
  suffix: str
  content: bytes


def read_members(path: str, suffixes: tuple[str, ...]) -> Generator[Member]:
  """Yields the files of a tar, in order, but for those that macOS adds.

  The tar, which may be compressed, is read as a stream: one file at a time is in memory.

  Args:
    suffixes: of the files whose content is read.

  Raises:
    DamagedShard: with the name of the file and the error.
  """
  # Local names, since a reader that is left open at exit outlives the module's globals.
  damage = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, OSError)
  at_end = False
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
        content = b""
        if suffix in suffixes:
          content = tar.extractfile(member).read()  # type: ignore[union-attr]  # it is a file
          if (size := len(content)) < member.size:
            raise tarfile.ReadError(f"{member.name} ends after {size} of {member.size} bytes")
        yield Member(stem if suffix else name, suffix, content)
      at_end = True
      _check_end(file, tar.offset)
  except damage as error:
    raise DamagedShard(f"{type(error).__name__}: {error}", at_end=at_end) from error


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
