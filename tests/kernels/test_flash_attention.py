"""Every backend of flash attention against plain float64 formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.kernels.attention import flash
from mooer_jax.kernels.attention.flash import Bias, flash_attention
from tests.kernels.plain import BACKENDS, INTERPRET, attention_and_gradients, bounds, random_inputs
from tests.numerics import assert_within, exceeds_the_bound, rounding


def run(backend, inputs, **arguments):
  """Output and gradients of q, k, v and, if there is one, of the bias."""
  bias = arguments.pop("bias", None)

  @jax.jit
  def both(q, k, v, bias, do):
    function = functools.partial(flash_attention, backend=backend, interpret=INTERPRET, **arguments)
    out, vjp = jax.vjp(lambda q, k, v, bias: function(q, k, v, bias=bias), q, k, v, bias)
    return out, vjp(do)

  *qkv, do = inputs
  out, gradients = both(*qkv, bias, do)
  return out, *gradients


def with_nan(x_BSKC, valid_BS):
  return np.where(valid_BS[:, :, None, None], x_BSKC, np.nan).astype(x_BSKC.dtype)


# One tile; several tiles of queries and of keys with ragged ends; grouped heads; a short query.
SHAPES = {
  "one tile": (2, 20, 20, 2, 2, 16),
  "ragged tiles": (1, 530, 530, 1, 1, 8),
  "grouped heads": (2, 140, 140, 4, 2, 64),
  "few queries": (2, 3, 150, 2, 1, 32),
}
CASES = [
  ("one tile", False),
  ("ragged tiles", True),
  ("grouped heads", True),
  ("few queries", False),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, causal", CASES)
def test_equals_the_plain_formula(backend, shape, causal):
  inputs = random_inputs(*SHAPES[shape])
  B, T = inputs.q_BTHC.shape[:2]
  S = inputs.k_BSKC.shape[1]
  valid_BS = np.ones((B, S), bool)
  valid_BS[0, S - 5 :] = False  # padding on the right,
  valid_BS[-1, :3] = False  # on the left
  valid_BS[-1, S // 2] = False  # and a hole
  attention_mask_BTS = np.repeat(valid_BS[:, None], T, 1)
  if causal:
    attention_mask_BTS &= np.arange(S) <= np.arange(T)[:, None]
  expected = attention_and_gradients(inputs, attention_mask_BTS)[:-1]
  given = inputs._replace(
    k_BSKC=with_nan(inputs.k_BSKC, valid_BS), v_BSKC=with_nan(inputs.v_BSKC, valid_BS)
  )
  actual = run(backend, given, valid_BS=jnp.array(valid_BS), causal=causal)[:4]
  assert_within(actual, expected, bounds(inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_by_distance_is_added_and_has_gradients(backend, monkeypatch):
  monkeypatch.setattr(flash, "_BLOCK", 64)  # blocks of the gradient of the bias
  monkeypatch.setattr(flash.tpu, "_BLOCK", 128)
  B, T, S, H = 2, 150, 140, 2
  inputs = random_inputs(B, T, S, H, H, 16)
  rng = np.random.default_rng(1)
  gate_BTH = rng.normal(size=(B, T, H)).astype(np.float32)
  table_HR = rng.normal(size=(H, T + S - 1)).astype(np.float32)
  valid_BS = np.arange(S) < np.array([[S], [S - 20]])
  bias_HTS = table_HR[:, np.arange(S) - np.arange(T)[:, None] + T - 1]
  bias_BHTS = gate_BTH.swapaxes(1, 2)[..., None] * bias_HTS
  attention_mask_BTS = np.repeat(valid_BS[:, None], T, 1)
  *expected, dscores = attention_and_gradients(inputs, attention_mask_BTS, bias_BHTS)
  dgate_BTH = (dscores * bias_HTS).sum(-1).swapaxes(1, 2)
  dtable_HR = np.zeros(table_HR.shape)
  for t in range(T):
    dtable_HR[:, T - 1 - t :][:, :S] += (dscores[:, :, t] * gate_BTH[:, t, :, None]).sum(0)
  bias = Bias(jnp.array(gate_BTH), jnp.array(table_HR))
  *actual, dbias = run(backend, inputs, valid_BS=jnp.array(valid_BS), bias=bias)
  assert_within(tuple(actual), tuple(expected), bounds(inputs))
  largest = np.abs(bias_HTS).max(), np.abs(gate_BTH).max() * B
  dq_bound = bounds(inputs)[1]
  limits = Bias(*(dq_bound * x * 16**0.5 for x in largest))
  assert_within(dbias, Bias(dgate_BTH, dtable_HR), limits)
  with exceeds_the_bound():  # one distance further
    assert_within(dbias.table_HR, np.roll(dtable_HR, 1, axis=1), limits.table_HR)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_shifts_the_causal_order(backend):
  inputs = random_inputs(1, 7, 40, 4, 2, 16)
  attention_mask_BTS = (np.arange(40) <= 11 + np.arange(7)[:, None])[None]
  expected = attention_and_gradients(inputs, attention_mask_BTS)[:-1]
  arguments = dict(valid_BS=jnp.ones((1, 40), bool), causal=True)
  actual = run(backend, inputs, first_query=jnp.int32(11), **arguments)[:4]
  assert_within(actual, expected, bounds(inputs))
  with exceeds_the_bound():
    assert_within(
      run(backend, inputs, first_query=12, **arguments)[0], expected[0], bounds(inputs)[0]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_in_and_out_with_a_float32_softmax(backend):
  inputs = random_inputs(1, 64, 64, 2, 2, 32)
  inputs = type(inputs)(*(jnp.asarray(x, jnp.bfloat16) for x in inputs))
  actual = run(backend, inputs, valid_BS=jnp.ones((1, 64), bool))[:4]
  assert {x.dtype for x in actual} == {jnp.dtype(jnp.bfloat16)}
  expected = attention_and_gradients(inputs, np.ones((1, 64, 64), bool))[:-1]
  # The weights, their gradients and the results are rounded.
  limits = tuple(rounding(2, np.abs(x).max(), jnp.bfloat16) for x in expected)
  assert_within(actual, expected, limits)
  one_less = jnp.arange(64)[None] > 0
  for ours, plain, limit in zip(run(backend, inputs, valid_BS=one_less), expected, limits):
    with exceeds_the_bound():
      assert_within(ours, plain, limit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", ["key", "scale", "head"])
def test_a_fault_exceeds_the_bounds(backend, fault):
  inputs = random_inputs(*SHAPES["one tile"])
  valid_BS = np.ones((2, 20), bool)
  expected = attention_and_gradients(inputs, np.ones((2, 20, 20), bool))[:-1]
  faulty = inputs
  if fault == "key":
    valid_BS[0, 4] = False
  elif fault == "scale":
    faulty = inputs._replace(q_BTHC=inputs.q_BTHC * np.float32(1.001))
  else:
    faulty = inputs._replace(k_BSKC=np.roll(inputs.k_BSKC, 1, axis=2))
  actual = run(backend, faulty, valid_BS=jnp.array(valid_BS))
  for ours, plain, bound in zip(actual, expected, bounds(inputs)):
    with exceeds_the_bound():
      assert_within(ours, plain, bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_a_valid_key_gives_zeros_and_no_gradient(backend):
  inputs = random_inputs(2, 9, 9, 1, 1, 16)
  valid_BS = np.array([[True] * 9, [False] * 9])
  for x in run(backend, inputs, valid_BS=jnp.array(valid_BS))[:4]:
    assert np.isfinite(x).all()
    np.testing.assert_array_equal(x[1], 0)


def test_triton_lowers_for_cuda_without_a_gpu():
  q, k, v, _ = random_inputs(1, 70, 70, 4, 2, 64)
  loss = lambda q, k, v: flash_attention(  # noqa: E731
    q, k, v, valid_BS=jnp.ones((1, 70), bool), causal=True, backend="triton"
  ).sum()
  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  for name in ("flash_attention_forward", "flash_attention_dq", "flash_attention_dkv"):
    assert name in text
