"""Attention of a few new tokens to a KV cache for TPU: one Pallas kernel that Mosaic compiles.

Decoding is bound by reading the cache, so the cache stays in its layout, each slot is read once for
all queries of a row (the beams of an utterance, or the tokens of a draft), and slots beyond the
filled ones are not read.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mooer_jax.kernels.flash_attention.tpu import LANES, MASKED, NN, NT, column, dot

_BLOCK_BYTES = 2**20  # of keys, and as many of values; both are buffered twice


def _kernel(end_ref, q_ref, k_ref, v_ref, mask_ref, out_ref, max_ref, sum_ref, acc_ref, *, scale):
  j = pl.program_id(2)
  heads, rows, C = q_ref.shape
  block_s = k_ref.shape[0]

  @pl.when(j == 0)
  def _():
    max_ref[...] = jnp.full_like(max_ref, MASKED)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  @pl.when(j * block_s < end_ref[0])
  def _():
    slot_1S = j * block_s + jax.lax.broadcasted_iota(jnp.int32, (1, block_s), 1)
    is_filled_1S = slot_1S < end_ref[0]
    mask_TS = (mask_ref[...] != 0) & is_filled_1S
    is_filled_S1 = column(is_filled_1S) != 0
    for h in range(heads):
      channels = slice(h * C, (h + 1) * C)
      v_SC = jnp.where(is_filled_S1, v_ref[:, channels], 0)  # empty slots may hold NaN
      scores_TS = jnp.where(mask_TS, dot(q_ref[h], k_ref[:, channels], NT) * scale, MASKED)
      old_T1 = max_ref[h][:, :1]
      max_T1 = jnp.maximum(old_T1, scores_TS.max(axis=1, keepdims=True))
      weights_TS = jnp.where(mask_TS, jnp.exp(scores_TS - max_T1), 0.0)
      shrink_T1 = jnp.exp(old_T1 - max_T1)
      sum_T1 = sum_ref[h][:, :1] * shrink_T1 + weights_TS.sum(axis=1, keepdims=True)
      max_ref[h] = jnp.broadcast_to(max_T1, (rows, LANES))
      sum_ref[h] = jnp.broadcast_to(sum_T1, (rows, LANES))
      acc_ref[h] = acc_ref[h] * shrink_T1 + dot(weights_TS.astype(v_SC.dtype), v_SC, NN)

  @pl.when(j == pl.num_programs(2) - 1)
  def _():
    for h in range(heads):
      sum_T1 = sum_ref[h][:, :1]
      out_ref[h] = (acc_ref[h] / jnp.where(sum_T1 == 0, 1.0, sum_T1)).astype(out_ref.dtype)


def _heads_per_block(kv_heads: int, channels: int) -> int:
  """The least number of heads that divides all and whose channels fill whole lanes."""
  fits = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * channels % LANES == 0]
  return fits[0] if fits else kv_heads


def decode_attention(
  q_BTHC: jax.Array,
  k_BSE: jax.Array,
  v_BSE: jax.Array,
  *,
  kv_heads: int,
  mask_BTS: jax.Array,
  end: jax.Array | int,
  interpret: Any = False,
) -> jax.Array:
  """Scaled dot-product attention of a few queries to the filled slots of a cache.

  Args:
    q_BTHC: queries; T is small. H is a multiple of kv_heads.
    k_BSE, v_BSE: the cache, S slots of kv_heads * C channels.
    kv_heads: K.
    mask_BTS: bool, True where query t may attend to slot s.
    end: int32, number of filled slots; those behind are not read.
    interpret: for tests on CPU; see `jax.experimental.pallas.pallas_call`.

  Returns:
    [B, T, H, C] in q's dtype; a query that attends to no slot gives zeros.
  """
  B, T, H, C = q_BTHC.shape
  S, K = k_BSE.shape[1], kv_heads
  G, heads = H // K, _heads_per_block(K, C)
  block_s = _BLOCK_BYTES // (heads * C * k_BSE.dtype.itemsize) // LANES * LANES
  block_s = max(LANES, min(block_s, 1024, pl.cdiv(S, LANES) * LANES))
  q_BKRC = rearrange(q_BTHC, "B T (K G) C -> B K (T G) C", K=K)
  mask_BRS = jnp.repeat(mask_BTS.astype(jnp.int32), G, axis=1)
  rows = T * G

  def slots(b, k, j, end_ref):
    return b, jnp.minimum(j, jax.lax.div(jnp.maximum(end_ref[0] - 1, 0), block_s)), k

  def mask(b, k, j, end_ref):
    return b, 0, slots(b, k, j, end_ref)[1]

  def queries(b, k, j, end_ref):
    return b, k, 0, 0

  out_BKRC = pl.pallas_call(
    functools.partial(_kernel, scale=C**-0.5),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, K // heads, pl.cdiv(S, block_s)),
      in_specs=[
        pl.BlockSpec((None, heads, rows, C), queries),
        pl.BlockSpec((None, block_s, heads * C), slots),
        pl.BlockSpec((None, block_s, heads * C), slots),
        pl.BlockSpec((None, rows, block_s), mask),
      ],
      out_specs=pl.BlockSpec((None, heads, rows, C), queries),
      scratch_shapes=[
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, C), jnp.float32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(q_BKRC.shape, q_BTHC.dtype),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    interpret=interpret,
    name="decode_attention",
  )(
    jnp.asarray(end, jnp.int32).reshape(1),
    q_BKRC,
    k_BSE,
    v_BSE,
    mask_BRS,
  )
  return rearrange(out_BKRC, "B K (T G) C -> B T (K G) C", T=T)
