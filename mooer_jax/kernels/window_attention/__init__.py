"""Attention of a few queries to the frames of their window, for many windows at once."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mooer_jax.kernels.arrays import HEADS, ROWS, check_heads, check_shapes, on_mesh
from mooer_jax.kernels.attention.xla import masked
from mooer_jax.kernels.choice import Call, choose
from mooer_jax.kernels.window_attention import gpu, tpu

_KERNELS = {"mosaic": tpu, "triton": gpu}


def window_attention(
  q_NQHC: jax.Array,
  k_NLHC: jax.Array,
  v_NLHC: jax.Array,
  *,
  weight_scale_NHQL: jax.Array | None = None,
  implementation: str = "auto",
  platform: str | None = None,
) -> jax.Array:
  """Attention of a few queries to all frames of their window, for many windows.

  Args:
    q_NQHC: queries of N windows, a few each.
    k_NLHC, v_NLHC: keys and values of the frames of each window.
    weight_scale_NHQL: factor of the weights after the softmax, for dropout; only of "xla".
    implementation, platform: as for `attention`.

  Returns and raises: as `attention`; the kernels also raise for windows that are too large.
  """
  scale = {} if weight_scale_NHQL is None else {"weight_scale_NHQL": weight_scale_NHQL}
  sizes = check_shapes(q_NQHC=q_NQHC, k_NLKC=k_NLHC, v_NLKC=v_NLHC, **scale)
  check_heads(sizes["H"], sizes["K"], equal=True)
  extras = () if weight_scale_NHQL is None else ("dropout",)
  call = Call.of("window_attention", q_NQHC, sizes | {"T": sizes["Q"], "S": sizes["L"]}, extras)
  too_large = {
    "mosaic": tpu.too_large(sizes["L"], sizes["H"] * sizes["C"]),
    "triton": gpu.too_large(sizes["L"], sizes["C"]),
  }
  unsupported = {name: reason for name, reason in too_large.items() if reason}
  implementation = choose(implementation, call, platform=platform, unsupported=unsupported)
  if implementation in _KERNELS:
    spec = P(ROWS, None, HEADS)
    kernel = _KERNELS[implementation].window_attention
    return on_mesh(kernel, (spec,) * 3, spec)(q_NQHC, k_NLHC, v_NLHC)
  mask_NQL = jnp.ones((*q_NQHC.shape[:2], k_NLHC.shape[1]), bool)
  return masked(
    implementation, q_NQHC, k_NLHC, v_NLHC, mask_BTS=mask_NQL, weight_scale_BHTS=weight_scale_NHQL
  )
