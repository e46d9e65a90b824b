"""Arrays of a checkpoint: nested dicts written and read with Orbax."""

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from mooer_jax import tree
from mooer_jax.checkpoint.leaves import CheckpointError, LazyArray, as_lazy

CHUNK_BYTES = 8 * 2**20  # a host reads whole chunks, so they stay far below a shard's size
LEAST_SLICE_BYTES = 2**18  # of an array that several devices hold and write together
_save_failed = False  # in this process


def write(folder: Path, arrays: Mapping) -> None:
  """Write a nested dict of arrays or `LazyArray` leaves, from all processes."""
  import orbax.checkpoint as ocp

  from mooer_jax.checkpoint.streaming import device_handler, streaming_handler

  arrays = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, np.generic) else x, arrays)
  handler = device_handler(LEAST_SLICE_BYTES)
  if any(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(arrays)):
    arrays, handler = jax.tree.map(as_lazy, arrays), streaming_handler()
  save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), arrays)
  with _one_error(), ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(arrays, save_args=save_args))


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
  """Hide the tracebacks that a failed save prints besides the error that it raises.

  Orbax and asyncio log each write that fails, some only when its future is freed. Writes and
  coroutines that outlive a failure find their event loop closed. Hence the filters stay after one.
  """
  global _save_failed
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  hook = sys.unraisablehook
  if not _save_failed:
    for logger in loggers:
      logger.addFilter(_is_not_of_orbax)
    sys.unraisablehook = lambda about: str(about.exc_value) == "Event loop is closed" or hook(about)
  try:
    yield
  except Exception:
    _save_failed = True
    # An equal filter is not added twice.
    warnings.filterwarnings("ignore", "coroutine '.*serialize.*' was never awaited", RuntimeWarning)
    raise
  finally:
    if not _save_failed:
      sys.unraisablehook = hook
      for logger in loggers:
        logger.removeFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  """False for an error that Orbax logs, or asyncio for a coroutine or a write of Orbax."""
  if not record.exc_info:
    return True
  places = [record.pathname]
  if record.name == "asyncio":
    _, error, frames = record.exc_info
    if frames is None:  # as TensorStore's writes, which are C++
      return "orbax-checkpoint-tmp" not in str(error)
    places = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(frames)]
  return not any("orbax" in Path(place).parts for place in places)


def read(folder: Path, saved: Iterable[str], targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
  """Read the leaves in `targets` and no others.

  Args:
    saved: all paths in the folder.
    targets: shapes, dtypes and shardings of the leaves; NumPy arrays if there are no shardings.

  Raises:
    CheckpointError: if the files are damaged or the targets do not fit them.
  """
  import orbax.checkpoint as ocp

  from mooer_jax.checkpoint.streaming import host_handler

  if not targets:
    return {}
  item = {path: targets.get(path, ocp.PLACEHOLDER) for path in saved}
  args = {path: ocp.RestoreArgs() for path in saved}
  # GB in flight: with Orbax's 96, all of a small model is in memory nearly twice, and no sooner.
  handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1)
  if all(x.sharding is None for x in targets.values()):
    handler = host_handler()
    args |= {p: ocp.RestoreArgs(np.ndarray, x.dtype) for p, x in targets.items()}
  else:
    args |= {
      path: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype, global_shape=x.shape)
      for path, x in targets.items()
    }
  request = ocp.args.PyTreeRestore(tree.unflatten(item), restore_args=tree.unflatten(args))
  try:
    with ocp.Checkpointer(handler) as checkpointer:
      restored = tree.flatten(checkpointer.restore(folder, args=request))
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:  # Orbax and TensorStore raise many types for damaged files
    cause = next(iter(str(error).splitlines()), "")[:200]
    name = type(error).__name__
    raise CheckpointError(
      f"{folder} cannot be read, as when files are damaged or missing ({name}: {cause})"
    ) from error
  return {path: restored[path] for path in targets}


def shapes(params: Mapping) -> dict:
  """{path: [shape, name of the dtype]} as JSON values."""
  return {p: [list(x.shape), np.dtype(x.dtype).name] for p, x in tree.flatten(params).items()}


def path_of(keys) -> str:
  """A JAX key path with slashes."""
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def by_path(pytree) -> dict:
  """Any pytree as a nested dict, whose keys are attributes, indices and keys."""
  leaves = jax.tree_util.tree_flatten_with_path(pytree)[0]
  return tree.unflatten({path_of(keys): leaf for keys, leaf in leaves})
