"""Attention without the [T, S] scores in memory, with a backward pass of its own.

The Pallas kernels are in one file per backend, `tpu` (Mosaic) and `gpu` (Triton), each with
`forward` and a function `backward`; the rest is here.

Source: FlashAttention-2 (Dao, 2023).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mooer_jax.kernels.attention import gpu, tpu

_BACKENDS = {"mosaic": tpu, "triton": gpu}
_BLOCK = 256  # queries at a time in the gradient of the bias


class Bias(NamedTuple):
  """A bias by the distance of query and key: gate[b, t, h] * table[h, s - t + T - 1]."""

  gate_BTH: jax.Array  # float32, factor of each query
  table_HR: jax.Array  # float32 [H, T + S - 1], bias of each distance from -(T - 1) to S - 1

  def expand(self) -> jax.Array:
    """float32 [B, H, T, S], for implementations that add a bias to the scores."""
    gate_BHT = self.gate_BTH.swapaxes(1, 2)
    return gate_BHT[..., None] * by_distance(self.table_HR, gate_BHT.shape[2])


def by_distance(table_HR: jax.Array, queries: int) -> jax.Array:
  """[H, T, S] of a table [H, T + S - 1]: entry s - t + T - 1 for each pair."""
  keys = table_HR.shape[1] - queries + 1

  def of_query(t):
    return jax.lax.dynamic_slice_in_dim(table_HR, queries - 1 - t, keys, axis=1)

  return jax.vmap(of_query, out_axes=1)(jnp.arange(queries))


class Keys(NamedTuple):
  """Which keys may be attended to; int32."""

  valid_BS: jax.Array  # not 0 where a key may be attended to
  first_B: jax.Array  # the valid keys of a row are in [first, end)
  end_B: jax.Array
  query_1: jax.Array  # key index of query 0, where attention is causal


def flash_attention(
  q_BTHC: jax.Array,
  k_BSKC: jax.Array,
  v_BSKC: jax.Array,
  *,
  valid_BS: jax.Array,
  causal: bool = False,
  first_query: jax.Array | int = 0,
  bias: Bias | None = None,
  backend: str,
  interpret: Any = False,
) -> jax.Array:
  """Scaled dot-product attention in tiles; arguments and result as of `kernels.attention`.

  Content of keys that are not valid does not matter, NaN included; their gradients are 0.

  `backend` is "mosaic" or "triton"; `interpret`, for tests on a CPU, is that of `pallas_call`.
  """
  S = valid_BS.shape[1]
  keys = Keys(
    valid_BS=valid_BS.astype(jnp.int32),
    first_B=valid_BS.argmax(1).astype(jnp.int32),
    end_B=jnp.where(valid_BS.any(1), S - valid_BS[:, ::-1].argmax(1), 0).astype(jnp.int32),
    query_1=jnp.asarray(first_query, jnp.int32).reshape(1),
  )
  if bias is not None:
    bias = Bias(*(x.astype(jnp.float32) for x in bias))
  return _flash(q_BTHC, k_BSKC, v_BSKC, bias, keys, backend, causal, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _flash(q, k, v, bias, keys, backend, causal, interpret):
  return _flash_forward(q, k, v, bias, keys, backend, causal, interpret)[0]


def _flash_forward(q, k, v, bias, keys, backend, causal, interpret):
  out, lse = _BACKENDS[backend].forward(q, k, v, bias, keys, causal=causal, interpret=interpret)
  return out, (q, k, v, bias, keys, out, lse)


def _flash_backward(backend, causal, interpret, saved, do_BTHC):
  q, k, v, bias, keys, out, lse_BHT = saved
  delta_BTH = (out.astype(jnp.float32) * do_BTHC.astype(jnp.float32)).sum(-1)
  sums = do_BTHC, lse_BHT, delta_BTH.swapaxes(1, 2)
  dqkv = _BACKENDS[backend].backward(q, k, v, bias, keys, *sums, causal=causal, interpret=interpret)
  dbias = None if bias is None else _bias_gradient(q, k, v, bias, keys, *sums, causal=causal)
  return *dqkv, dbias, None


_flash.defvjp(_flash_forward, _flash_backward)


def _bias_gradient(q_BTHC, k_BSKC, v_BSKC, bias, keys, do_BTHC, lse_BHT, delta_BHT, *, causal):
  """Gradient of the bias, in XLA and a block of queries at a time; it is dropped if unused."""
  _, T, H, C = q_BTHC.shape
  S, K = k_BSKC.shape[1:3]
  blocks = -(-T // _BLOCK)
  padding = blocks * _BLOCK - T

  def by_block(x_BHTx):
    x_BHTx = jnp.pad(x_BHTx, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (x_BHTx.ndim - 3))
    return rearrange(x_BHTx, "B H (n T) ... -> n B H T ...", n=blocks)

  is_valid_BS = keys.valid_BS != 0
  k_BHSC, v_BHSC = (
    jnp.repeat(jnp.where(is_valid_BS[..., None, None], x, 0), H // K, axis=2).swapaxes(1, 2)
    for x in (k_BSKC, v_BSKC)
  )
  table_HR = jnp.pad(bias.table_HR, ((0, 0), (padding, 0)))
  product = functools.partial(
    jnp.einsum,
    "BHTC,BHSC->BHTS",
    precision=jax.lax.Precision.HIGHEST if q_BTHC.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )

  def step(dtable_HR, block):
    start, q_BHTC, do_BHTC, gate_BHT, lse_BHT, delta_BHT = block
    # Distances in the block: from -(start + _BLOCK - 1), entry `place` of the table, on.
    place = blocks * _BLOCK - start - _BLOCK
    part_HR = jax.lax.dynamic_slice_in_dim(table_HR, place, _BLOCK + S - 1, axis=1)
    bias_HTS = by_distance(part_HR, _BLOCK)
    t_T = start + jnp.arange(_BLOCK)
    mask_BTS = is_valid_BS[:, None] & (t_T < T)[:, None]
    if causal:
      mask_BTS &= jnp.arange(S) <= (keys.query_1 + t_T)[:, None]
    scores_BHTS = product(q_BHTC, k_BHSC) * C**-0.5 + gate_BHT[..., None] * bias_HTS
    weights_BHTS = jnp.where(mask_BTS[:, None], jnp.exp(scores_BHTS - lse_BHT[..., None]), 0)
    dscores_BHTS = weights_BHTS * (product(do_BHTC, v_BHSC) - delta_BHT[..., None])
    dgate_BHT = (dscores_BHTS * bias_HTS).sum(-1)
    # Sum over the pairs of each distance: with the last row first and one column more than
    # distances, row r of the same numbers in rows of one column less is shifted by r.
    skewed_HTS = (dscores_BHTS * gate_BHT[..., None]).sum(0)[:, ::-1]
    skewed_HTS = jnp.pad(skewed_HTS, ((0, 0), (0, 0), (0, _BLOCK))).reshape(H, -1)
    sums_HR = skewed_HTS[:, :-_BLOCK].reshape(H, _BLOCK, -1).sum(1)
    part_HR = jax.lax.dynamic_slice_in_dim(dtable_HR, place, _BLOCK + S - 1, axis=1) + sums_HR
    return jax.lax.dynamic_update_slice_in_dim(dtable_HR, part_HR, place, axis=1), dgate_BHT

  arrays = (q_BTHC.swapaxes(1, 2), do_BTHC.swapaxes(1, 2), bias.gate_BTH.swapaxes(1, 2))
  starts = jnp.arange(blocks) * _BLOCK
  inputs = starts, *map(by_block, (*arrays, lse_BHT, delta_BHT))
  dtable_HR, dgate_nBHT = jax.lax.scan(step, jnp.zeros_like(table_HR), inputs)
  dgate_BTH = rearrange(dgate_nBHT, "n B H T -> B (n T) H")[:, :T]
  return Bias(dgate_BTH, dtable_HR[:, padding:])
