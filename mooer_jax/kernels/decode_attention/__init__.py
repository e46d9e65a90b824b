"""Attention of a few new tokens to a KV cache."""

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

    def of_device(q, k, v, mask_BTS, end):
      kernel, heads = _KERNELS[implementation].decode_attention, k.shape[-1] // q.shape[-1]
      return kernel(q, k, v, kv_heads=heads, mask_BTS=mask_BTS, end=end)

    heads = P(ROWS, None, HEADS)
    end = jnp.asarray(end, jnp.int32)
    in_specs = heads, heads, heads, P(ROWS), P()
    return on_mesh(of_device, in_specs, heads)(q_BTHC, k_BSE, v_BSE, mask_BTS, end)
  k_BSKC, v_BSKC = (rearrange(x, "B S (K C) -> B S K C", K=kv_heads) for x in (k_BSE, v_BSE))
  return masked(implementation, q_BTHC, k_BSKC, v_BSKC, mask_BTS=mask_BTS)
