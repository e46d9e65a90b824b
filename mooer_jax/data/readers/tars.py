"""Tar archives, read as streams."""

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Generator
from typing import NamedTuple

from mooer_jax import storage
from mooer_jax.data.readers.entries import as_key

# Suffixes of audio members; the content determines the decoder.
AUDIO_SUFFIXES = (
  *("wav", "flac", "mp3", "m4a", "ogg", "opus", "wma", "webm", "aac"),
  *("aif", "aifc", "aiff", "amr", "au", "caf", "mka", "oga", "sph", "w64", "audio"),
)
VIDEO_SUFFIXES = ("mp4", "mkv", "mov", "avi", "3gp")  # used if no member is audio
IGNORED = ("._", ".DS_Store")  # names of files that macOS adds start with these
TARS = (".tar", ".tar.gz", ".tgz")  # names of tars in folders end with these
# First bytes of compressed files. Unlike tarfile's own streams, these decoders verify checksums.
_DECODERS = (
  (b"\x1f\x8b\x08", gzip.open),
  (b"BZh", bz2.open),
  (b"\xfd7zXZ\0", lzma.open),
  (b"\x5d\0\0\x80", lzma.open),
)
# The ways in which a damaged file fails.
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)


class DamagedShard(Exception):
  """A tar is truncated or damaged; the rest of it is lost.

  Attributes:
    stem: name, without suffix, of the member whose content is damaged; "" if the damage is between
      the contents of two members, or at the end.
  """

  def __init__(self, message: str, *, stem: str):
    super().__init__(message)
    self.stem = stem


class Member(NamedTuple):
  """A file of a tar.

  Attributes:
    stem, suffix: its name, as a key, without the last dot and lowercase suffix; all of it without a
      suffix.
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
    RemoteError: if `path` is a URL and the connection is lost.
  """
  damage = _DAMAGE  # a local name, since a reader left open at exit outlives the module's globals
  reading = ""
  try:
    with storage.open_binary(path) as stored:
      first = stored.peek(8)
      decoder = next((decode for magic, decode in _DECODERS if first.startswith(magic)), None)
      stream = _Stream(decoder(stored) if decoder else stored)
      with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
          tar.members = []  # or it would remember every header
          if not member.isfile():
            continue
          name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
          name = as_key(name.removeprefix("./"))
          if name.rpartition("/")[2].startswith(IGNORED):
            continue
          stem, _, suffix = name.rpartition(".")
          suffix = suffix.lower() if stem and "/" not in suffix else ""
          content = b""
          stem = stem if suffix else name
          if suffix in suffixes:
            reading = stem
            content = tar.extractfile(member).read()
            if (size := len(content)) < member.size:
              raise tarfile.ReadError(f"{member.name} ends after {size} of {member.size} bytes")
          reading = ""
          yield Member(stem, suffix, content)
        _check_end(stream.read_again(tar.offset, tarfile.BLOCKSIZE), tar.offset)
        while decoder and stream.read(1 << 20):  # to the checksum behind the tar
          pass
  except damage as error:
    raise DamagedShard(f"{type(error).__name__}: {error}", stem=reading) from error


class _Stream:
  """A file that delivers all bytes before its damage, and remembers the last two reads."""

  def __init__(self, file):
    self._file, self._damage = file, None
    self._last, self._end = (b"", b""), 0

  def read(self, size: int) -> bytes:
    content = b""
    while len(content) < size and not self._damage:
      try:
        if not (more := self._file.read1(size - len(content))):
          break
        content += more
      except _DAMAGE as error:  # raised by the next read
        self._damage = error
    if self._damage and not content:
      raise self._damage
    self._last, self._end = (self._last[1], content), self._end + len(content)
    return content

  def read_again(self, start: int, size: int) -> bytes:
    """Bytes of the last two reads."""
    kept = b"".join(self._last)
    at = start - self._end + len(kept)
    return kept[at : at + size]


def _check_end(block: bytes, offset: int) -> None:
  """Detects damaged headers, which tarfile takes for the end of the tar; a real end is zeros."""
  if len(block) < tarfile.BLOCKSIZE:
    raise tarfile.ReadError(f"ends at byte {offset + len(block)} without the end-of-tar mark")
  if block.strip(b"\0"):
    raise tarfile.ReadError(f"damaged header at byte {offset}")
