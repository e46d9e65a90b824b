"""Attention of a few new tokens to a KV cache."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P

from mooer_jax.kernels.arrays import HEADS, ROWS, check_heads, check_shapes, on_mesh
from mooer_jax.kernels.attention.xla import masked
from mooer_jax.kernels.choice import Call, choose
from mooer_jax.kernels.decode_attention import gpu, tpu

_KERNELS = {"mosaic": tpu, "triton": gpu}


def decode_attention(
  q_BTHC: jax.Array,
  k_BSE: jax.Array,
  v_BSE: jax.Array,
  *,
  kv_heads: int,
  mask_BTS: jax.Array,
  end: jax.Array | int,
  implementation: str = "auto",
  platform: str | None = None,
) -> jax.Array:
  """Attention of a few new tokens to a KV cache: beams of a prompt, or tokens of a draft.

  Each slot is read once for all queries of a row, so beams share the slots of their prompt.

  Args:
    q_BTHC: queries; T is small.
    k_BSE, v_BSE: the cache, S slots of kv_heads * C channels.
    kv_heads: number of key-value heads; H is a multiple.
    mask_BTS: bool, True where query t may attend to slot s.
    end: number of filled slots; the others are not read by "mosaic" and "triton", and must be
      masked.
    implementation, platform: as for `attention`.

  Returns and raises: as `attention`.
  """
  sizes = check_shapes(q_BTHC=q_BTHC, k_BSE=k_BSE, v_BSE=v_BSE, mask_BTS=mask_BTS)
  if sizes["E"] != kv_heads * sizes["C"]:
    raise ValueError(
      f"k_BSE has E={sizes['E']} channels; expected kv_heads * C = {kv_heads} * {sizes['C']}"
    )
  check_heads(sizes["H"], kv_heads)
  call = Call.of("decode_attention", q_BTHC, sizes | {"K": kv_heads})
  too_many = gpu.too_many(sizes["H"] // kv_heads * sizes["T"], sizes["C"])
  unsupported = {"triton": too_many} if too_many else {}
  implementation = choose(implementation, call, platform=platform, unsupported=unsupported)
  if implementation in _KERNELS:
    kernel = functools.partial(by_kernel, _KERNELS[implementation].decode_attention)
    heads = P(ROWS, None, HEADS)
    in_specs = heads, heads, heads, P(ROWS), P()
    end = jnp.asarray(end, jnp.int32)
    return on_mesh(kernel, in_specs, heads)(q_BTHC, k_BSE, v_BSE, mask_BTS, end)
  k_BSKC, v_BSKC = (rearrange(x, "B S (K C) -> B S K C", K=kv_heads) for x in (k_BSE, v_BSE))
  return masked(implementation, q_BTHC, k_BSKC, v_BSKC, mask_BTS=mask_BTS)


def by_kernel(kernel: Callable, q_BTHC, k_BSE, v_BSE, mask_BTS, end, *, interpret: Any = False):
  """Attention by the kernel of a backend on one device.

  The kernel takes the queries by key-value head, [B, K, G * T, C], the cache, the mask as int32 and
  the end as int32 [1], and returns the output in the layout of the queries. `interpret`, for tests,
  is that of `pallas_call`.
  """
  T, C = q_BTHC.shape[1], q_BTHC.shape[3]
  q_BKRC = rearrange(q_BTHC, "B T (K G) C -> B K (G T) C", K=k_BSE.shape[2] // C)
  end_1 = jnp.asarray(end, jnp.int32).reshape(1)
  out_BKRC = kernel(q_BKRC, k_BSE, v_BSE, mask_BTS.astype(jnp.int32), end_1, interpret=interpret)
  return rearrange(out_BKRC, "B K (G T) C -> B T (K G) C", T=T)
