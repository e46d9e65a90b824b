"""Files at local paths and at URLs of object stores (`s3://`, `gs://`), which fsspec opens.

`file://` is the URL of a local path. Schemes may be in capitals. A broken connection is retried; an
error of a local file system, such as a full disk, is not. Credentials, endpoints and regions are
those of the environment, as for the command-line tools of the store.
"""

import argparse
import collections
import contextlib
import errno
import functools
import io
import os
import posixpath
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

EXTRA = "pip install 'mooer-jax[remote]'"
WAITS_S = (1, 2, 4, 8, 16)  # before each further attempt
BLOCK_BYTES = 8 * 2**20  # of one request; a file is read ahead by as much
_BUFFER_BYTES = 2**18
# Errors that another attempt does not change; those of back ends by name, which may not be
# installed.
_PERMANENT = (PermissionError, IsADirectoryError, NotADirectoryError)
_PERMANENT_NAMES = ("NoCredentialsError", "PartialCredentialsError", "FileExpired")
# Errors of the local disk, also in a transfer from or to an object store.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_DISK = (*_FULL, errno.EROFS)
# What object stores call the version of a file; the first that a listing has.
_VERSIONS = ("ETag", "etag", "generation", "LastModified", "updated", "mtime", "created")


class Stat(NamedTuple):
  """Size of a file in bytes, and a value that changes with its content: mtime in ns, or ETag."""

  size: int
  version: int | str


class RemoteError(ValueError):
  """A URL could not be read or written, or not be copied to or from a local path.

  It is not an OSError, which readers of data take for a damaged file that may be skipped.
  """


def is_url(path: str | Path) -> bool:
  """Whether this is a URL rather than a local path."""
  return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def path_fault(path: str | os.PathLike) -> str:
  """Why a path is none in the local file system; "" if it may be.

  `Path` would make a relative path of a URL or of a `~`, so results would be written to a folder
  of that name in the current one.
  """
  text = os.fspath(path)
  if re.match("file:/", text, re.IGNORECASE):
    return "is a URL; write the local path without file://"
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # also the text of Path("s3://bucket/x")
    return "is a URL; name a local path, to which an object store may be mounted or copied"
  if text == "~" or text.startswith("~/"):
    return "starts with ~, which the shell has not expanded; write $HOME instead"
  return ""


def local(path: str | os.PathLike, name: str) -> Path:
  """The path in the argument `name`; raises ValueError if it is a URL or starts with ~."""
  if fault := path_fault(path):
    raise ValueError(f"{name}={os.fspath(path)}: {fault}")
  return Path(path)


def local_path(text: str) -> Path:
  """The path in an argument of a command, as a `type` of argparse."""
  if fault := path_fault(text):
    raise argparse.ArgumentTypeError(f"{text}: {fault}")
  return Path(text)


def absolute(path: str | Path) -> str:
  """An absolute path; a URL is one."""
  return str(path) if is_url(path) else os.path.abspath(path)


def join(folder: str, name: str) -> str:
  """The path of a file in a folder; `name` itself if it is a URL or absolute."""
  if is_url(name):
    return name
  protocol, mark, place = folder.partition("://")
  if not is_url(folder) or os.path.isabs(name):
    return str(Path(folder) / name)
  return protocol + mark + posixpath.normpath(posixpath.join(place, name))


def trim(url: str) -> str:
  """A URL without slashes at its end; raises ValueError if it names no bucket or folder."""
  if not is_url(trimmed := url.rstrip("/")):
    raise ValueError(
      f"{url}: names no bucket or folder; write s3://BUCKET/FOLDER or file:///FOLDER"
    )
  return trimmed


def parent(path: str) -> str:
  """The folder of a file."""
  return posixpath.dirname(path) if is_url(path) else str(Path(path).parent)


def is_file(path: str | Path) -> bool:
  """Whether there is a file at a path or a URL."""
  return _has_type(path, "file") if is_url(path) else os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
  """Whether there is a folder at a path, or files below a URL."""
  return _has_type(path, "directory") if is_url(path) else os.path.isdir(path)


def _has_type(url: str | Path, kind: str) -> bool:
  def type_of(fs, path) -> str:
    try:
      return fs.info(path)["type"]
    except (FileNotFoundError, NotADirectoryError):  # the latter below a file
      return ""

  return _call(str(url), type_of) == kind


def sizes(paths: Iterable[str]) -> dict[str, int]:
  """Bytes of the files that exist; URLs take one listing for each folder."""
  return {path: found.size for path, found in stats(paths).items()}


def stats(paths: Iterable[str]) -> dict[str, Stat]:
  """Sizes and versions of the files that exist; URLs take one listing for each folder."""
  found: dict[str, Stat] = {}
  folders: dict[str, list[str]] = collections.defaultdict(list)
  for path in paths:
    if is_url(path):
      folders[parent(path)].append(path)
    elif os.path.isfile(path):
      found[path] = stat_file(path)
  for folder, urls in folders.items():
    listed = {entry["name"]: entry for entry in listing(folder)}
    for url in urls:
      entry = listed.get(_strip(url))
      if entry is not None and entry["type"] == "file":
        found[url] = _stat(entry)
  return found


def stat_file(path: str) -> Stat:
  """Size and version of a file; raises as `open_binary`."""
  if is_url(path):
    return _stat(_call(path, lambda fs, at: fs.info(at)))
  found = os.stat(path)
  _check_regular(path, found.st_mode)
  return Stat(found.st_size, found.st_mtime_ns)


def walk(folder: str | Path) -> dict[str, Stat]:
  """The files below a folder, at any depth, in the order of their paths; {} if it is absent."""
  if not is_url(folder):
    found = {str(path): stat_file(str(path)) for path in Path(folder).rglob("*") if path.is_file()}
  else:
    url = trim(str(folder))
    below = len(_strip(url))
    try:
      entries = _call(url, lambda fs, at: fs.find(at, detail=True))
    except FileNotFoundError:
      entries = {}
    # Stores have empty files for folders, with names that end with a slash.
    entries = {name[below:]: of for name, of in entries.items() if not name.endswith("/")}
    found = {f"{url}{name}": _stat(of) for name, of in entries.items() if name}
  return {path: found[path] for path in sorted(found, key=lambda path: path.split("/"))}


def file_names(folder: str) -> list[str]:
  """Names of the files and folders in a folder."""
  if not is_url(folder):
    return os.listdir(folder)
  return [posixpath.basename(entry["name"].rstrip("/")) for entry in listing(folder)]


def listing(url: str) -> list[dict[str, Any]]:
  """The entries of a folder, with name (without protocol), type and size; [] if it is absent."""
  try:
    return _call(url, lambda fs, at: fs.ls(at, detail=True))
  except FileNotFoundError:
    return []


def open_binary(path: str | Path) -> io.BufferedReader:
  """Opens a file for reading; that of a URL is read in blocks, and resumes a broken connection.

  Raises:
    FileNotFoundError: if there is none.
    OSError: if it is a folder, a device or a pipe, which would block until something writes to it.
    RemoteError: if a URL cannot be read, also by each read.
  """
  if not is_url(path):
    _check_regular(path, os.stat(path).st_mode)
    return open(path, "rb")
  return io.BufferedReader(_RemoteFile(str(path)), _BUFFER_BYTES)


def read_bytes(path: str | Path) -> bytes:
  """The content of a file; errors as of `open_binary`."""
  with open_binary(path) as file:
    return file.read()


def read_range(path: str, start: int, end: int) -> bytes:
  """The bytes of a part of a file, fewer if it ends before; errors as of `open_binary`."""
  if is_url(path):
    return _call(path, lambda fs, at: fs.cat_file(at, start=start, end=end))
  with open_binary(path) as file:
    file.seek(start)
    return file.read(end - start)


def upload(file: Path, url: str) -> None:
  """Copies a local file to a URL, which then has all of it or is unchanged."""

  def put(fs, path):
    if _is_local(fs):  # `put_file` needs the folder, and leaves a part if it is interrupted
      os.makedirs(os.path.dirname(path), exist_ok=True)
      beside = f"{path}.tmp"
      try:
        os.replace(shutil.copyfile(file, beside), path)
      except OSError:  # as on a full disk
        Path(beside).unlink(missing_ok=True)
        raise
    else:
      fs.put_file(str(file), path, chunksize=BLOCK_BYTES)

  _call(url, put)


def download(url: str, file: Path) -> None:
  """Copies the file of a URL to a local path."""
  file.parent.mkdir(parents=True, exist_ok=True)

  def get(fs, path):
    try:
      fs.get_file(path, str(file))
    except OSError as error:
      if error.errno in _OF_DISK and error.filename is None:
        raise OSError(error.errno, error.strerror, str(file)) from error
      raise

  _call(url, get)


def delete(url: str) -> None:
  """Deletes a file or the files of a folder, if it exists."""
  fs, path = _open_file_system(url)
  if _is_local(fs):  # where folders remain without files
    with contextlib.suppress(FileNotFoundError):
      _attempt(url, lambda: fs.rm(path, recursive=True))
    return
  # Not `rm`, which takes characters such as [ for a pattern.
  for file in _attempt(url, lambda: fs.find(path)):
    with contextlib.suppress(FileNotFoundError):
      _attempt(url, functools.partial(fs.rm_file, file))


class _RemoteFile(io.RawIOBase):
  """A file of a URL; each read is attempted again, from the same position, when it fails."""

  def __init__(self, url: str):
    super().__init__()
    self._url = url
    options = {"block_size": BLOCK_BYTES, "cache_type": "readahead"}
    self._file = _call(url, lambda fs, at: fs.open(at, "rb", **options))

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    content = _attempt(self._url, lambda: self._read(len(buffer)))
    buffer[: len(content)] = content
    return len(content)

  def _read(self, size: int) -> bytes:
    content, length = self._file.read(size), getattr(self._file, "size", None)
    if size and not content and length is not None and self._file.tell() < length:
      raise ConnectionError(f"ends at byte {self._file.tell()} of {length}")
    return content

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def _check_regular(path: str | Path, mode: int) -> None:
  if not stat.S_ISREG(mode):
    pipe = "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
    kind = "a folder" if stat.S_ISDIR(mode) else pipe
    raise OSError(f"{path}: is not a regular file, but {kind}")


def _stat(entry: dict[str, Any]) -> Stat:
  version = next((str(entry[name]) for name in _VERSIONS if entry.get(name)), "")
  return Stat(entry["size"], version)


def _call(url: str, function: Callable[[Any, str], T]) -> T:
  """Calls a function with the file system and the path of a URL."""
  fs, path = _open_file_system(url)
  return _attempt(url, lambda: function(fs, path))


def _open_file_system(url: str) -> tuple[Any, str]:
  scheme, mark, place = url.partition("://")
  url = scheme.lower() + mark + place
  if scheme.lower() in ("http", "https"):
    raise ValueError(
      f"{url}: is a URL of the web, whose folders cannot be listed; use s3:// or gs://, or copy it"
    )
  if re.match("file://[^/]", url):  # fsspec would take it for a path in the current folder
    raise ValueError(f"{url}: the URL of a local path has three slashes: file:///FOLDER")
  try:
    import fsspec
  except ImportError as error:
    raise ValueError(
      f"{url}: URLs are read with fsspec, which is not installed: {EXTRA}"
    ) from error
  try:
    # Without its cache of listings, which does not see what other processes write. s3fs downloads
    # ten blocks of a file at once, by default of 50 MiB.
    return fsspec.core.url_to_fs(url, use_listings_cache=False, default_block_size=BLOCK_BYTES)
  except ImportError as error:
    raise ValueError(f"{url}: {error}, or {EXTRA}") from error
  except ValueError as error:
    raise ValueError(f"{url}: {error}; use s3:// or gs://") from error


def _is_local(fs) -> bool:
  from fsspec.implementations.local import LocalFileSystem

  return isinstance(fs, LocalFileSystem)


def _strip(url: str) -> str:
  """A URL as listings name it."""
  return _open_file_system(url)[1]


def _attempt(url: str, function: Callable[[], T]) -> T:
  """Calls a function, again if the connection breaks; errors name the URL."""
  for wait_s in (*WAITS_S, None):
    try:
      return function()
    except FileNotFoundError as error:
      raise FileNotFoundError(f"{url}: no such file, folder or bucket") from error
    except Exception as error:  # back ends raise many types
      cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
      if isinstance(error, OSError) and _is_of_disk(url, error):
        remedy = "free space" if error.errno in _FULL else "check its permissions and its mount"
        raise RemoteError(
          f"{url}: the local file system failed ({cause}); {remedy}, or choose another folder"
        ) from error
      if isinstance(error, _PERMANENT) or type(error).__name__ in _PERMANENT_NAMES:
        raise RemoteError(
          f"{url}: access failed ({cause}); check the address, and the credentials of the"
          " environment"
        ) from error
      if wait_s is None:
        raise RemoteError(
          f"{url}: no connection after {len(WAITS_S) + 1} attempts ({cause}); check the network and"
          " the address, and rerun the command"
        ) from error
      print(f"{url}: {cause}; next attempt in {wait_s} s", file=sys.stderr, flush=True)
      time.sleep(wait_s)
  raise AssertionError("the last attempt returns or raises")


def _is_of_disk(url: str, error: OSError) -> bool:
  """Whether an error is of a local file system; errors of stores have no name of a file."""
  is_of_file = error.errno is not None and error.filename is not None
  return url.lower().startswith("file:") or error.errno in _OF_DISK or is_of_file
