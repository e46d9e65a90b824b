import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.kernels import decode_attention
from mooer_jax.kernels.decode_attention import by_kernel, gpu, tpu
from tests.kernels.plain import BACKENDS as NAMES
from tests.kernels.plain import INTERPRET, attention_and_gradients, bounds, random_inputs
from tests.numerics import assert_within, exceeds_the_bound, rounding

BACKENDS = [{"mosaic": tpu, "triton": gpu}[name] for name in NAMES]


def attend(backend, *arguments):
  """`by_kernel` with q, keys, values, mask and end."""
  return by_kernel(backend.decode_attention, *arguments, interpret=INTERPRET)


def of_cache(x_BSKC, filled):
  """The cache's layout, NaN in the slots that are not filled."""
  x_BSKC = np.where(np.arange(x_BSKC.shape[1])[:, None, None] < filled, x_BSKC, np.nan)
  return x_BSKC.reshape(*x_BSKC.shape[:2], -1).astype(np.float32)


# Beams of a prompt; one token after several tiles of slots; heads that fill no lanes alone.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
  "T, S, H, K, C, filled",
  [(4, 300, 14, 2, 64, 250), (1, 1300, 4, 4, 128, 1300), (3, 40, 9, 3, 64, 17)],
)
def test_equals_the_plain_formula(backend, T, S, H, K, C, filled):
  inputs = random_inputs(2, T, S, H, K, C)
  attention_mask_BTS = np.random.default_rng(2).random((2, T, S)) < 0.7
  attention_mask_BTS[..., filled - 1] = True
  attention_mask_BTS[0, 0] = False  # a query without a key
  expected = attention_and_gradients(inputs, attention_mask_BTS & (np.arange(S) < filled))[0]
  keys, values = (of_cache(x, filled) for x in (inputs.k_BSKC, inputs.v_BSKC))
  arguments = backend, inputs.q_BTHC, keys, values, jnp.array(attention_mask_BTS)
  assert_within(attend(*arguments, jnp.int32(filled)), expected, bounds(inputs)[0])
  with exceeds_the_bound():
    assert_within(attend(*arguments, filled - 1), expected, bounds(inputs)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("end", [0, 1])
def test_of_an_empty_cache_nothing_is_read(backend, end):
  q_BTHC, k_BSKC, v_BSKC, _ = random_inputs(1, 2, 300, 2, 1, 64)
  keys, values = (of_cache(x, end) for x in (k_BSKC, v_BSKC))
  out = attend(backend, q_BTHC, keys, values, jnp.ones((1, 2, 300), bool), end)
  # The only weight is 1.
  expected = v_BSKC[:, :1] if end else np.zeros((1, 1, 1, 64))
  assert_within(out, np.broadcast_to(expected, out.shape), rounding(1, np.abs(v_BSKC).max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_in_and_out_with_a_float32_softmax(backend):
  inputs = random_inputs(2, 4, 70, 6, 2, 32)
  inputs = type(inputs)(*(jnp.asarray(x, jnp.bfloat16) for x in inputs))
  mask_BTS = np.ones((2, 4, 70), bool)
  expected = attention_and_gradients(inputs, mask_BTS)[0]
  keys, values = (x.reshape(2, 70, -1) for x in (inputs.k_BSKC, inputs.v_BSKC))
  arguments = backend, inputs.q_BTHC, keys, values
  out = attend(*arguments, jnp.array(mask_BTS), 70)
  assert out.dtype == jnp.bfloat16
  limit = rounding(2, np.abs(expected).max(), jnp.bfloat16)  # of the weights and the output
  assert_within(out, expected, limit)
  with exceeds_the_bound():
    assert_within(attend(*arguments, jnp.arange(70) > jnp.zeros((2, 4, 1)), 70), expected, limit)


def test_triton_lowers_for_cuda_without_a_gpu():
  q_BTHC, k_BSKC, v_BSKC, _ = random_inputs(2, 4, 700, 14, 2, 64)
  cache = [x.reshape(2, 700, -1) for x in (k_BSKC, v_BSKC)]
  mask_BTS = jnp.ones((2, 4, 700), bool)
  chosen = dict(kv_heads=2, mask_BTS=mask_BTS, implementation="triton", platform="gpu")
  traced = jax.jit(lambda q, k, v, end: decode_attention(q, k, v, end=end, **chosen))
  lowered = traced.trace(q_BTHC, *cache, jnp.int32(3)).lower(lowering_platforms=("cuda",))
  assert "decode_attention" in lowered.as_text()
