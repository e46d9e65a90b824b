"""Attention of a few queries to the frames of their window, for many windows at once.

A window is far smaller than a tile of matrix units (SALMONN: 1 query and 17 frames), so scores are
computed elementwise over all windows of a block, and only the sums over the channels of each head
use the matrix unit. Softmax is over the frames, which are the leading axis.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mooer_jax.kernels.attention.tpu import NN, NT

_BLOCK_BYTES = 2**20  # of the keys of a block of windows
_ROWS = 16  # windows in a block come in this number, that of rows in a tile of bfloat16


def _is_of_head(width, heads):
  """float32 [E, H], 1 where a channel belongs to a head."""
  channel_EH = jax.lax.broadcasted_iota(jnp.int32, (width, heads), 0)
  first_EH = jax.lax.broadcasted_iota(jnp.int32, (width, heads), 1) * (width // heads)
  return ((channel_EH >= first_EH) & (channel_EH < first_EH + width // heads)).astype(jnp.float32)


def _product(x_LNE, y, dims):
  L, N, E = x_LNE.shape
  product = jax.lax.dot_general(
    x_LNE.reshape(L * N, E),
    y,
    dims,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return product.reshape(L, N, -1)


def _sums(x_LNE, heads):
  """Sums over the channels of each head: [L, N, E] to [L, N, H]."""
  return _product(x_LNE, _is_of_head(x_LNE.shape[-1], heads), NN)


def _spread(x_LNH, width):
  """A head's value to all its channels: [L, N, H] to [L, N, E]."""
  return _product(x_LNH, _is_of_head(width, x_LNH.shape[-1]), NT)


def _weights(q_NE, k_LNE, *, heads, scale):
  scores_LNH = _sums(k_LNE * q_NE, heads) * scale
  exp_LNH = jnp.exp(scores_LNH - scores_LNH.max(axis=0))
  return exp_LNH / exp_LNH.sum(axis=0)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, **options):
  k_LNE, v_LNE = k_ref[...].astype(jnp.float32), v_ref[...].astype(jnp.float32)
  for n in range(q_ref.shape[0]):
    weights_LNH = _weights(q_ref[n].astype(jnp.float32), k_LNE, **options)
    out_ref[n] = (_spread(weights_LNH, k_LNE.shape[-1]) * v_LNE).sum(axis=0).astype(out_ref.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref, *, heads, scale):
  k_LNE, v_LNE = k_ref[...].astype(jnp.float32), v_ref[...].astype(jnp.float32)
  dk_LNE, dv_LNE = jnp.zeros_like(k_LNE), jnp.zeros_like(v_LNE)
  width = k_LNE.shape[-1]
  for n in range(q_ref.shape[0]):
    q_NE, do_NE = q_ref[n].astype(jnp.float32), do_ref[n].astype(jnp.float32)
    weights_LNH = _weights(q_NE, k_LNE, heads=heads, scale=scale)
    dweights_LNH = _sums(v_LNE * do_NE, heads)
    mean_NH = (weights_LNH * dweights_LNH).sum(axis=0)
    dscores_LNE = _spread(weights_LNH * (dweights_LNH - mean_NH), width) * scale
    dq_ref[n] = (dscores_LNE * k_LNE).sum(axis=0).astype(dq_ref.dtype)
    dk_LNE += dscores_LNE * q_NE
    dv_LNE += _spread(weights_LNH, width) * do_NE
  dk_ref[...] = dk_LNE.astype(dk_ref.dtype)
  dv_ref[...] = dv_LNE.astype(dv_ref.dtype)


def too_large(frames: int, width: int) -> str:
  """Why windows do not fit into the memory of a core; empty if they do."""
  most = _BLOCK_BYTES // (width * 4) // _ROWS
  if frames <= most:
    return ""
  return (
    f"takes windows of at most {most} frames of {width} channels; got {frames}."
    " Use attention='auto'"
  )


def _call(kernel, name, inputs, *, outputs, heads, interpret):
  """Runs a kernel over blocks of windows; arrays are [queries or frames, windows, channels]."""
  (L, N, E) = inputs[1].shape
  if reason := too_large(L, E):
    raise ValueError(f"attention='mosaic' {reason}")
  windows = _BLOCK_BYTES // (L * E * 4) // _ROWS * _ROWS
  windows = min(windows, pl.cdiv(N, _ROWS) * _ROWS)

  def spec(x):
    return pl.BlockSpec((x.shape[0], windows, E), lambda n: (0, n, 0))

  return pl.pallas_call(
    functools.partial(kernel, heads=heads, scale=(E // heads) ** -0.5),
    grid=(pl.cdiv(N, windows),),
    in_specs=[spec(x) for x in inputs],
    out_specs=[spec(x) for x in outputs],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    interpret=interpret,
    name=name,
  )(*inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q_QNE, k_LNE, v_LNE, heads, interpret):
  options = dict(outputs=[q_QNE], heads=heads, interpret=interpret)
  return _call(_forward_kernel, "window_attention_forward", (q_QNE, k_LNE, v_LNE), **options)[0]


def _attend_forward(q_QNE, k_LNE, v_LNE, heads, interpret):
  return _attend(q_QNE, k_LNE, v_LNE, heads, interpret), (q_QNE, k_LNE, v_LNE)


def _attend_backward(heads, interpret, saved, do_QNE):
  options = dict(outputs=saved, heads=heads, interpret=interpret)
  return tuple(_call(_backward_kernel, "window_attention_backward", (*saved, do_QNE), **options))


_attend.defvjp(_attend_forward, _attend_backward)


def window_attention(
  q_NQHC: jax.Array, k_NLHC: jax.Array, v_NLHC: jax.Array, *, interpret: Any = False
) -> jax.Array:
  """`kernels.window_attention` on a TPU; `interpret`, for tests, is that of `pallas_call`.

  Raises:
    ValueError: if a few windows do not fit into the memory of a core.
  """
  heads = q_NQHC.shape[2]
  q_QNE, k_LNE, v_LNE = (
    x.reshape(*x.shape[:2], -1).swapaxes(0, 1) for x in (q_NQHC, k_NLHC, v_NLHC)
  )
  return _attend(q_QNE, k_LNE, v_LNE, heads, interpret).swapaxes(0, 1).reshape(q_NQHC.shape)
