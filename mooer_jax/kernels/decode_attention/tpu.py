"""Attention of a few new tokens to a KV cache for TPU: one Pallas kernel that Mosaic compiles.

Decoding is bound by reading the cache, so the cache stays in its layout, each slot is read once for
all queries of a row (the beams of an utterance, or the tokens of a draft), and slots beyond the
filled ones are not read.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mooer_jax.kernels.attention.tpu import (
  LANES,
  NT,
  add_to_softmax,
  column,
  dot,
  start_softmax,
)

_BLOCK_BYTES = 2**20  # of keys, and as many of values; both are buffered twice


def _kernel(end_ref, q_ref, k_ref, v_ref, mask_ref, out_ref, *softmax, scale):
  j = pl.program_id(2)
  heads, rows, C = q_ref.shape
  block_s = k_ref.shape[0]
  pl.when(j == 0)(lambda: start_softmax(*softmax))

  @pl.when(j * block_s < end_ref[0])
  def _():
    slot_1S = j * block_s + jax.lax.broadcasted_iota(jnp.int32, (1, block_s), 1)
    is_filled_1S = slot_1S < end_ref[0]
    mask_RS = jnp.concatenate([mask_ref[...]] * (rows // mask_ref.shape[0]))
    mask_RS = (mask_RS != 0) & is_filled_1S
    is_filled_S1 = column(is_filled_1S) != 0
    for h in range(heads):
      channels = slice(h * C, (h + 1) * C)
      v_SC = jnp.where(is_filled_S1, v_ref[:, channels], 0)  # empty slots may hold NaN
      scores_RS = dot(q_ref[h], k_ref[:, channels], NT) * scale
      add_to_softmax(scores_RS, mask_RS, v_SC, *(ref.at[h] for ref in softmax))

  @pl.when(j == pl.num_programs(2) - 1)
  def _():
    _, sum_ref, acc_ref = softmax
    for h in range(heads):
      sum_R1 = sum_ref[h][:, :1]
      out_ref[h] = (acc_ref[h] / jnp.where(sum_R1 == 0, 1.0, sum_R1)).astype(out_ref.dtype)


def _heads_per_block(kv_heads: int, channels: int) -> int:
  """The least number of heads that divides all and whose channels fill whole lanes."""
  fits = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * channels % LANES == 0]
  return fits[0] if fits else kv_heads


def decode_attention(q_BKRC, k_BSE, v_BSE, mask_BTS, end_1, *, interpret: Any):
  """See `decode_attention.by_kernel`."""
  (B, K, rows, C), (_, T, S) = q_BKRC.shape, mask_BTS.shape
  heads = _heads_per_block(K, C)
  block_s = _BLOCK_BYTES // (heads * C * k_BSE.dtype.itemsize) // LANES * LANES
  block_s = max(LANES, min(block_s, 1024, pl.cdiv(S, LANES) * LANES))

  def slots(b, k, j, end_ref):
    return b, jnp.minimum(j, jax.lax.div(jnp.maximum(end_ref[0] - 1, 0), block_s)), k

  def mask(b, k, j, end_ref):
    return b, 0, slots(b, k, j, end_ref)[1]

  queries = pl.BlockSpec((None, heads, rows, C), lambda b, k, j, end_ref: (b, k, 0, 0))
  cache = pl.BlockSpec((None, block_s, heads * C), slots)
  return pl.pallas_call(
    functools.partial(_kernel, scale=C**-0.5),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, K // heads, pl.cdiv(S, block_s)),
      in_specs=[queries, cache, cache, pl.BlockSpec((None, T, block_s), mask)],
      out_specs=queries,
      scratch_shapes=[pltpu.VMEM((heads, rows, width), jnp.float32) for width in (LANES, LANES, C)],
    ),
    out_shape=jax.ShapeDtypeStruct(q_BKRC.shape, q_BKRC.dtype),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    interpret=interpret,
    name="decode_attention",
  )(end_1, q_BKRC, k_BSE, v_BSE, mask_BTS)
