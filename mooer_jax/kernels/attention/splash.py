"""Attention on TPUs by the splash attention kernels of JAX."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

_BLOCK = 128  # queries and keys are padded to a multiple of it
_LARGEST = 512  # queries or keys of a block


def splash_attention(
  q_BTHC: jax.Array,
  k_BSKC: jax.Array,
  v_BSKC: jax.Array,
  valid_BS: jax.Array,
  *,
  causal: bool = False,
  first_query: int = 0,
  interpret: bool = False,
) -> jax.Array:
  """Scaled dot-product attention; arguments and result as of `kernels.attention`.

  Blocks above the diagonal are skipped. Content of keys that are not valid does not matter, NaN
  included. `first_query` is a Python int, since the kernel is built for a mask. `interpret`, for
  tests on a CPU, is that of `pallas_call`.

  Source: jax.experimental.pallas.ops.tpu.splash_attention.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

  B, T, H, C = q_BTHC.shape
  S, K = k_BSKC.shape[1:3]
  kernel = _kernel(-(-T // _BLOCK), -(-S // _BLOCK), H // K, causal, first_query, interpret)

  def padded(x, length):
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

  T_padded, S_padded = -(-T // _BLOCK) * _BLOCK, -(-S // _BLOCK) * _BLOCK
  # float32 for the factor: that of 128 channels is not exact in bfloat16.
  q_BTHC = padded((q_BTHC.astype(jnp.float32) * C**-0.5).astype(q_BTHC.dtype), T_padded)
  k_BSKC, v_BSKC = (
    padded(jnp.where(valid_BS[..., None, None], x, 0), S_padded) for x in (k_BSKC, v_BSKC)
  )
  # A query attends to keys of its own segment; keys that are not valid are in segment 1.
  key_segment_BS = padded((~valid_BS).astype(jnp.int32), S_padded) + (jnp.arange(S_padded) >= S)
  by_head = jax.vmap(kernel, in_axes=(0, 0, 0, None))
  out_BKGTC = jax.vmap(by_head)(
    rearrange(q_BTHC, "B T (K G) C -> B K G T C", K=K),
    rearrange(k_BSKC, "B S K C -> B K S C"),
    rearrange(v_BSKC, "B S K C -> B K S C"),
    SegmentIds(jnp.zeros((B, T_padded), jnp.int32), key_segment_BS),
  )
  out_BTHC = rearrange(out_BKGTC, "B K G T C -> B T (K G) C")[:, :T]
  if causal:
    first_S = jnp.where(valid_BS, jnp.arange(S), S).min(1)
    sees_BT = first_S[:, None] <= first_query + jnp.arange(T)
  else:
    sees_BT = valid_BS.any(1)[:, None]
  return jnp.where(sees_BT[..., None, None], out_BTHC, 0)


def _kernel(query_blocks: int, key_blocks: int, group: int, causal, first_query, interpret) -> Any:
  """The kernel for one key-value head and its group of query heads."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  shape = query_blocks * _BLOCK, key_blocks * _BLOCK
  one = splash.CausalMask(shape, offset=first_query) if causal else splash.FullMask(shape)
  q, kv = (math.gcd(blocks, _LARGEST // _BLOCK) * _BLOCK for blocks in (query_blocks, key_blocks))
  sizes = splash.BlockSizes(
    block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
  )
  return splash.make_splash_mqa_single_device(
    splash.MultiHeadMask([one] * group), block_sizes=sizes, interpret=interpret
  )
