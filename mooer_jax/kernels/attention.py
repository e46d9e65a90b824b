"""The one attention function of the project and its plain reference."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def precision(dtype: Any) -> jax.lax.Precision:
  """Float32 means float32 on every backend: GPUs would use TF32, TPUs bfloat16 passes."""
  return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def attention(
  q_BTHC: jax.Array,
  k_BSKC: jax.Array,
  v_BSKC: jax.Array,
  *,
  valid_BS: jax.Array,
  causal: bool = False,
  first_query: jax.Array | int = 0,
  sees_BTS: jax.Array | None = None,
  bias_BHTS: jax.Array | None = None,
  weight_scale_BHTS: jax.Array | None = None,
  implementation: str = "auto",
) -> jax.Array:
  """Scaled dot-product attention with grouped key-value heads; softmax in float32.

  Args:
    q_BTHC: queries; H is a multiple of K.
    k_BSKC: keys.
    v_BSKC: values.
    valid_BS: bool, True where a key may be seen.
    causal: if True, query t sees the keys up to index `first_query + t`.
    first_query: key index of query 0; with a KV cache, the number of slots already filled.
    sees_BTS: bool, True where query t may see key s, for orders that `causal` cannot say; both,
      and `valid_BS`, must hold.
    bias_BHTS: float32, added to the scaled scores before the softmax; H as of the queries.
    weight_scale_BHTS: what the weights are multiplied with after the softmax, as dropout does.
    implementation: "xla" (plain reference), "cudnn" (GPU, bfloat16), or "auto": "xla" until a
      benchmark on the backend says otherwise.

  Returns:
    [B, T, H, C] in q's dtype; a query that sees no key gives zeros.

  Raises:
    ValueError: for an unknown implementation, one that cannot run here or takes no bias, or H not
      divisible by K.
  """
  heads, kv_heads = q_BTHC.shape[2], k_BSKC.shape[2]
  if heads % kv_heads:
    raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads evenly")
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention={implementation!r}: choose one of {IMPLEMENTATIONS}")
  mask_BTS = valid_BS[:, None, :]
  if causal:
    query_T = first_query + jnp.arange(q_BTHC.shape[1])
    mask_BTS = mask_BTS & (jnp.arange(k_BSKC.shape[1])[None] <= query_T[:, None])[None]
  if sees_BTS is not None:
    mask_BTS = mask_BTS & sees_BTS
  if implementation == "cudnn":
    if bias_BHTS is not None:
      raise ValueError("attention='cudnn' takes no bias on the scores. Use attention='xla'")
    if weight_scale_BHTS is not None:
      raise ValueError("attention='cudnn' drops no weights: use attention='xla' or no dropout")
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
