import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.connectors.linear import LinearConfig, LinearConnector
from mooer_jax.nn.compute import ExecutionConfig
from tests import tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding


def make(stack=2, **compute):
  connector = LinearConnector(
    LinearConfig(stack=stack, hidden_size=24), 10, ExecutionConfig(**compute)
  )
  frames = np.random.default_rng(0).normal(size=(3, 9, 16)).astype(np.float32)
  params = jax.eval_shape(connector.init, jax.random.key(0), frames, np.ones((3, 9), bool))
  return connector, tiny.random_params(params), frames


def valid_of(frames_B, T=9):
  return np.arange(T) < np.array(frames_B)[:, None]


@pytest.mark.parametrize("stack", [1, 2, 5])
def test_is_the_formula_and_drops_what_is_left_over(stack):
  connector, variables, frames = make(stack)
  tokens, valid = connector.apply(variables, frames, valid_of([9, 6, 1]))
  p, S = jax.tree.map(np.float64, variables["params"]), 9 // stack
  joined = np.float64(frames[:, : S * stack]).reshape(3, S, stack * 16)
  hidden = np.maximum(joined @ p["linear1"]["kernel"] + p["linear1"]["bias"], 0)
  expected = hidden @ p["linear2"]["kernel"] + p["linear2"]["bias"]
  bound = rounding(stack * 16, condition(run(connector, 9), variables, frames))
  assert_within(tokens, expected, bound)
  np.testing.assert_array_equal(valid.sum(1), [9 // stack, 6 // stack, 1 // stack])
  with exceeds_the_bound():
    assert_within(np.float32(1.001) * tokens, expected, bound)


def run(connector, *frames_B):
  """A function of variables and frames: tokens, of so many frames in each row or in all."""

  @jax.jit
  def tokens(variables, frames):
    return connector.apply(variables, frames, valid_of(np.resize(frames_B, len(frames))))[0]

  return tokens


@pytest.mark.parametrize("later", [0, 1])
def test_padding_and_batch_size_change_nothing(later):
  """And one frame later is not the same."""
  connector, variables, frames = make()
  frames_B = [9, 6, 3]
  tokens, valid = connector.apply(variables, frames, valid_of(frames_B))
  bound = rounding(32, condition(run(connector, *frames_B), variables, frames))
  for n, count in enumerate(frames_B):
    alone, all_valid = connector.apply(
      variables, np.roll(frames, later, axis=1)[n : n + 1, :count], np.ones((1, count), bool)
    )
    assert all_valid.all() and valid[n, : count // 2].all() and not valid[n, count // 2 :].any()
    with exceeds_the_bound() if later else contextlib.nullcontext():
      assert_within(tokens[n, : count // 2], alone[0], bound)


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
  # Products of bfloat16 are summed in float32, so one rounding of each input is all.
  bound = rounding(1, condition(run(connector, 9), variables, frames), jnp.bfloat16)
  assert_within(tokens, expected, bound)
  with exceeds_the_bound():
    assert_within(tokens[:, 1:], expected[:, :-1], bound)
