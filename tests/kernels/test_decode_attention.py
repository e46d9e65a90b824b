import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.kernels.decode_tpu import decode_attention
from tests.kernels.plain import attention_and_gradients, bounds, random_inputs
from tests.numerics import assert_within, exceeds_the_bound


def of_cache(x_BSKC, filled):
  """The cache's layout, NaN in the slots that are not filled."""
  x_BSKC = np.where(np.arange(x_BSKC.shape[1])[:, None, None] < filled, x_BSKC, np.nan)
  return x_BSKC.reshape(*x_BSKC.shape[:2], -1).astype(np.float32)


# Beams of a prompt; one token after several tiles of slots; heads that fill no lanes alone.
@pytest.mark.parametrize(
  "T, S, H, K, C, filled",
  [(4, 300, 14, 2, 64, 250), (1, 1300, 4, 4, 128, 1300), (3, 40, 9, 3, 64, 17)],
)
def test_equals_the_plain_formula(T, S, H, K, C, filled):
  inputs = random_inputs(2, T, S, H, K, C)
  attention_mask_BTS = np.random.default_rng(2).random((2, T, S)) < 0.7
  attention_mask_BTS[..., filled - 1] = True
  expected = attention_and_gradients(inputs, attention_mask_BTS & (np.arange(S) < filled))[0]
  keys, values = (of_cache(x, filled) for x in (inputs.k_BSKC, inputs.v_BSKC))
  arguments = dict(mask_BTS=jnp.array(attention_mask_BTS), kv_heads=K, interpret=True)
  out = decode_attention(inputs.q_BTHC, keys, values, end=jnp.int32(filled), **arguments)
  assert_within(out, expected, bounds(inputs)[0])
  with exceeds_the_bound():
    out = decode_attention(inputs.q_BTHC, keys, values, end=filled - 1, **arguments)
    assert_within(out, expected, bounds(inputs)[0])
