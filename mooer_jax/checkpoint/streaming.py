"""Orbax handlers: write arrays of devices or `LazyArray` leaves, and read leaves to the host."""

import copy
import gc
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from mooer_jax.checkpoint.leaves import LazyArray

GROUP_BYTES = 256 * 2**20  # at most two groups are in memory: one is written, the next is read


class _LazyHandler(ocp.type_handlers.NumpyHandler):
  def __init__(self):
    super().__init__(deepcopy_host_arrays=False)

  async def serialize(self, values: Sequence[LazyArray], infos, args=None):
    args = args or [ocp.SaveArgs()] * len(values)
    writing: list = []
    group: list = []
    held = 0

    async def flush():
      nonlocal writing, group, held
      _wait(writing)
      arrays, group_infos, group_args = zip(*group)
      writing = await super(_LazyHandler, self).serialize(arrays, group_infos, group_args)
      group, held = [], 0

    for leaf, info, arg in zip(values, infos, args, strict=True):
      if group and held + leaf.nbytes > GROUP_BYTES:
        await flush()
      if leaf.nbytes > GROUP_BYTES:
        _wait(writing)
        writing = []
        gc.collect()  # futures refer to themselves, and keep their arrays alive
      group.append((leaf.read(), info, arg))
      held += leaf.nbytes
    if group:
      await flush()
    return writing


def _wait(futures):
  for future in futures:
    future.result()


class _HostHandler(ocp.type_handlers.NumpyHandler):
  """Reads leaves as NumPy arrays, chunk by chunk.

  By default, 128 chunks of a leaf are read at once, which needs twice the memory and is not faster.
  """

  async def deserialize(self, infos, args=None):
    one_by_one = {"file_io_concurrency": {"limit": 1}}
    context = tensorstore.Context(one_by_one, infos[0].ts_context)
    infos = [copy.copy(info) for info in infos]
    for info in infos:
      info.ts_context = context
    return await super().deserialize(infos, args)


def host_handler() -> ocp.PyTreeCheckpointHandler:
  """The handler that restores leaves as NumPy arrays."""
  return _with_types((np.ndarray, _HostHandler()))


def device_handler(least_slice_bytes: int) -> ocp.PyTreeCheckpointHandler:
  """The handler that saves arrays of devices, and NumPy arrays.

  Orbax splits a replicated array among the devices that hold it, so that each writes a part. An
  array is only split if each part has at least `least_slice_bytes`; by default, eight devices
  write eight files for every norm.
  """
  arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=least_slice_bytes)
  return _with_types((jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler()))


def _with_types(*types, **options) -> ocp.PyTreeCheckpointHandler:
  registry = ocp.type_handlers.create_type_handler_registry(*types)
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **options)


def streaming_handler() -> ocp.PyTreeCheckpointHandler:
  """The handler that saves trees of `LazyArray` leaves.

  Each chunk is a file. With OCDBT, all chunks of a leaf are copied before the first is written,
  which doubles the memory and took 2.8 instead of 0.4 s for 2 GB of bfloat16. There is no
  compression, because it hardly shrinks weights and would limit the speed.
  """
  return _with_types((LazyArray, _LazyHandler()), use_ocdbt=False, use_compression=False)
