"""`convert quantize CKPT OUT`: the matrices of the LLM as int8, for decoding."""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, LazyArray, describe, find, read_leaves, save
from mooer_jax.config import part_from_json
from mooer_jax.generation.weights import merged_kernel, quantized_kernel

from .core.errors import ConversionError
from .core.folders import check_apart, check_target, copier


def quantize(
  checkpoint: Path,
  out: Path,
  *,
  base: Path | None = None,
  lora_scale: float | None = None,
  overwrite: bool = False,
) -> dict[str, LazyArray]:
  """Writes a checkpoint whose LLM has int8 kernels, one tensor at a time; returns path -> leaf.

  Each kernel is rounded to nearest with a float32 scale for each output, as with
  `compute.quantization="int8"`. A LoRA is merged before, in float32. Other leaves are copied.

  Args:
    checkpoint: folder of a checkpoint or a run.
    base: base checkpoint of a fine-tune, if it has moved.
    lora_scale: of the merged LoRA; default: that of training.

  Raises:
    FileNotFoundError, FileExistsError: for the checkpoint and the target.
    ConversionError, ValueError: if the checkpoint has no LLM or is int8 already; for a lora_scale
      that is not finite or without a LoRA.
  """
  about = describe(find(checkpoint), base=None if base is None else find(base))
  about.check_not_quantized()
  if "decoder" not in about.config:
    raise ConversionError(f"{about.folder} has no LLM; only the matrices of an LLM are rounded")
  check_apart(out, (about.folder, about.base))
  check_target(out, overwrite=overwrite)
  decoder = part_from_json(about.config["decoder"], "decoder")
  scale = decoder.lora_scale if lora_scale is None else lora_scale
  if not math.isfinite(scale):
    raise ValueError(f"--lora-scale {scale}: must be a finite number")
  if lora_scale is not None and not decoder.lora_rank:
    raise ValueError(f"--lora-scale {scale:g} has no effect: {about.folder} has no LoRA")

  leaves = {}
  for path, leaf in tree.flatten(about.params).items():
    if path.startswith("decoder/") and path.endswith("/kernel"):
      pair = functools.partial(_quantized, about, path, scale)
      shapes = leaf.shape, leaf.shape[-1:]
      for part, suffix in enumerate(("_int8", "_scale")):
        dtype = np.dtype(("int8", "float32")[part])
        leaves[path + suffix] = LazyArray(shapes[part], dtype, functools.partial(pair, part))
    elif not path.endswith(("/lora_a", "/lora_b")):
      leaves[path] = LazyArray(leaf.shape, leaf.dtype, functools.partial(_read, about, path))
  console = Console(stderr=True)
  with Progress(console=console, disable=not console.is_terminal) as progress:
    bar = progress.add_task("writing", total=len(leaves))

    def shown(leaf: LazyArray) -> LazyArray:
      def read():
        value = leaf.read()
        progress.advance(bar)
        return value

      return dataclasses.replace(leaf, read=read)

    save(
      out,
      params=tree.unflatten({path: shown(leaf) for path, leaf in leaves.items()}),
      config_json={**about.config, "decoder": {**about.config["decoder"], "lora_rank": 0}},
      tokenizer=copier(sorted(about.tokenizer.iterdir())),
      generation=about.generation,
      overwrite=overwrite,
    )
  return leaves


def _read(about: Checkpoint, path: str) -> np.ndarray:
  return read_leaves(about, [path])[path]


def _quantized(about: Checkpoint, path: str, scale: float, part: int) -> np.ndarray:
  """The rounded kernel (part 0) or its scales (part 1)."""
  lora = [path.removesuffix("kernel") + name for name in ("lora_a", "lora_b")]
  has_lora = lora[0] in tree.flatten(about.params)
  found = read_leaves(about, [path, *lora] if has_lora else [path])
  kernel = found[path].astype(np.float32)
  if has_lora:
    kernel = merged_kernel(kernel, *(found[name] for name in lora), scale)
  return np.asarray(quantized_kernel(kernel)[part])
