"""JAX's splash attention, called by the rules of `kernels.attention`, in interpret mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.kernels import attention
from mooer_jax.kernels.attention.splash import splash_attention
from tests.kernels.plain import attention_and_gradients, bounds, random_inputs
from tests.numerics import assert_within, exceeds_the_bound

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="no CPU: interpreted")
CASES = {
  "grouped heads": (2, 140, 140, 4, 2, 64, True, 0),
  "few queries": (2, 3, 150, 2, 1, 32, False, 0),
  "after a cache": (1, 20, 40, 2, 2, 64, True, 20),
}


def run(inputs, **arguments):
  function = jax.jit(functools.partial(splash_attention, interpret=True, **arguments))
  out, vjp = jax.vjp(function, inputs.q_BTHC, inputs.k_BSKC, inputs.v_BSKC)
  return out, *vjp(inputs.do_BTHC)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_formula(case):
  B, T, S, H, K, C, causal, first = CASES[case]
  inputs = random_inputs(B, T, S, H, K, C)
  valid_BS = np.ones((B, S), bool)
  valid_BS[0, S - 5 :] = False  # padding on the right,
  valid_BS[-1, :3] = False  # on the left: with `causal`, queries 0 to 2 see no key,
  valid_BS[-1, S // 2] = False  # and a hole
  mask_BTS = np.repeat(valid_BS[:, None], T, 1)
  if causal:
    mask_BTS &= np.arange(S) <= first + np.arange(T)[:, None]
  expected = attention_and_gradients(inputs, mask_BTS)[:-1]
  k, v = (np.where(valid_BS[..., None, None], x, np.nan) for x in inputs[1:3])
  given = inputs._replace(k_BSKC=k.astype(np.float32), v_BSKC=v.astype(np.float32))
  arguments = dict(causal=causal, first_query=first)
  actual = run(given, valid_BS=jnp.array(valid_BS), **arguments)
  assert_within(actual, expected, bounds(inputs))
  with exceeds_the_bound():  # a key less
    valid_BS[0, 5] = False
    assert_within(run(inputs, valid_BS=jnp.array(valid_BS), **arguments), expected, bounds(inputs))


def test_a_row_without_a_valid_key_gives_zeros_and_no_gradient():
  inputs = random_inputs(2, 5, 6, 2, 1, 16)
  valid_BS = jnp.array([[False] * 6, [True] * 6])
  for x in run(inputs, valid_BS=valid_BS):
    assert not np.asarray(x[0]).any() and np.asarray(x[1]).all()


def test_what_it_does_not_support_is_refused():
  q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in random_inputs(1, 4, 4, 2, 2, 16))
  call = functools.partial(attention, valid_BS=jnp.ones((1, 4), bool), implementation="splash")
  with pytest.raises(ValueError, match="'splash' runs on tpu; the program is for cpu"):
    call(q, k, v)
  with pytest.raises(ValueError, match="'splash' runs in bfloat16; got float32"):
    call(*(x.astype(jnp.float32) for x in (q, k, v)), platform="tpu")
  with pytest.raises(ValueError, match="'splash' is for training"):
    call(q, k, v, causal=True, first_query=jnp.int32(1), platform="tpu")
