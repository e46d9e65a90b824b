"""Scaled dot-product attention."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mooer_jax.kernels.arrays import HEADS, ROWS, check_heads, check_shapes, on_mesh
from mooer_jax.kernels.attention.flash import Bias as Bias
from mooer_jax.kernels.attention.flash import flash_attention
from mooer_jax.kernels.attention.splash import splash_attention
from mooer_jax.kernels.attention.xla import masked
from mooer_jax.kernels.choice import Call, choose


def attention(
  q_BTHC: jax.Array,
  k_BSKC: jax.Array,
  v_BSKC: jax.Array,
  *,
  valid_BS: jax.Array,
  causal: bool = False,
  first_query: jax.Array | int = 0,
  bias: Bias | None = None,
  implementation: str = "auto",
  platform: str | None = None,
) -> jax.Array:
  """Scaled dot-product attention with grouped key-value heads; softmax in float32.

  Args:
    q_BTHC: queries; H is a multiple of K.
    k_BSKC, v_BSKC: keys and values.
    valid_BS: bool, True for keys that may be attended to.
    causal: mask keys after index `first_query + t` for query t.
    first_query: key index of query 0; with a KV cache, the number of filled slots.
    bias: added to the scaled scores before the softmax.
    implementation: "xla" (any backend), "cudnn" (GPU) and "splash" (TPU; first_query must be an
      int), both for bfloat16 without a bias, "mosaic" (TPU), "triton" (NVIDIA GPU), or "auto": see
      `choice.choose`.
    platform: backend that the program is compiled for, for "auto"; default: that of JAX.

  Returns:
    [B, T, H, C] in q's dtype; zeros for a query without keys.

  Raises:
    ValueError: for an unknown implementation or one that does not support these arguments; for
      shapes or dtypes that do not fit; or if H is not divisible by K, or K by the mesh axis that
      splits the heads of a kernel.
  """
  added = {} if bias is None else {"gate_BTH": bias.gate_BTH, "table_HR": bias.table_HR}
  sizes = check_shapes(q_BTHC=q_BTHC, k_BSKC=k_BSKC, v_BSKC=v_BSKC, valid_BS=valid_BS, **added)
  check_heads(sizes["H"], sizes["K"])
  if jnp.ndim(first_query) or not jnp.issubdtype(jnp.result_type(first_query), jnp.integer):
    raise ValueError(f"first_query={first_query!r}: must be an integer scalar")
  extras = ("bias",) if bias is not None else ()
  call = Call.of("attention", q_BTHC, sizes, extras)
  reason = (
    "is for training: it takes no KV cache (first_query must be an int); use attention='auto'"
  )
  traced = {} if isinstance(first_query, int) else {"splash": reason}
  implementation = choose(implementation, call, platform=platform, unsupported=traced)
  heads = P(ROWS, None, HEADS)
  if implementation == "splash":
    splash = functools.partial(splash_attention, causal=causal, first_query=first_query)  # type: ignore[arg-type]
    return on_mesh(splash, (heads, heads, heads, P(ROWS)), heads)(q_BTHC, k_BSKC, v_BSKC, valid_BS)
  if implementation in ("mosaic", "triton"):

    def of_device(q, k, v, valid_BS, first_query, bias):
      options = dict(causal=causal, first_query=first_query, bias=bias, backend=implementation)
      return flash_attention(q, k, v, valid_BS=valid_BS, **options)

    specs = heads, heads, heads, P(ROWS), P(), bias and Bias(heads, P(HEADS))  # type: ignore[arg-type]
    first_query = jnp.asarray(first_query, jnp.int32)
    return on_mesh(of_device, specs, heads)(q_BTHC, k_BSKC, v_BSKC, valid_BS, first_query, bias)
  mask_BTS = valid_BS[:, None, :]
  if causal:
    query_T = first_query + jnp.arange(q_BTHC.shape[1])
    mask_BTS = mask_BTS & (jnp.arange(k_BSKC.shape[1])[None] <= query_T[:, None])[None]
  return masked(
    implementation, q_BTHC, k_BSKC, v_BSKC, mask_BTS=mask_BTS, bias_BHTS=bias and bias.expand()
  )
