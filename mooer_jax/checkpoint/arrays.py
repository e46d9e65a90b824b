"""Arrays of a checkpoint: nested dicts written and read with Orbax."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from mooer_jax import tree
from mooer_jax.checkpoint.leaves import CheckpointError, Lazy, as_lazy, hash_file

_STAMPS = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax's: when and where it wrote
CHUNK_BYTES = 8 * 2**20  # a host reads whole chunks, so they stay far below a shard's size


def write(folder: Path, arrays: Mapping) -> dict[str, str]:
  """Writes a nested dict of arrays or `Lazy` leaves, from all processes.

  Returns:
    SHA-256 (hex) of files that were read back while they were in the cache, by their path below
    the folder: of large trees of `Lazy` leaves most, else none.
  """
  import orbax.checkpoint as ocp

  digests: dict[str, str] = {}
  if any(isinstance(leaf, Lazy) for leaf in jax.tree.leaves(arrays)):
    from mooer_jax.checkpoint.streaming import streaming_handler

    arrays = jax.tree.map(as_lazy, arrays)
    handler = streaming_handler(digests)
  else:
    handler = ocp.PyTreeCheckpointHandler()
  save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), arrays)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(arrays, save_args=save_args))
  return digests


def read(folder: Path, saved: Iterable[str], targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
  """Reads the leaves in `targets`, path by path; the others in `saved` are not touched.

  Args:
    folder: from `write`.
    saved: all paths that the folder holds.
    targets: shapes, dtypes and shardings that the leaves shall have; if none has a sharding, they
      stay on the host, as NumPy arrays.

  Raises:
    CheckpointError: if the files are damaged or the targets do not fit them.
  """
  import orbax.checkpoint as ocp

  if not targets:
    return {}
  on_host = all(target.sharding is None for target in targets.values())
  item = {path: targets.get(path, ocp.PLACEHOLDER) for path in saved}

  def how(target):
    if target is None:
      return ocp.RestoreArgs()
    if on_host:
      return ocp.RestoreArgs(restore_type=np.ndarray, dtype=target.dtype)
    return ocp.ArrayRestoreArgs(
      sharding=target.sharding, dtype=target.dtype, global_shape=target.shape
    )

  args = {path: how(targets.get(path)) for path in saved}
  request = ocp.args.PyTreeRestore(tree.unflatten(item), restore_args=tree.unflatten(args))
  if on_host:
    from mooer_jax.checkpoint.streaming import host_handler

    handler = host_handler()
  else:
    handler = ocp.PyTreeCheckpointHandler()
  try:
    with ocp.Checkpointer(handler) as checkpointer:
      restored = tree.flatten(checkpointer.restore(folder, args=request))
  except (ValueError, KeyError, OSError) as error:
    raise CheckpointError(f"{folder} cannot be read: {error}") from error
  return {path: restored[path] for path in targets}


def shapes(params: Mapping) -> dict:
  """Gives path -> [shape, name of the dtype], as JSON values."""
  return {p: [list(x.shape), np.dtype(x.dtype).name] for p, x in tree.flatten(params).items()}


def hash_files(
  folder: Path, seed: str, known: Mapping[str, str] | None = None, *, stamped: bool = False
) -> str:
  """SHA-256 (hex) of a seed and of the names and contents of the files under a folder.

  The same `Lazy` leaves give the same hash whenever they are written, so that weights that are
  converted again are still the base of what was trained on them. (Orbax writes arrays on devices
  into files of random names.)

  Args:
    folder: from `write`.
    seed: goes before them.
    known: what `write` returned, so that these files are not read once more.
    stamped: with the files that hold time and place of writing, as older checkpoints were hashed.
  """

  def content(file: Path) -> str:
    return (known or {}).get(file.relative_to(folder).as_posix()) or hash_file(file)

  files = sorted(
    file for file in folder.rglob("*") if file.is_file() and (stamped or file.name not in _STAMPS)
  )
  digest = hashlib.sha256(seed.encode())
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
    for file, hashed in zip(files, threads.map(content, files), strict=True):
      digest.update(f"{file.relative_to(folder).as_posix()} {hashed}\n".encode())
  return digest.hexdigest()


def path_of(keys) -> str:
  """A JAX key path with slashes."""
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def by_path(pytree) -> dict:
  """Any pytree as a nested dict, named by the attributes, indices and keys that lead to a leaf."""
  leaves = jax.tree_util.tree_flatten_with_path(pytree)[0]
  return tree.unflatten({path_of(keys): leaf for keys, leaf in leaves})
