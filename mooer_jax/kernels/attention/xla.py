"""Attention by XLA, the reference of all implementations, and by cuDNN."""

import jax
import jax.numpy as jnp
from einops import rearrange

from mooer_jax.kernels.arrays import precision


def masked(
  implementation, q_BTHC, k_BSKC, v_BSKC, *, mask_BTS, bias_BHTS=None, weight_scale_BHTS=None
):
  """Attention by "xla" or "cudnn", which materialize the mask.

  weight_scale_BHTS is a factor of the weights after the softmax, only of "xla".
  """
  if implementation == "cudnn":
    return _cudnn(q_BTHC, k_BSKC, v_BSKC, mask_BTS)
  K, C = k_BSKC.shape[2:]
  # In the order of the products' axes: XLA on CPU transposes copies of the results of others.
  q_BKGTC = rearrange(q_BTHC * C**-0.5, "B T (K G) C -> B K G T C", K=K)
  scores_BKGTS = jnp.einsum(
    "BKGTC,BSKC->BKGTS",
    q_BKGTC,
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
  out_BKGTC = jnp.einsum(
    "BKGTS,BSKC->BKGTC",
    weights_BKGTS.astype(v_BSKC.dtype),
    v_BSKC,
    precision=precision(q_BTHC.dtype),
  )
  return rearrange(out_BKGTC, "B K G T C -> B T (K G) C").astype(q_BTHC.dtype)


def _cudnn(q_BTHC, k_BSKC, v_BSKC, mask_BTS):
  out_BTHC = jax.nn.dot_product_attention(
    q_BTHC, k_BSKC, v_BSKC, mask=mask_BTS[:, None], implementation="cudnn"
  )
  return jnp.where(mask_BTS.any(-1)[..., None, None], out_BTHC, 0)
