"""Files that are replaced as a whole, JSON files, locks of folders; what all commands share."""

import argparse
import contextlib
import difflib
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LOCK_FILE = ".lock"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_REMEDY = "a Git LFS pointer: run git lfs pull"


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
  """Yield a path beside `path` to write to; when the block succeeds, it replaces `path`.

  The folder is created if needed. The temporary name is unique, so concurrent writers do not mix
  their content, and the content is on the disk before the rename. If the block fails, `path` is
  unchanged.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
  try:
    with write_errors_name(path, instead_of=beside):
      yield beside
      with open(beside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
  finally:
    beside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, *, allow_nan: bool = True) -> None:
  """Replace a JSON file; raises as `json.dumps`, before anything is written.

  A lone surrogate, of a file name that is not UTF-8, is written as the escape that JSON has for it.
  """
  text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan)
  with replace_file(path) as beside:
    beside.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def write_errors_name(path: str | Path, *, instead_of: Path | None = None) -> Iterator[None]:
  """Add a path to an OSError of the block that has none, such as that of a full disk.

  Args:
    path: to name in the error.
    instead_of: a temporary file, which `path` replaces in errors that name it.
  """
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename not in (None, instead_of and str(instead_of)):
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


class ArgumentParser(argparse.ArgumentParser):
  """Reports an unknown flag with the usage of its subcommand and the flag of a similar name."""

  def parse_known_args(self, args=None, namespace=None):
    namespace, unknown = super().parse_known_args(args, namespace)
    if unknown:
      flags = re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", self.format_help())
      given = unknown[0].partition("=")[0].replace("_", "-")
      similar = difflib.get_close_matches(given, flags, n=1)
      hint = f"; did you mean {similar[0]}?" if similar else ""
      self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return namespace, unknown


def discard_stdout() -> int:
  """Exit status after a BrokenPipeError of stdout, as of `| head`; the flush at exit is silent."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 128 + signal.SIGPIPE


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
  """Turn SIGTERM into SystemExit with status 143, so that `finally` blocks run as on Ctrl-C.

  A program that handles SIGTERM keeps its handler.
  """
  in_main = threading.current_thread() is threading.main_thread()  # others cannot set handlers
  if not in_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
    yield
    return
  process = os.getpid()

  def handle(number, frame):
    del frame
    if os.getpid() != process:  # a forked worker
      os._exit(128 + number)
    signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the cleanup
    sys.exit(128 + number)

  before = signal.signal(signal.SIGTERM, handle)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def read_json_object(path: str | Path) -> dict[str, Any]:
  """Read a JSON file that holds an object; a byte order mark is allowed.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is a folder or a pipe; and as `parse_json_object`.
  """
  if Path(path).exists() and not Path(path).is_file():
    kind = "folder" if Path(path).is_dir() else "pipe or device"
    raise ValueError(f"{path}: is a {kind}; must be a JSON file")
  return parse_json_object(Path(path).read_bytes(), path)


def parse_json_object(content: bytes, path: str | Path) -> dict[str, Any]:
  """The object in the content of a JSON file; `path` is its name in errors.

  Raises:
    ValueError: if it is a Git LFS pointer, not UTF-8, not JSON or not an object.
  """
  if content.startswith(LFS_POINTER):
    raise ValueError(f"{path}: {LFS_REMEDY}")
  try:
    value = json.loads(content.decode("utf-8-sig"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
  return value


def is_lfs_pointer(path: str | Path) -> bool:
  """Whether a file is a Git LFS pointer instead of its content, as after a clone without LFS."""
  with open(path, "rb") as file:
    return file.read(len(LFS_POINTER)) == LFS_POINTER


def cache_folder(name: str) -> Path:
  """A folder of this user's cache: $XDG_CACHE_HOME/mooer_jax/NAME, by default in ~/.cache."""
  caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  return Path(caches) / "mooer_jax" / name


@contextlib.contextmanager
def lock_folder(folder: str | Path, *, wait: bool = False) -> Iterator[None]:
  """Hold the lock of a folder, which is created if needed, so that no second process writes to it.

  The lock is an `flock` on the file `.lock`, which also works on NFS. The kernel releases it when
  the process ends, for whatever reason, so a lock is never left behind. A line is printed if the
  last process was killed while it held the lock, or if the file system has no locks, so that the
  block runs without one.

  Args:
    folder: to lock.
    wait: wait for another process that holds the lock.

  Raises:
    ValueError: if another process holds the lock; names its host, process id and start time. If
      there is a file in place of the folder.
  """
  import fcntl  # not on Windows; this module is imported by everything

  folder = Path(folder)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{folder}: is not a folder; choose another one")
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / LOCK_FILE
  with open(path, "a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(
        f"{folder} is in use by {_holder(file)[0]}; wait until it ends, stop it, or choose another"
        " folder"
      ) from None
    except OSError as error:
      print(f"{folder} cannot be locked ({error}); make sure that no other process writes to it")
      yield
      return
    (holder, host), here = _holder(file), socket.gethostname()
    if host:
      elsewhere = "" if host == here else "; if it still runs, stop one of the two"
      print(f"{folder}: {holder} ended without releasing its lock, which is taken over{elsewhere}")
    file.truncate(0)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    json.dump({"host": here, "pid": os.getpid(), "since": now}, file)
    file.flush()
    os.fsync(file.fileno())
    try:
      yield
    finally:
      file.truncate(0)


def _holder(file) -> tuple[str, str]:
  """Description and host of the process that wrote a lock file; the host is "" if none did."""
  file.seek(0)
  try:
    about = json.loads(file.read())
    return f"process {about['pid']} on {about['host']} since {about['since']}", about["host"]
  except (ValueError, KeyError, TypeError):  # empty, or the process was killed while it wrote
    return "another process", ""
