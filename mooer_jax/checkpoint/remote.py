"""Checkpoints at URLs, which are copied to this host before they are read.

CACHE/checkpoints/DIGEST/url         the URL
CACHE/checkpoints/DIGEST/NAME/…      the files of the checkpoint, without the state of its training;
                                     checkpoint.json comes last, and makes the copy complete

CACHE is $XDG_CACHE_HOME/mooer_jax, by default ~/.cache/mooer_jax. The digest is of the URL and of
the sizes and versions of the files, so a checkpoint that changes at its URL is copied again.
"""

import concurrent.futures
import hashlib
import json
import posixpath
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from mooer_jax import storage
from mooer_jax.checkpoint import sums
from mooer_jax.checkpoint.leaves import CheckpointError
from mooer_jax.checkpoint.manifest import MANIFEST, read_remote
from mooer_jax.checkpoint.steps import KEPT_BY, STEP, is_checkpoint, latest
from mooer_jax.files import cache_folder, lock_folder, replace_file

_URL = "url"
_TRANSFERS = 8  # at a time
_NOT_COPIED = ("train_state/", f"{KEPT_BY}/")


def find(path: str | Path) -> Path:
  """The checkpoint at a path or URL, or the newest one of a run; one of a URL is copied.

  Raises as `locate`, and `local_folder`.
  """
  return local_folder(locate(path))


def locate(path: str | Path) -> str:
  """Path or URL of the checkpoint at a path or URL: the folder itself, or the newest of a run.

  Raises:
    FileNotFoundError: if the path does not exist, or is neither.
    ValueError: for a path that starts with ~.
    RemoteError: if a URL cannot be read.
  """
  if storage.is_url(path):
    url = storage.trim(str(path))
    if storage.is_file(f"{url}/{MANIFEST}"):
      return url
    if not (steps := copies(url)):
      raise _not_found(
        url, f"neither a checkpoint (no {MANIFEST}) nor a run's folder (no step_*/{MANIFEST})"
      )
    return f"{url}/{steps[-1]}"
  if fault := storage.path_fault(path):
    raise ValueError(f"{path}: {fault}")
  folder = Path(path)
  if not folder.is_dir():
    raise _not_found(folder, "no such checkpoint folder")
  if is_checkpoint(folder):
    return str(folder)
  newest = latest(folder)
  if newest is None:
    raise FileNotFoundError(
      f"{folder}: neither a checkpoint (no config.json) nor a run's folder (no step_*)"
    )
  return str(newest)


def _not_found(path: str | Path, fault: str) -> FileNotFoundError:
  if storage.is_file(path):
    fault = "is a file; name the folder of a checkpoint or of a run"
  return FileNotFoundError(f"{path}: {fault}")


def copies(url: str) -> list[str]:
  """Names of the steps in the folder of a run that are complete, oldest first."""
  return [name for name in step_names(url) if storage.is_file(f"{url}/{name}/{MANIFEST}")]


def step_names(url: str) -> list[str]:
  """Names of all steps in the folder of a run, oldest first."""
  names = filter(STEP.fullmatch, storage.file_names(url))
  return sorted(names, key=lambda name: int(re.sub(r"\D", "", name)))


def local_folder(path: str | Path) -> Path:
  """The folder itself, or the copy of a checkpoint at a URL, which is made if there is none.

  The processes of a host share a copy: one makes it, and the others wait. Every file is compared
  with its size and SHA-256 sum. An interrupted copy resumes with the files that it lacks.

  Raises:
    FileNotFoundError: if there is no checkpoint at the URL.
    CheckpointError, ValueError: if a file there is missing or damaged.
    RemoteError: if it cannot be read.
  """
  if not storage.is_url(path):
    return Path(path)
  url = storage.trim(str(path))
  found = {name.removeprefix(f"{url}/"): of for name, of in storage.walk(url).items()}
  if MANIFEST not in found:
    raise _not_found(url, f"no such checkpoint (no {MANIFEST})")
  found = {name: of for name, of in found.items() if not name.startswith(_NOT_COPIED)}
  if outside := [name for name in found if ".." in name.split("/")]:
    raise CheckpointError(f"{url} has a file {outside[0]!r}, which would be outside of its copy")
  state = json.dumps([url, sorted(found.items())]).encode()
  place = cache_folder("checkpoints") / hashlib.blake2b(state, digest_size=8).hexdigest()
  folder = place / posixpath.basename(url)
  if not (folder / MANIFEST).is_file():
    with lock_folder(place, wait=True):
      if not (folder / MANIFEST).is_file():  # by the process that had the lock
        (place / _URL).write_text(url, encoding="utf-8")
        _copy(url, folder, found)
  return folder


def url_of(folder: str | Path) -> str:
  """The URL of which a folder is the copy; "" if it is none."""
  file = Path(folder).absolute().parent / _URL
  is_copy = file.parent.parent == cache_folder("checkpoints").absolute() and file.is_file()
  return file.read_text(encoding="utf-8") if is_copy else ""


def _copy(url: str, folder: Path, files: Mapping[str, storage.Stat]) -> None:
  from rich.console import Console
  from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

  recorded = read_remote(f"{url}/{MANIFEST}").get("files") or {}
  sizes = {name: of.size for name, of in files.items() if name != MANIFEST}
  print(f"copying {url} ({sum(sizes.values()):,} bytes) to {folder}", file=sys.stderr, flush=True)
  console = Console(stderr=True)
  columns = (TextColumn("copying"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
  with (
    Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    concurrent.futures.ThreadPoolExecutor(_TRANSFERS) as pool,
  ):
    bar = progress.add_task("", total=sum(sizes.values()))

    def copy(name: str) -> int:
      _copy_file(url, folder, name, sizes[name], recorded)
      return sizes[name]

    for size in pool.map(copy, sizes):
      progress.advance(bar, size)
  sums.check_sizes(folder, recorded)
  with replace_file(folder / MANIFEST) as beside:
    storage.download(f"{url}/{MANIFEST}", beside)


def _copy_file(url: str, folder: Path, name: str, size: int, recorded: sums.Sums) -> None:
  file = folder / name
  if not (file.is_file() and file.stat().st_size == size):
    with replace_file(file) as beside:
      storage.download(f"{url}/{name}", beside)
  checked = {name: recorded[name]} if name in recorded and name not in sums.EDITABLE else {}
  if file.stat().st_size != size or any(sums.damages(folder, checked, remember=True)):
    file.unlink()
    raise CheckpointError(
      f"{url}/{name}: the copy differs from its size or its SHA-256 sum in {MANIFEST}; rerun the"
      " command to copy it again, and if that does not help, restore the checkpoint at the URL"
    )
