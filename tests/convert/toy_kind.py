"""A toy format in one file: a vector in toy.npy becomes the scale of a decoder's last norm."""

import numpy as np

from convert.core.errors import ConversionError
from convert.core.kind import Kind, Opened
from mooer_jax.checkpoint import LazyArray, read_leaves

LEAF = "decoder/final_norm/scale"


def open_toy(src, options, problems):
  array = np.load(src / "toy.npy")
  if array.ndim != 1:
    raise ConversionError(f"toy.npy has shape {list(array.shape)}; one axis is needed")
  leaf = LazyArray(array.shape, array.dtype, lambda: array)
  notes = (f"task: {options.task}",)
  config = {"toy": {"size": len(array)}}
  return Opened(config=config, leaves={LEAF: leaf}, style={"toy": {}}, notes=notes)


def export_toy(about, folder, shard_bytes):
  np.save(folder / "toy.npy", np.asarray(read_leaves(about, [LEAF])[LEAF]))


KIND = Kind(
  name="toy",
  open=open_toy,
  export=export_toy,
  recognises=lambda path, names: "toy" if "toy.scale" in names else None,
  options=("task",),
)
