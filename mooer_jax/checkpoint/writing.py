"""Save checkpoints."""

import concurrent.futures
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from mooer_jax import files, hosts, storage, tree
from mooer_jax.checkpoint import arrays
from mooer_jax.checkpoint.leaves import SaveError
from mooer_jax.checkpoint.manifest import FORMAT
from mooer_jax.checkpoint.reading import data_file, open_folder
from mooer_jax.checkpoint.remote import local_folder, url_of
from mooer_jax.checkpoint.steps import KEPT_BY, keep_for
from mooer_jax.checkpoint.sums import record, weights_hash


def save(folder: str | Path, **options: Any) -> Path:
  """Save a checkpoint, completely or not at all; arguments and errors as for `start_save`."""
  return hosts.wait_for(start_save(folder, **options))


def start_save(
  folder: str | Path,
  *,
  params: Mapping,
  config_json: Mapping,
  tokenizer: str | Path | Callable[[Path], Any],
  generation: Mapping,
  base: str | Path | None = None,
  train_state: Any = None,
  data_state: Mapping | None = None,
  source: Callable[[Path], Any] | None = None,
  overwrite: bool = False,
) -> concurrent.futures.Future[Path]:
  """Start to save a checkpoint, completely or not at all.

  When this returns, all arrays have been copied to the host, so that they may be donated or
  deleted. A thread writes and hashes the files and renames the folder. Meanwhile, no other save of
  the same folder may start.

  Args:
    folder: of the checkpoint; parents are created.
    params: nested dict of arrays, or of `LazyArray` leaves that are read one by one, per layer
      (`tree.unstack_layers`); with `base` only the trained ones.
    config_json, generation: the model's config and decoding defaults as JSON values.
    tokenizer: folder to copy, or a function that writes the files into a folder.
    base: folder or URL of the checkpoint with the other leaves.
    train_state: pytree of arrays to resume from, any structure.
    data_state: JSON values of this process's data iterator, saved with `train_state`.
    source: writes other contents of converted files into a folder, for an export.

  Returns:
    The folder, as a future that all processes pass to `hosts.wait_for`. Its `result` raises an
    error of this process alone.

  Raises:
    FileExistsError: if the folder exists and overwrite is False.
    ValueError: if params are stacked, or the folder is a URL or that of the base.
    SaveError: if saving fails (disk full, no permission), also by the future; existing checkpoints
      are unchanged, and no partial files remain, unless another process has failed: these are
      deleted by the next save.
  """
  folder = storage.local(folder, "folder").absolute()
  if folder.exists() and not overwrite:
    raise FileExistsError(f"{folder} exists; choose another folder or pass overwrite=True")
  leaves = tree.flatten(params)
  if stacked := [path for path in leaves if tree.STACK in path.split("/")]:
    raise ValueError(f"{stacked[0]} is stacked; a checkpoint is per layer (tree.unstack_layers)")
  base = None if base is None else local_folder(base)
  if base is not None and base.resolve().is_relative_to(folder.resolve()):
    raise ValueError(f"{folder} would replace its own base {base}; choose another folder")
  params = tree.unflatten(leaves)  # without empty parts, which cannot be read back
  pointer = None
  if base is not None:
    place = Path(base).absolute()
    base_hash = open_folder(place)[1]["hash"]
    pointer = {"path": str(place), "relative": os.path.relpath(place, folder), "hash": base_hash}
    if url := url_of(place):
      pointer = {"path": url, "hash": base_hash}
  weights = "weights" if base is None else "trainable"
  about = {
    "format": FORMAT,
    "hash": "",  # of the files, once they are written
    "base": pointer,
    "leaves": arrays.shapes(params),
    "train_state": None,
  }
  part = folder.with_name(f".tmp-{folder.name}")
  with _whole_or_absent(folder, part):
    if hosts.is_first():
      shutil.rmtree(part, ignore_errors=True)
      part.mkdir(parents=True)
    if base is not None and not url_of(base):
      keep_for(base, folder)
    _barrier(f"begin {folder}")
    trees = {part / weights: params}
    if train_state is not None:
      state = trees[part / "train_state" / "arrays"] = arrays.by_path(train_state)
      about["train_state"] = arrays.shapes(state)
      files.write_json(part / "train_state" / data_file(), dict(data_state or {}))
    finish_arrays = arrays.start_write(trees)

  def finish() -> Path:
    with _whole_or_absent(folder, part):
      finish_arrays()  # then all files of all processes can be hashed
      if hosts.is_first():
        if callable(tokenizer):
          (part / "tokenizer").mkdir()
          tokenizer(part / "tokenizer")
        else:
          shutil.copytree(tokenizer, part / "tokenizer")
        if source is not None:
          (part / "source").mkdir()
          source(part / "source")
        files.write_json(part / "config.json", dict(config_json))
        files.write_json(part / "generation.json", dict(generation))
        sums = record(part)
        about["hash"] = weights_hash(sums, weights, pointer["hash"] if pointer else "")
        files.write_json(part / "checkpoint.json", {**about, "files": sums})
        if (folder / KEPT_BY).is_dir():  # the base of others, which is replaced
          shutil.copytree(folder / KEPT_BY, part / KEPT_BY)
        put_in_place(part, folder)
      arrays.barrier(f"saved {folder}")  # a process that ended would end the first one, too
    return folder

  thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="save")
  saving = thread.submit(finish)
  thread.shutdown(wait=False)
  return saving


@contextlib.contextmanager
def _whole_or_absent(folder: Path, part: Path) -> Iterator[None]:
  """Deletes `part` if the block fails, and raises the error as SaveError."""
  try:
    yield
  except BaseException as error:
    deadline = time.monotonic() + 5  # seconds
    while hosts.is_first() and part.exists() and time.monotonic() < deadline:
      shutil.rmtree(part, ignore_errors=True)
      time.sleep(0.1)  # threads of a failed save may still write to it
    if not isinstance(error, Exception):
      raise
    cause = str(error).partition(" [tensorstore_spec=")[0]  # else hundreds of characters of JSON
    raise SaveError(
      f"{folder}: the checkpoint was not saved ({type(error).__name__}: {cause}); existing files"
      " are unchanged. If the disk is full, free space or save to another folder"
    ) from error


def put_in_place(part: Path, folder: Path) -> None:
  """Rename a complete folder; an existing folder of that name is deleted afterwards."""
  old = folder.with_name(f".old-{folder.name}")
  if not folder.exists():
    part.rename(folder)
    return
  shutil.rmtree(old, ignore_errors=True)
  folder.rename(old)
  try:
    part.rename(folder)
  except OSError:
    old.rename(folder)
    raise
  shutil.rmtree(old)


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)
