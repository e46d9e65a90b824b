import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.connectors.linear import LinearConfig, LinearConnector
from mooer_jax.nn.compute import Compute
from tests import tiny


def make(stack=2, **compute):
  connector = LinearConnector(LinearConfig(stack=stack, hidden_width=24), 10, Compute(**compute))
  frames = np.random.default_rng(0).normal(size=(3, 9, 16)).astype(np.float32)
  params = jax.eval_shape(connector.init, jax.random.key(0), frames, np.ones((3, 9), bool))
  return connector, tiny.random_params(params), frames


def valid_of(frames_B, T=9):
  return np.arange(T) < np.array(frames_B)[:, None]


@pytest.mark.parametrize("stack", [1, 2, 5])
def test_is_the_formula_and_drops_what_is_left_over(stack):
  connector, variables, frames = make(stack)
  tokens, valid = connector.apply(variables, frames, valid_of([9, 6, 1]))
  p, S = variables["params"], 9 // stack
  joined = frames[:, : S * stack].reshape(3, S, stack * 16)
  hidden = np.maximum(joined @ p["linear1"]["kernel"] + p["linear1"]["bias"], 0)
  expected = hidden @ p["linear2"]["kernel"] + p["linear2"]["bias"]
  np.testing.assert_allclose(tokens, expected, atol=1e-5)
  np.testing.assert_array_equal(valid.sum(1), [9 // stack, 6 // stack, 1 // stack])


def test_padding_and_batch_size_change_nothing():
  connector, variables, frames = make()
  frames_B = [9, 6, 3]
  tokens, valid = connector.apply(variables, frames, valid_of(frames_B))
  for n, count in enumerate(frames_B):
    alone, all_valid = connector.apply(
      variables, frames[n : n + 1, :count], np.ones((1, count), bool)
    )
    assert all_valid.all() and valid[n, : count // 2].all() and not valid[n, count // 2 :].any()
    np.testing.assert_allclose(tokens[n, : count // 2], alone[0], atol=1e-6)


def test_the_real_adapter_by_shape():
  for width, count in ((3584, 9_442_816), (1536, 5_246_464)):
    connector = LinearConnector(LinearConfig(), width)
    shapes = (jax.ShapeDtypeStruct((1, 8, 512), jnp.float32), jax.ShapeDtypeStruct((1, 8), bool))
    params = jax.eval_shape(connector.init, jax.random.key(0), *shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    tokens, _ = jax.eval_shape(connector.apply, params, *shapes)
    assert tokens.shape == (1, 4, width)


def test_bfloat16_is_close_and_takes_bfloat16_params():
  connector, variables, frames = make()
  half, _, _ = make(dtype="bfloat16")
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), variables)
  tokens, _ = half.apply(rounded, frames, valid_of([9, 9, 9]))
  expected, _ = connector.apply(variables, frames, valid_of([9, 9, 9]))
  assert tokens.dtype == jnp.bfloat16
  # 8 bits of mantissa through two products; outputs are of size 1.
  np.testing.assert_allclose(tokens.astype(np.float32), expected, atol=0.05)
