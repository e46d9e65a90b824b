"""Attention and its gradients in float64, as plain formulas, and bounds on float32 results."""

from typing import NamedTuple

import jax
import numpy as np

from tests.numerics import rounding

# The kernels of this device are compiled; on a CPU, those of all devices are interpreted.
INTERPRET = jax.default_backend() == "cpu"
BACKENDS = {"cpu": ("mosaic", "triton"), "gpu": ("triton",), "tpu": ("mosaic",)}[
  jax.default_backend()
]


class Inputs(NamedTuple):
  q_BTHC: np.ndarray
  k_BSKC: np.ndarray
  v_BSKC: np.ndarray
  do_BTHC: np.ndarray  # gradient of the output


def random_inputs(B, T, S, H, K, C, dtype=np.float32, seed=0) -> Inputs:
  rng = np.random.default_rng(seed)
  shapes = (B, T, H, C), (B, S, K, C), (B, S, K, C), (B, T, H, C)
  return Inputs(*(rng.normal(size=shape).astype(dtype) for shape in shapes))


def attention_and_gradients(inputs, attention_mask_BTS, bias_BHTS=None):
  """Output and gradients (q, k, v, bias) in float64; queries that see no key give zeros."""
  q, k, v, do = (np.asarray(x, np.float64) for x in inputs)
  B, H, C = q.shape[0], *q.shape[2:]
  K = k.shape[2]
  k, v = (np.repeat(x, H // K, axis=2) for x in (k, v))
  scores = np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(C)
  if bias_BHTS is not None:
    scores = scores + bias_BHTS
  sees = np.broadcast_to(attention_mask_BTS[:, None], scores.shape)
  scores = np.where(sees, scores, -np.inf)
  highest = np.where(sees.any(-1, keepdims=True), scores.max(-1, keepdims=True, initial=-1e300), 0)
  weights = np.where(sees, np.exp(scores - highest), 0)
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  out = np.einsum("bhts,bshc->bthc", weights, v)
  dweights = np.einsum("bthc,bshc->bhts", do, v)
  dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
  dq = np.einsum("bhts,bshc->bthc", dscores, k) / np.sqrt(C)
  dk = np.einsum("bhts,bthc->bshc", dscores, q) / np.sqrt(C)
  dv = np.einsum("bhts,bthc->bshc", weights, do)
  dk, dv = (x.reshape(B, -1, K, H // K, C).sum(3) for x in (dk, dv))
  return out, dq, dk, dv, dscores


def bounds(inputs, dtype=np.float32):
  """Bounds on the output and the gradients (q, k, v).

  A score sums C products and a weight changes by what its score changes; outputs sum S weighted
  values, gradients S or T products of C-term sums. All inputs are drawn from one distribution, so
  their standard deviation is the magnitude of what is rounded; `rounding` has room for the largest.
  """
  C, T, S = inputs.q_BTHC.shape[-1], inputs.q_BTHC.shape[1], inputs.k_BSKC.shape[1]
  group = inputs.q_BTHC.shape[2] // inputs.k_BSKC.shape[2]
  q, k, v, do = (np.asarray(x, np.float64).std() for x in inputs)
  out = rounding(C, q * k * v, dtype) + rounding(S, v, dtype)
  weight = rounding(C, do * v, dtype) * np.sqrt(C) + rounding(S, do * v, dtype) * np.sqrt(C)
  dq = weight * k + rounding(S, k * do * v, dtype)
  dk = weight * q * np.sqrt(group) + rounding(T * group, q * do * v, dtype)
  dv = rounding(C, q * k * do, dtype) * np.sqrt(group) + rounding(T * group, do, dtype)
  return out, dq, dk, dv
