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

_BLOCK_BYTES = 2**20  # of the keys of a block of windows
_ROWS = 16  # windows in a block come in this number, that of rows in a tile of bfloat16


def _dot(a, b, dims):
  return jax.lax.dot_general(
    a, b, dims, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
  )


class _Heads:
  """Sums over the channels of each head, and the inverse: a head's value to all its channels."""

  def __init__(self, heads, width):
    channel_EH = jax.lax.broadcasted_iota(jnp.int32, (width, heads), 0)
    head_EH = jax.lax.broadcasted_iota(jnp.int32, (width, heads), 1)
    channels = width // heads
    first_EH = head_EH * channels
    self._is_of_EH = ((channel_EH >= first_EH) & (channel_EH < first_EH + channels)).astype(
      jnp.float32
    )

  def sum(self, x_LNE):
    L, N, E = x_LNE.shape
    sums = _dot(x_LNE.reshape(L * N, E), self._is_of_EH, (((1,), (0,)), ((), ())))
    return sums.reshape(L, N, -1)

  def spread(self, x_LNH):
    L, N, H = x_LNH.shape
    spread = _dot(x_LNH.reshape(L * N, H), self._is_of_EH, (((1,), (1,)), ((), ())))
    return spread.reshape(L, N, -1)


def _weights(heads, q_NE, k_LNE, scale):
  scores_LNH = heads.sum(k_LNE * q_NE) * scale
  exp_LNH = jnp.exp(scores_LNH - scores_LNH.max(axis=0))
  return exp_LNH / exp_LNH.sum(axis=0)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, heads, scale):
  k_LNE, v_LNE = k_ref[...].astype(jnp.float32), v_ref[...].astype(jnp.float32)
  by_head = _Heads(heads, k_LNE.shape[-1])
  for n in range(q_ref.shape[0]):
    weights_LNH = _weights(by_head, q_ref[n].astype(jnp.float32), k_LNE, scale)
    out_ref[n] = (by_head.spread(weights_LNH) * v_LNE).sum(axis=0).astype(out_ref.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref, *, heads, scale):
  k_LNE, v_LNE = k_ref[...].astype(jnp.float32), v_ref[...].astype(jnp.float32)
  by_head = _Heads(heads, k_LNE.shape[-1])
  dk_LNE, dv_LNE = jnp.zeros_like(k_LNE), jnp.zeros_like(v_LNE)
  for n in range(q_ref.shape[0]):
    q_NE, do_NE = q_ref[n].astype(jnp.float32), do_ref[n].astype(jnp.float32)
    weights_LNH = _weights(by_head, q_NE, k_LNE, scale)
    dweights_LNH = by_head.sum(v_LNE * do_NE)
    mean_NH = (weights_LNH * dweights_LNH).sum(axis=0)
    dscores_LNE = by_head.spread(weights_LNH * (dweights_LNH - mean_NH)) * scale
    dq_ref[n] = (dscores_LNE * k_LNE).sum(axis=0).astype(dq_ref.dtype)
    dk_LNE += dscores_LNE * q_NE
    dv_LNE += by_head.spread(weights_LNH) * do_NE
  dk_ref[...] = dk_LNE.astype(dk_ref.dtype)
  dv_ref[...] = dv_LNE.astype(dv_ref.dtype)


def _call(kernel, name, inputs, outputs, heads, interpret):
  """Runs a kernel over blocks of windows; arrays are [queries or frames, windows, channels]."""
  (L, N, E) = inputs[1].shape
  windows = _BLOCK_BYTES // (L * E * 4) // _ROWS * _ROWS
  if not windows:
    raise ValueError(
      f"attention='mosaic' takes windows of at most {_BLOCK_BYTES // (E * 4) // _ROWS} frames of"
      f" {E} channels; got {L}. Use attention='xla'"
    )
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
  inputs = q_QNE, k_LNE, v_LNE
  return _call(_forward_kernel, "window_attention_forward", inputs, [q_QNE], heads, interpret)[0]


def _attend_forward(q_QNE, k_LNE, v_LNE, heads, interpret):
  return _attend(q_QNE, k_LNE, v_LNE, heads, interpret), (q_QNE, k_LNE, v_LNE)


def _attend_backward(heads, interpret, saved, do_QNE):
  inputs = *saved, do_QNE
  return tuple(
    _call(_backward_kernel, "window_attention_backward", inputs, saved, heads, interpret)
  )


_attend.defvjp(_attend_forward, _attend_backward)


def window_attention(
  q_NQHC: jax.Array, k_NLHC: jax.Array, v_NLHC: jax.Array, *, interpret: Any = False
) -> jax.Array:
  """Scaled dot-product attention of each window's queries to all its frames, on a TPU.

  Args:
    q_NQHC: queries of N windows, a few each.
    k_NLHC, v_NLHC: keys and values of the frames of each window.
    interpret: for tests on a CPU, as of `jax.experimental.pallas.pallas_call`.

  Returns:
    [N, Q, H, C] in q's dtype.

  Raises:
    ValueError: if a few windows do not fit into the memory of a core.
  """
  heads = q_NQHC.shape[2]
  q_QNE, k_LNE, v_LNE = (
    x.reshape(*x.shape[:2], -1).swapaxes(0, 1) for x in (q_NQHC, k_NLHC, v_NLHC)
  )
  return _attend(q_QNE, k_LNE, v_LNE, heads, interpret).swapaxes(0, 1).reshape(q_NQHC.shape)
