"""Attention of a few queries to the frames of their window for NVIDIA GPUs: Pallas for Triton.

A window is smaller than a tile of tensor cores (SALMONN: 1 query and 17 frames). A program has all
queries and frames of one window and head and computes elementwise, in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_MOST = 2**13  # elements of a tile, of which a program holds four in registers


def too_large(frames: int, channels: int) -> str:
  """Why windows do not fit into a program; empty if they do."""
  most = _MOST // channels
  if pl.next_power_of_2(frames) <= most:
    return ""
  return (
    f"takes windows of at most {most} frames of {channels} channels; got {frames}."
    " Use attention='auto'"
  )


def _load(ref, rows: int):
  """float32 [rows, C], zeros after the last row of a ref."""
  is_row = jnp.arange(rows) < ref.shape[0]
  return plgpu.load(ref.at[pl.ds(0, rows)], mask=is_row[:, None], other=0).astype(jnp.float32)


def _weights(q_C, k_LC, frames, scale):
  scores_L = jnp.where(
    jnp.arange(k_LC.shape[0]) < frames, (k_LC * q_C).sum(axis=1) * scale, -jnp.inf
  )
  exp_L = jnp.exp(scores_L - scores_L.max())
  return exp_L / exp_L.sum()


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, scale):
  frames = k_ref.shape[0]
  k_LC, v_LC = (_load(ref, pl.next_power_of_2(frames)) for ref in (k_ref, v_ref))
  for n in range(q_ref.shape[0]):
    weights_L = _weights(q_ref[n, :].astype(jnp.float32), k_LC, frames, scale)
    out_ref[n, :] = (weights_L[:, None] * v_LC).sum(axis=0).astype(out_ref.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref, *, scale):
  frames = k_ref.shape[0]
  rows = pl.next_power_of_2(frames)
  k_LC, v_LC = (_load(ref, rows) for ref in (k_ref, v_ref))
  dk_LC, dv_LC = jnp.zeros_like(k_LC), jnp.zeros_like(v_LC)
  for n in range(q_ref.shape[0]):
    q_C, do_C = q_ref[n, :].astype(jnp.float32), do_ref[n, :].astype(jnp.float32)
    weights_L = _weights(q_C, k_LC, frames, scale)
    dweights_L = (v_LC * do_C).sum(axis=1)
    dscores_L1 = (weights_L * (dweights_L - (weights_L * dweights_L).sum()) * scale)[:, None]
    dq_ref[n, :] = (dscores_L1 * k_LC).sum(axis=0).astype(dq_ref.dtype)
    dk_LC += dscores_L1 * q_C
    dv_LC += weights_L[:, None] * do_C
  for ref, x_LC in ((dk_ref, dk_LC), (dv_ref, dv_LC)):
    is_row = jnp.arange(rows) < frames
    plgpu.store(ref.at[pl.ds(0, rows)], x_LC.astype(ref.dtype), mask=is_row[:, None])


def _call(kernel, name, inputs, *, outputs, interpret):
  """Runs a kernel for each window and head; arrays are [windows, queries or frames, heads, C]."""
  N, _, H, C = inputs[0].shape

  def spec(x):
    return pl.BlockSpec((None, x.shape[1], None, C), lambda n, h: (n, 0, h, 0))

  return pl.pallas_call(
    functools.partial(kernel, scale=C**-0.5),
    grid=(N, H),
    in_specs=[spec(x) for x in inputs],
    out_specs=[spec(x) for x in outputs],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
    compiler_params=plgpu.CompilerParams(num_warps=1),
    interpret=interpret,
    name=name,
  )(*inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q_NQHC, k_NLHC, v_NLHC, interpret):
  inputs = q_NQHC, k_NLHC, v_NLHC
  options = dict(outputs=[q_NQHC], interpret=interpret)
  return _call(_forward_kernel, "window_attention_forward", inputs, **options)[0]


def _attend_forward(q_NQHC, k_NLHC, v_NLHC, interpret):
  return _attend(q_NQHC, k_NLHC, v_NLHC, interpret), (q_NQHC, k_NLHC, v_NLHC)


def _attend_backward(interpret, saved, do_NQHC):
  options = dict(outputs=saved, interpret=interpret)
  return tuple(_call(_backward_kernel, "window_attention_backward", (*saved, do_NQHC), **options))


_attend.defvjp(_attend_forward, _attend_backward)


def window_attention(
  q_NQHC: jax.Array, k_NLHC: jax.Array, v_NLHC: jax.Array, *, interpret: Any = False
) -> jax.Array:
  """`kernels.window_attention` on a GPU; `interpret`, for tests, is that of `pallas_call`."""
  return _attend(q_NQHC, k_NLHC, v_NLHC, interpret)
