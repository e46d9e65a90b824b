"""Audio tokens for an LLM: in its tokenizer, its embedding table and its output matrix."""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mooer_jax import checkpoint, tree
from mooer_jax.checkpoint import Checkpoint, LazyArray
from mooer_jax.text.tokenizer import Tokenizer

# Rows of the embedding table are a multiple of it, so that devices can share them, as in Qwen2.
_MULTIPLE = 128
_NOISE = 0.1  # of new rows, in standard deviations of the existing ones
# Leaves with a row or a column for each token, and the axis of the tokens.
_LEAVES = {"decoder/embed/embedding": 0, "decoder/head/kernel": 1}


def token_names(count: int, start_token: str) -> list[str]:
  """The start token of speech and the names of the audio tokens."""
  return [start_token, *(f"<A_{number}>" for number in range(count))]


class Added(NamedTuple):
  """Result of `add_tokens`."""

  first_id: int  # of the start token; those of the audio tokens follow
  vocab_size: int  # rows of the embedding table


def add_tokens(
  path: str | Path,
  out: str | Path,
  *,
  count: int,
  start_token: str,
  seed: int = 0,
  base: str | Path | None = None,
) -> Added:
  """Writes a checkpoint whose LLM has tokens for speech; leaves are copied one by one.

  The ids follow those of the tokenizer, so padding rows of the embedding table are used first. New
  rows are the mean of the existing ones and a little noise, so that the probabilities of the other
  tokens hardly change.

  Args:
    path: checkpoint with an LLM, or a run.
    out: folder, which must not exist.
    count: number of audio tokens.
    start_token: token before them.
    seed: of the noise.
    base: base of a fine-tune, if it has moved.

  Raises:
    FileNotFoundError, FileExistsError: for the checkpoint and the folder.
    ValueError: if the checkpoint has no LLM or one in int8, or has one of the tokens.
  """
  out = Path(out)
  if out.exists():
    raise FileExistsError(f"{out} exists; choose another --out")
  about = checkpoint.describe(checkpoint.find(path), base=base)
  about.check_not_quantized()
  if "decoder" not in about.config:
    raise ValueError(f"{about.folder} has no LLM, but only {', '.join(about.config)}")
  tokenizer = Tokenizer.from_folder(about.tokenizer)
  known = tokenizer.vocab_size
  try:
    larger = tokenizer.with_special_tokens(token_names(count, start_token))
  except ValueError as error:
    raise ValueError(f"{about.folder}: {error}") from error
  size = about.config["decoder"]["vocab_size"]
  if larger.vocab_size > size:
    size = -(-larger.vocab_size // _MULTIPLE) * _MULTIPLE
  leaves = {}
  for name, leaf in tree.flatten(about.params).items():
    axis = _LEAVES.get(name)
    read = functools.partial(_read, about, name)
    shape = leaf.shape
    if axis is not None:
      shape = (*shape[:axis], size, *shape[axis + 1 :])
      read = functools.partial(
        _read_larger, about, name, axis=axis, size=size, known=known, end=larger.vocab_size,
        seed=seed,
      )  # fmt: skip
    leaves[name] = LazyArray(shape, np.dtype(leaf.dtype), read)
  checkpoint.save(
    out,
    params=tree.unflatten(leaves),
    config_json={**about.config, "decoder": {**about.config["decoder"], "vocab_size": size}},
    tokenizer=larger.save,
    generation=about.generation,
  )
  return Added(known, size)


def _read(about: Checkpoint, path: str) -> np.ndarray:
  return checkpoint.read_leaves(about, [path])[path]


def _read_larger(
  about: Checkpoint, path: str, *, axis: int, size: int, known: int, end: int, seed: int
) -> np.ndarray:
  """A leaf with `size` tokens, of which those from `known` to `end` are new."""
  rows_VD = np.moveaxis(_read(about, path), axis, 0)
  mean_D = rows_VD[:known].mean(axis=0, dtype=np.float32)
  some_ND = rows_VD[: known : -(-known // 4096)].astype(np.float32)  # spares memory
  rng = np.random.default_rng([seed, axis])
  noise_ND = rng.normal(size=(end - known, rows_VD.shape[1])) * (_NOISE * some_ND.std(axis=0))
  out_VD = np.zeros((size, rows_VD.shape[1]), rows_VD.dtype)
  kept = min(size, len(rows_VD))
  out_VD[:kept] = rows_VD[:kept]
  out_VD[known:end] = (mean_D + noise_ND).astype(rows_VD.dtype)
  return np.ascontiguousarray(np.moveaxis(out_VD, 0, axis))
