"""Sizes and SHA-256 sums of the files of a checkpoint."""

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import jax

from mooer_jax.checkpoint.leaves import CheckpointError
from mooer_jax.checkpoint.steps import remedy
from mooer_jax.files import LFS_REMEDY, is_lfs_pointer

Sums = Mapping[str, tuple[int, str]]  # path below the checkpoint's folder -> bytes, SHA-256 (hex)

EDITABLE = ("config.json", "generation.json")  # users may change prompts, limits and defaults
_STAMPS = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax's: when and where it wrote


def hash_file(file: Path) -> str:
  """SHA-256 (hex) of a file."""
  with file.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def record(folder: Path, *, prefix: str = "", remember: bool = False) -> dict[str, tuple[int, str]]:
  """Size and SHA-256 of every file under a folder, by its path below the folder.

  Paths begin with `prefix`. With `remember`, unchanged files that were hashed in this process are
  not read again.
  """
  files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
  with _threads() as threads:
    sums = threads.map(_remembered if remember else hash_file, files)
    return {
      prefix + path.relative_to(folder).as_posix(): (path.stat().st_size, found)
      for path, found in zip(files, sums)
    }


def weights_hash(sums: Sums, folder: str, seed: str, *, stamped: bool = False) -> str:
  """SHA-256 (hex) of a seed and of the names and contents of the weights' files.

  The hash of `LazyArray` leaves is reproducible, so weights that are converted again remain the
  base of their fine-tunes. (Orbax writes arrays on devices into files of random names.)

  Args:
    sums: of the checkpoint.
    folder: "weights" or "trainable".
    seed: hash of the base of a fine-tune, else "".
    stamped: include the files with time and place of writing, as older checkpoints did.
  """
  digest = hashlib.sha256(seed.encode())
  paths = sorted(PurePosixPath(name) for name in sums if name.startswith(f"{folder}/"))
  for path in paths:
    if stamped or path.name not in _STAMPS:
      digest.update(f"{path.relative_to(folder)} {sums[str(path)][1]}\n".encode())
  return digest.hexdigest()


def check_sizes(folder: Path, sums: Sums) -> None:
  """Raise CheckpointError if a recorded file is missing or has another size, without reading it.

  The files that users may edit are not checked. `train_state` and `source` may be removed as a
  whole, since the weights are usable without them.
  """
  removed = [f"{name}/" for name in ("train_state", "source") if not (folder / name).exists()]
  names = [name for name in sums if not name.startswith((*EDITABLE, *removed))]
  _raise_first(folder, (_damage(folder / name, *sums[name]) for name in names))


def check(folder: Path, sums: Sums, names: Iterable[str]) -> None:
  """Raise CheckpointError if one of these files is missing or has changed.

  Each process checks its share; files that were checked in this process are not read again.
  """
  share = list(names)[jax.process_index() :: jax.process_count()]
  _raise_first(folder, damages(folder, {name: sums[name] for name in share}, remember=True))


def damages(
  folder: Path,
  sums: Sums,
  *,
  progress: Callable[[int, int], object] = lambda done, total: None,
  remember: bool = False,
) -> Iterator[str]:
  """Read all recorded files and yield a line for each that is missing or has changed.

  `progress` is called after each file with the numbers of checked bytes and of all bytes;
  `remember` is as for `record`.
  """
  read = _remembered if remember else hash_file
  with _threads() as threads:
    found = threads.map(lambda name: _damage(folder / name, *sums[name], read=read), sums)
    sizes = [size for size, _ in sums.values()]
    for done, damage in zip(itertools.accumulate(sizes), found):
      progress(done, sum(sizes))
      if damage:
        yield damage


def _raise_first(folder: Path, found: Iterable[str | None]) -> None:
  if damage := next(filter(None, found), None):
    raise CheckpointError(damage if LFS_REMEDY in damage else f"{damage}; {remedy(folder)}")


def _damage(
  path: Path, size: int, saved: str, *, read: Callable[[Path], str] | None = None
) -> str | None:
  """How a file differs from its record; only its size is compared if there is no `read`."""
  try:
    if (now := path.stat().st_size) != size:
      if path.is_file() and is_lfs_pointer(path):
        return f"{path}: {LFS_REMEDY}"
      return f"{path} has {now:,} bytes, but {size:,} were saved"
    if read and read(path) != saved:
      return f"{path} has changed since it was saved (its SHA-256 differs)"
  except FileNotFoundError:
    return f"{path} is missing"
  except OSError as error:
    return f"{path} cannot be read ({error.strerror})"
  return None


def _remembered(path: Path) -> str:
  about = path.stat()
  return _sum(path, about.st_size, about.st_mtime_ns)


@functools.cache
def _sum(path: Path, size: int, written_ns: int) -> str:
  del size, written_ns  # they are keys: a file that was written again is read again
  return hash_file(path)


def _threads() -> ThreadPoolExecutor:
  return ThreadPoolExecutor(min(8, os.cpu_count() or 1))
