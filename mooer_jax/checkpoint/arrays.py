"""Arrays of a checkpoint: nested dicts written and read with Orbax."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from mooer_jax import tree
from mooer_jax.checkpoint.errors import CheckpointError

CHUNK_BYTES = 8 * 2**20  # a host reads whole chunks, so they stay far below a shard's size


def write(folder: Path, arrays: Mapping) -> None:
  """Writes a nested dict of arrays, from all processes."""
  import orbax.checkpoint as ocp

  save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), arrays)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(arrays, save_args=save_args))


def read(folder: Path, saved: Mapping, targets: dict[str, jax.ShapeDtypeStruct]) -> dict:
  """Reads the leaves in `targets`, path by path; the others in `saved` are not touched.

  Args:
    folder: from `write`.
    saved: all paths that the folder holds.
    targets: shapes, dtypes and shardings that the leaves shall have.

  Raises:
    CheckpointError: if the files are damaged or the targets do not fit them.
  """
  import orbax.checkpoint as ocp

  if not targets:
    return {}
  item = {path: targets.get(path, ocp.PLACEHOLDER) for path in saved}
  args = {
    path: ocp.ArrayRestoreArgs(sharding=targets[path].sharding, dtype=targets[path].dtype,
                               global_shape=targets[path].shape)
    if path in targets else ocp.RestoreArgs()
    for path in saved
  }
  request = ocp.args.PyTreeRestore(tree.unflatten(item), restore_args=tree.unflatten(args))
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      restored = tree.flatten(checkpointer.restore(folder, args=request))
  except (ValueError, KeyError, OSError) as error:
    raise CheckpointError(f"{folder} cannot be read: {error}") from error
  return {path: restored[path] for path in targets}


def shapes(params: Mapping) -> dict:
  """Gives path -> [shape, name of the dtype], as JSON values."""
  return {p: [list(x.shape), np.dtype(x.dtype).name] for p, x in tree.flatten(params).items()}


def hash_files(folder: Path, seed: str) -> str:
  """SHA-256 (hex) of a seed and of the names and contents of all files under a folder."""
  digest = hashlib.sha256(seed.encode())
  for file in sorted(file for file in folder.rglob("*") if file.is_file()):
    with file.open("rb") as stream:
      content = hashlib.file_digest(stream, "sha256").hexdigest()
    digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
  return digest.hexdigest()


def path_of(keys) -> str:
  """A JAX key path with slashes."""
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def by_path(pytree) -> dict:
  """Any pytree as a nested dict, named by the attributes, indices and keys that lead to a leaf."""
  leaves = jax.tree_util.tree_flatten_with_path(pytree)[0]
  return tree.unflatten({path_of(keys): leaf for keys, leaf in leaves})
