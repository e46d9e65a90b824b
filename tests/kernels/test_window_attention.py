import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.kernels import window_attention
from mooer_jax.kernels.window_attention import gpu, tpu
from tests.kernels.plain import BACKENDS as NAMES
from tests.kernels.plain import INTERPRET, attention_and_gradients, bounds, random_inputs
from tests.numerics import assert_within, exceeds_the_bound

BACKENDS = [{"mosaic": tpu, "triton": gpu}[name] for name in NAMES]


# SALMONN's windows in several blocks; several queries, and windows that fill no block.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N, Q, L, H, C", [(40, 1, 17, 12, 64), (13, 4, 5, 2, 32)])
def test_equals_the_plain_formula(backend, N, Q, L, H, C):
  inputs = random_inputs(N, Q, L, H, H, C)
  expected = attention_and_gradients(inputs, np.ones((N, Q, L), bool))[:-1]
  out, vjp = jax.vjp(lambda *a: backend.window_attention(*a, interpret=INTERPRET), *inputs[:3])
  actual = out, *vjp(jnp.array(inputs.do_BTHC))
  assert_within(actual, expected, bounds(inputs))
  with exceeds_the_bound():
    assert_within(np.roll(out, 1, axis=0), expected[0], bounds(inputs)[0])


def test_windows_that_do_not_fit_are_refused():
  x = jnp.zeros((1, 600, 4, 64))
  with pytest.raises(ValueError, match="windows of at most 64 frames of 256 channels; got 600"):
    window_attention(x[:, :1], x, x, implementation="mosaic", platform="tpu")
  with pytest.raises(ValueError, match="windows of at most 128 frames of 64 channels; got 600"):
    window_attention(x[:, :1], x, x, implementation="triton", platform="gpu")


def test_triton_lowers_for_cuda_without_a_gpu():
  q, k, v, _ = random_inputs(8, 1, 17, 12, 12, 64)
  loss = lambda q, k, v: window_attention(q, k, v, implementation="triton", platform="gpu").sum()  # noqa: E731
  traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(q, k, v)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  for name in ("window_attention_forward", "window_attention_backward"):
    assert name in text
