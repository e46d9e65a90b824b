"""Copies of the checkpoints of a run in an object store, from which an empty folder is restored.

URL/step_00001000/…      the files of a checkpoint; checkpoint.json comes last, and a copy
                         without it is not complete
URL/metrics.jsonl, …     records of the run, as of the last copy, and what it has made
"""

import concurrent.futures
import posixpath
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mooer_jax import storage
from mooer_jax.checkpoint.manifest import MANIFEST, read_remote
from mooer_jax.checkpoint.reading import open_folder
from mooer_jax.checkpoint.remote import copies, step_names
from mooer_jax.checkpoint.steps import all_steps, latest, step_of
from mooer_jax.checkpoint.sums import check_sizes
from mooer_jax.checkpoint.writing import put_in_place

# Files in the folder of a run that go with its checkpoints; the last one is of activation tuning.
RECORDS = ("metrics.jsonl", "skipped.jsonl", "perplexity.json", "activation.json")
_TRANSFERS = 8  # at a time


class Mirror:
  """The copies of the checkpoints of a run at a URL."""

  def __init__(self, url: str, workdir: Path, *, count: int):
    """`count` of the newest copies are kept, and those of all steps in the workdir."""
    self._url, self._workdir, self._count = storage.trim(url), workdir, count

  def complete(self) -> None:
    """Copies the newest checkpoint of the workdir, if its copy was interrupted."""
    if (newest := latest(self._workdir)) is not None and newest.name not in copies(self._url):
      self.copy(newest)

  def copy(self, folder: Path) -> None:
    """Copies a checkpoint and the records of the run; deletes old copies."""
    names = [name for name in open_folder(folder)[1]["files"] if name != MANIFEST]
    target = storage.join(self._url, folder.name)
    with concurrent.futures.ThreadPoolExecutor(_TRANSFERS) as pool:
      copied = pool.map(lambda name: storage.upload(folder / name, f"{target}/{name}"), names)
      for _ in copied:
        pass
    with tempfile.TemporaryDirectory() as folder_of_copies:
      for name in filter(lambda name: (self._workdir / name).exists(), RECORDS):
        # Training appends to them, but an upload in parts must end at the size at which it began.
        copied_to = Path(folder_of_copies) / name
        storage.upload(shutil.copyfile(self._workdir / name, copied_to), f"{self._url}/{name}")
    storage.upload(folder / MANIFEST, f"{target}/{MANIFEST}")
    complete = copies(self._url)
    keep = {*complete[-self._count :], folder.name, *(f.name for f in all_steps(self._workdir))}
    for name in step_names(self._url):
      if name not in keep or (name not in complete and name != folder.name):
        storage.delete(f"{self._url}/{name}/{MANIFEST}")  # first, as it makes a copy complete
        storage.delete(f"{self._url}/{name}")


def check_writing(url: str) -> None:
  """Writes and deletes a small file at a URL.

  Raises:
    RemoteError: if it cannot be written, as for wrong credentials or a bucket that does not exist.
  """
  try:
    trial = f"{storage.trim(url)}/.trial"
    with tempfile.NamedTemporaryFile() as file:
      storage.upload(Path(file.name), trial)
    storage.delete(trial)
  except (ValueError, OSError) as error:
    raise storage.RemoteError(f"train.mirror cannot be written: {error}") from error


def restore(url: str, workdir: Path) -> Path | None:
  """Copies the newest checkpoint and the records to a folder of a run that has no checkpoint.

  Returns:
    The checkpoint; None if the folder has one, or there is no copy.

  Raises:
    ValueError: if the newest copy is of a later step than the folder's, or of another run.
    RemoteError: if the URL cannot be read.
  """
  url = storage.trim(url)
  found = copies(url)
  newest = latest(workdir)
  if not found:
    return None
  source = f"{url}/{found[-1]}"
  about = _read_manifest(f"{source}/{MANIFEST}")
  if newest is not None:
    here = workdir / found[-1]
    same = not here.is_dir() or open_folder(here)[1]["hash"] == about["hash"]
    if not same or step_of(here) > step_of(newest):
      raise ValueError(
        f"train.mirror: {source} is {'later than' if same else 'of another run than'}"
        f" {newest if same else here}; choose another train.mirror, or delete that copy"
      )
    return None
  folder = workdir / found[-1]
  part = folder.with_name(f".tmp-{folder.name}")
  shutil.rmtree(part, ignore_errors=True)
  # First: answers of activation tuning must not be newer than the checkpoint trained on them.
  for name in RECORDS:
    if storage.is_file(f"{url}/{name}"):
      storage.download(f"{url}/{name}", workdir / name)
  with concurrent.futures.ThreadPoolExecutor(_TRANSFERS) as pool:
    names = [*about["files"], MANIFEST]
    for _ in pool.map(lambda name: storage.download(f"{source}/{name}", part / name), names):
      pass
  check_sizes(part, about["files"])
  put_in_place(part, folder)
  return folder


def _read_manifest(url: str) -> dict[str, Any]:
  """The checkpoint.json of a copy, which names the files to download."""
  try:
    about = read_remote(url)
    if about.get("files") is None:
      raise ValueError(f"{url} lacks files")
  except ValueError as error:
    if isinstance(error, storage.RemoteError):
      raise
    raise ValueError(f"train.mirror: {error}; delete {posixpath.dirname(url)}") from error
  return about
