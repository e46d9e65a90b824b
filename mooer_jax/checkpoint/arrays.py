"""Arrays of a checkpoint: nested dicts written and read with Orbax."""

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from mooer_jax import tree
from mooer_jax.checkpoint.leaves import CheckpointError, LazyArray, as_lazy

CHUNK_BYTES = 8 * 2**20  # a host reads whole chunks, so they stay far below a shard's size
LEAST_SLICE_BYTES = 2**18  # of an array that several devices hold and write together
WRITE_TIMEOUT_S = 24 * 3600  # no slow disk takes as long; a lost process is noticed before
_save_failed = False  # in this process


def start_write(trees: Mapping[Path, Mapping]) -> Callable[[], None]:
  """Start to write nested dicts of arrays or `LazyArray` leaves, each to a folder.

  All processes call this in the same order. When it returns, the arrays have been copied to the
  host, so that they may be donated or deleted, and `LazyArray` leaves have been read.

  Returns:
    A function that waits until the files of all processes are complete, and raises an error of this
    one. It may run in another thread.
  """
  import orbax.checkpoint  # noqa: F401  (before its loggers are looked up)

  with contextlib.ExitStack() as writing:
    writing.enter_context(_one_error())
    for folder, nested in trees.items():
      _start(folder, nested, writing)
    return writing.pop_all().close
  raise AssertionError("the block returns or raises")


def _start(folder: Path, arrays: Mapping, writing: contextlib.ExitStack) -> None:
  """Starts to write a nested dict; `writing` waits for it when it is closed."""
  import orbax.checkpoint as ocp

  from mooer_jax.checkpoint.streaming import device_handler, streaming_handler

  arrays = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, np.generic) else x, arrays)
  handler = device_handler(LEAST_SLICE_BYTES)
  if any(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(arrays)):
    arrays, handler = jax.tree.map(as_lazy, arrays), streaming_handler()
  save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), arrays)
  # Directories are created here: in the background, the processes would exchange messages for it.
  options = ocp.options.AsyncOptions(
    timeout_secs=WRITE_TIMEOUT_S, create_directories_asynchronously=False
  )
  # Barriers in the background have names, which no other save of the run may have.
  names = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=str(folder))
  checkpointer = ocp.AsyncCheckpointer(
    handler, async_options=options, multiprocessing_options=names
  )
  writing.enter_context(checkpointer).save(
    folder, args=ocp.args.PyTreeSave(arrays, save_args=save_args)
  )


def barrier(name: str) -> None:
  """Waits until all processes have called this with the same name, which is used once.

  Other than a collective, it may run in a thread while the devices work.
  """
  import orbax.checkpoint as ocp

  ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * WRITE_TIMEOUT_S)


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
