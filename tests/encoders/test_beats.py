import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import tree
from mooer_jax.encoders.beats import BEATsConfig, BEATsEncoder, distance_buckets
from mooer_jax.nn.compute import ExecutionConfig
from tests import tiny
from tests.encoders import contract


def last_norm(config, params, features, frames_B):
  """Not a gain of the features, which the first norm removes."""
  flat = tree.flatten(params)
  flat["layers_1/mlp_norm/scale"] = flat["layers_1/mlp_norm/scale"] * np.float32(1.001)
  return config, tree.unflatten(flat), features, frames_B


def one_bin_up(config, params, features, frames_B):
  return config, params, np.roll(features, 1, axis=2), frames_B


def other_buckets(config, params, features, frames_B):
  return dataclasses.replace(config, max_distance=10), params, features, frames_B


class TestContract(contract.EncoderContract):
  module = BEATsEncoder
  config = tiny.BEATS
  frames_B = (45, 31, 8, 7)
  empty_B = (0, 45, 7, 8)
  longest = 64  # a patch
  # A key's bias moves all scores of a query alike, so its gradient is rounding alone.
  gradient_floor = 0.01
  faults = (
    last_norm,
    contract.one_frame_later,
    one_bin_up,
    contract.other_eps,
    other_buckets,
  )

  @staticmethod
  def tokens(frames):
    return frames // 8 * 4


def test_iter3_has_90_31_million_parameters_and_496_tokens_for_10_s():
  config = BEATsConfig.SIZES["beats_iter3"]
  shapes = (jax.ShapeDtypeStruct((1, 998, 128), jnp.float32), jax.ShapeDtypeStruct((1, 998), bool))
  trees = {}
  for scan in (False, True):
    encoder = BEATsEncoder(config, ExecutionConfig(scan=scan))
    trees[scan] = jax.eval_shape(encoder.init, jax.random.key(0), *shapes)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(trees[False])) == 90_311_792
  assert tree.stack_layers(trees[False]) == trees[True]
  assert trees[True]["relative_bias"]["embedding"].shape == (320, 12)  # one for all layers
  out, valid = jax.eval_shape(encoder.apply, {"params": trees[True]}, *shapes)
  assert out.shape == (1, 496, 768) and valid.shape == (1, 496)


def test_every_valid_frame_of_a_whole_patch_matters_and_no_other():
  encoder, params, features = TestContract.make()
  frames_B = TestContract.frames_B

  def tokens(features):
    valid_BT = contract.valid_of(features, frames_B)
    return contract.apply(encoder, params, features, valid_BT)[0][:3, :4].sum((1, 2))

  moved = [np.asarray(jax.grad(lambda x, n=n: tokens(x)[n])(features)) for n in range(3)]
  for n, gradient in enumerate(moved):
    heard_T = np.abs(gradient[n]).sum(-1) > 0
    np.testing.assert_array_equal(heard_T, np.arange(45) < frames_B[n] // 8 * 8)
    assert not np.delete(gradient, n, axis=0).any()


def test_near_distances_have_a_bucket_each_and_directions_never_share_one():
  rows = distance_buckets(2000, buckets=320, max_distance=800)
  before, behind = rows[:1999][::-1], rows[2000:]
  np.testing.assert_array_equal(before[:79], np.arange(1, 80))
  np.testing.assert_array_equal(behind, before + 160)
  assert (np.diff(before) >= 0).all() and rows[1999] == 0
  assert (
    (before[799:] == 159).all() and (before[776], before[777]) == (158, 159) and behind.max() == 319
  )


def test_features_shorter_than_a_patch_are_refused():
  encoder, params, _ = TestContract.make()
  with pytest.raises(ValueError, match="at least 8 frames, got T=7"):
    contract.apply(encoder, params, np.zeros((2, 7, 32), np.float32), np.ones((2, 7), bool))


@pytest.mark.parametrize(
  "values, message",
  [
    ({"hidden_size": 770}, "beats.hidden_size=770 .* beats.heads=12"),
    ({"conv_pos_groups": 10}, "beats.hidden_size=768 .* beats.conv_pos_groups=10"),
    ({"input_width": 80, "patch": 32}, "beats.input_width=80 .* beats.patch=32"),
    ({"layers": 0}, "beats.layers=0"),
    ({"buckets": 321}, "beats.buckets=321"),
    ({"max_distance": 80}, "beats.max_distance=80"),
  ],
)
def test_impossible_sizes_are_refused_by_name(values, message):
  with pytest.raises(ValueError, match=message):
    BEATsConfig(**values)
