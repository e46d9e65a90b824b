"""Attention of a few new tokens to a KV cache for NVIDIA GPUs: a Pallas kernel for Triton.

The cache is cut into parts of some hundred slots, one program for each, since the rows and heads of
a small batch do not fill a GPU. Each part gives the weighted values of its softmax, and its
log-sum-exp, by which the parts are added.

Source: Flash-Decoding (Dao et al., 2023).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mooer_jax.kernels.attention.gpu import MASKED, dot

_PART, _BLOCK = 256, 64  # slots of a program, and of a tile
_MOST = 2**14  # elements of the queries of a program


def too_many(rows: int, channels: int) -> str:
  """Why the queries of a key-value head do not fit into a program; empty if they do."""
  most = _MOST // channels
  if pl.next_power_of_2(rows) <= most:
    return ""
  return (
    f"takes at most {most} queries of {channels} channels for each key-value head; got {rows}."
    " Use attention='auto'"
  )


def _kernel(q_ref, k_ref, v_ref, mask_ref, end_ref, out_ref, lse_ref, *, tokens, slots, scale):
  part, end = pl.program_id(2), end_ref[0]
  rows, C = q_ref.shape
  block_r = max(16, pl.next_power_of_2(rows))
  row_R = jnp.arange(block_r)
  is_row_R1 = (row_R < rows)[:, None]
  q_RC = plgpu.load(q_ref.at[pl.ds(0, block_r)], mask=is_row_R1, other=0)

  def body(j, carry):
    old_R, sum_R, acc_RC = carry
    tile = pl.ds(j * _BLOCK, _BLOCK)
    slot_S = j * _BLOCK + jnp.arange(_BLOCK)
    is_filled_S = slot_S < jnp.minimum(end, slots)
    k_SC = plgpu.load(k_ref.at[tile], mask=is_filled_S[:, None], other=0)
    # Row r of a head's queries is token r % tokens.
    places_RS = jax.lax.rem(row_R, tokens)[:, None] * slots + slot_S[None, :]
    loaded_RS = is_row_R1 & is_filled_S[None, :]
    mask_RS = loaded_RS & (plgpu.load(mask_ref.at[places_RS], mask=loaded_RS, other=0) != 0)
    scores_RS = dot(q_RC, k_SC.T) * scale
    max_R = jnp.maximum(old_R, jnp.where(mask_RS, scores_RS, MASKED).max(axis=1))
    weights_RS = jnp.where(mask_RS, jnp.exp(scores_RS - max_R[:, None]), 0.0)
    shrink_R = jnp.exp(old_R - max_R)
    v_SC = plgpu.load(v_ref.at[tile], mask=is_filled_S[:, None], other=0)
    acc_RC = acc_RC * shrink_R[:, None] + dot(weights_RS.astype(v_SC.dtype), v_SC)
    return max_R, sum_R * shrink_R + weights_RS.sum(axis=1), acc_RC

  first = part * (_PART // _BLOCK)
  filled = jax.lax.div(jnp.minimum(end, slots) + _BLOCK - 1, _BLOCK)
  last = jnp.minimum(first + _PART // _BLOCK, filled)
  start = jnp.full(block_r, MASKED), jnp.zeros(block_r), jnp.zeros((block_r, C))
  max_R, sum_R, acc_RC = jax.lax.fori_loop(first, last, body, start)
  is_empty_R = sum_R == 0
  sum_R = jnp.where(is_empty_R, 1.0, sum_R)
  lse_R = jnp.where(is_empty_R, MASKED, max_R + jnp.log(sum_R))
  plgpu.store(out_ref.at[pl.ds(0, block_r)], acc_RC / sum_R[:, None], mask=is_row_R1)
  plgpu.store(lse_ref.at[pl.ds(0, block_r)], lse_R, mask=row_R < rows)


def decode_attention(q_BKRC, k_BSE, v_BSE, mask_BTS, end_1, *, interpret: Any):
  """See `decode_attention.by_kernel`."""
  (B, K, rows, C), (_, T, S) = q_BKRC.shape, mask_BTS.shape
  parts = pl.cdiv(S, _PART)
  cache = pl.BlockSpec((None, S, None, C), lambda b, k, n: (b, 0, k, 0))
  out_BKNRC, lse_BKNR = pl.pallas_call(
    functools.partial(_kernel, tokens=T, slots=S, scale=C**-0.5),
    grid=(B, K, parts),
    in_specs=[
      pl.BlockSpec((None, None, rows, C), lambda b, k, n: (b, k, 0, 0)),
      cache,
      cache,
      pl.BlockSpec((None, T * S), lambda b, k, n: (b, 0)),
      pl.BlockSpec((1,), lambda b, k, n: (0,)),
    ],
    out_specs=[
      pl.BlockSpec((None, None, None, rows, C), lambda b, k, n: (b, k, n, 0, 0)),
      pl.BlockSpec((None, None, None, rows), lambda b, k, n: (b, k, n, 0)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((B, K, parts, rows, C), jnp.float32),
      jax.ShapeDtypeStruct((B, K, parts, rows), jnp.float32),
    ],
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name="decode_attention",
  )(
    q_BKRC,
    *(rearrange(x, "B S (K C) -> B S K C", K=K) for x in (k_BSE, v_BSE)),
    mask_BTS.reshape(B, T * S),
    end_1,
  )
  # A row without keys has the same lse in all parts, and 0 as its values.
  share_BKNR = jax.nn.softmax(lse_BKNR, axis=2)
  return (share_BKNR[..., None] * out_BKNRC).sum(axis=2).astype(q_BKRC.dtype)
