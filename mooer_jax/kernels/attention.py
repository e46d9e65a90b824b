"""Attention, the same function for all parts, with several implementations."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

IMPLEMENTATIONS = ("xla", "cudnn")


def precision(dtype: Any) -> jax.lax.Precision:
  """HIGHEST for float32, since GPUs use TF32 and TPUs bfloat16 by default."""
  return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def attention(
  q_BTHC: jax.Array,
  k_BSKC: jax.Array,
  v_BSKC: jax.Array,
  *,
  valid_BS: jax.Array,
  causal: bool = False,
  first_query: jax.Array | int = 0,
  attention_mask_BTS: jax.Array | None = None,
  bias_BHTS: jax.Array | None = None,
  weight_scale_BHTS: jax.Array | None = None,
  implementation: str = "xla",
) -> jax.Array:
  """Scaled dot-product attention with grouped key-value heads; softmax in float32.

  Args:
    q_BTHC: queries; H is a multiple of K.
    k_BSKC: keys.
    v_BSKC: values.
    valid_BS: bool, True for keys that may be attended to.
    causal: mask keys after index `first_query + t` for query t.
    first_query: key index of query 0; with a KV cache, the number of filled slots.
    attention_mask_BTS: bool, True where query t may attend to key s, in addition to `causal` and
      `valid_BS`.
    bias_BHTS: float32, added to the scaled scores before the softmax; H as for the queries.
    weight_scale_BHTS: factor of the weights after the softmax, for dropout.
    implementation: "xla" (any backend) or "cudnn" (GPU, bfloat16).

  Returns:
    [B, T, H, C] in q's dtype; zeros for a query without keys.

  Raises:
    ValueError: for an unknown implementation, one that cannot run on this backend or with these
      arguments, or if H is not divisible by K.
  """
  heads, kv_heads = q_BTHC.shape[2], k_BSKC.shape[2]
  if heads % kv_heads:
    raise ValueError(f"{heads} query heads must be divisible by {kv_heads} key-value heads")
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention={implementation!r}: choose one of {IMPLEMENTATIONS}")
  mask_BTS = valid_BS[:, None, :]
  if causal:
    query_T = first_query + jnp.arange(q_BTHC.shape[1])
    mask_BTS = mask_BTS & (jnp.arange(k_BSKC.shape[1])[None] <= query_T[:, None])[None]
  if attention_mask_BTS is not None:
    mask_BTS = mask_BTS & attention_mask_BTS
  if implementation == "cudnn":
    if bias_BHTS is not None:
      raise ValueError(
        "attention='cudnn' does not support a bias on the scores; use attention='xla'"
      )
    if weight_scale_BHTS is not None:
      raise ValueError(
        "attention='cudnn' does not support dropout; use attention='xla' or dropout=0"
      )
    return _cudnn(q_BTHC, k_BSKC, v_BSKC, mask_BTS)
  return _reference(q_BTHC, k_BSKC, v_BSKC, mask_BTS, bias_BHTS, weight_scale_BHTS)


def _reference(q_BTHC, k_BSKC, v_BSKC, mask_BTS, bias_BHTS, weight_scale_BHTS):
  K, C = k_BSKC.shape[2:]
  q_BTKGC = rearrange(q_BTHC * C**-0.5, "B T (K G) C -> B T K G C", K=K)
  scores_BKGTS = jnp.einsum(
    "BTKGC,BSKC->BKGTS",
    q_BTKGC,
    k_BSKC,
    precision=precision(q_BTHC.dtype),
    preferred_element_type=jnp.float32,
  )
  if bias_BHTS is not None:
    scores_BKGTS += rearrange(bias_BHTS, "B (K G) T S -> B K G T S", K=K)
  mask_B11TS = mask_BTS[:, None, None]
  scores_BKGTS = jnp.where(mask_B11TS, scores_BKGTS, jnp.finfo(jnp.float32).min)
  weights_BKGTS = jnp.where(mask_B11TS, jax.nn.softmax(scores_BKGTS, axis=-1), 0.0)
  if weight_scale_BHTS is not None:
    weights_BKGTS *= rearrange(weight_scale_BHTS, "B (K G) T S -> B K G T S", K=K)
  out_BTKGC = jnp.einsum(
    "BKGTS,BSKC->BTKGC",
    weights_BKGTS.astype(v_BSKC.dtype),
    v_BSKC,
    precision=precision(q_BTHC.dtype),
  )
  return rearrange(out_BTKGC, "B T K G C -> B T (K G) C").astype(q_BTHC.dtype)


def _cudnn(q_BTHC, k_BSKC, v_BSKC, mask_BTS):
  if jax.default_backend() != "gpu" or q_BTHC.dtype != jnp.bfloat16:
    raise ValueError(
      f"attention='cudnn' runs on GPUs in bfloat16; here: {jax.default_backend()}, {q_BTHC.dtype}."
      " Use attention='xla'"
    )
  out_BTHC = jax.nn.dot_product_attention(
    q_BTHC, k_BSKC, v_BSKC, mask=mask_BTS[:, None], implementation="cudnn"
  )
  return jnp.where(mask_BTS.any(-1)[..., None, None], out_BTHC, 0)
