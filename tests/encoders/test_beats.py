import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import tree
from mooer_jax.config import part_from_json, part_to_json
from mooer_jax.encoders.beats import BEATS_SIZES, BEATsConfig, BEATsEncoder, distance_buckets
from mooer_jax.nn.compute import ExecutionConfig
from tests import tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

# Patches of 8 x 8, four bands; positions reach three patches far.
SMALL = BEATsConfig(
  input_width=32,
  hidden_size=24,
  layers=2,
  heads=4,
  intermediate_size=40,
  patch=8,
  patch_width=20,
  conv_pos=6,
  conv_pos_groups=3,
  buckets=16,
  max_distance=20,
)
FRAMES_B = [45, 31, 8, 7]
TOKENS_B = [20, 12, 4, 0]
ALL_VALID = np.ones((4, 45), bool)
LONGEST = 64  # terms of the longest sum, that over a patch


def make(config=SMALL, **compute):
  """An encoder, random params in its layout, features [4, 45, F]."""
  features = np.random.default_rng(0).normal(size=(4, 45, config.input_width)).astype(np.float32)
  shapes = jax.eval_shape(BEATsEncoder(config).init, jax.random.key(0), features, ALL_VALID)
  params = tiny.random_params(shapes["params"])
  encoder = BEATsEncoder(config, ExecutionConfig(**compute))
  return encoder, tree.stack_layers(params) if encoder.compute.scan else params, features


@functools.partial(jax.jit, static_argnums=0)
def apply(encoder, params, features, valid_BT, **kwargs):
  return encoder.apply({"params": params}, features, valid_BT, **kwargs)


def run(encoder, params, features, frames_B, **kwargs):
  valid_BT = np.arange(features.shape[1]) < np.asarray(frames_B)[:, None]
  out_BSD, valid_BS = apply(encoder, params, features, valid_BT, **kwargs)
  tokens_B = np.asarray(frames_B) // 8 * 4
  np.testing.assert_array_equal(valid_BS, np.arange(valid_BS.shape[1]) < tokens_B[:, None])
  return np.asarray(out_BSD)


def test_iter3_has_90_31_million_parameters_and_496_tokens_for_10_s():
  config = BEATS_SIZES["beats_iter3"]
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


@pytest.fixture(scope="module")
def scale():
  """Sensitivity of the outputs of `make` to rounding: [B, S, 1]."""
  encoder, params, features = make()
  return condition(lambda *x: run(encoder, *x, FRAMES_B), params, features, of_rows=True)


def check_rows(together, encoder, params, features, scale):
  """Each row of a batch is what the encoder makes of its valid frames alone."""
  for n, (frames, tokens) in enumerate(zip(FRAMES_B[:3], TOKENS_B)):
    alone = run(encoder, params, features[n : n + 1, :frames], [frames])
    assert_within(together[n, :tokens], alone[0], rounding(LONGEST, scale[n, :tokens]))


def test_a_clip_is_the_same_alone_and_in_any_batch(scale):
  encoder, params, features = make()
  check_rows(run(encoder, params, features, FRAMES_B), encoder, params, features, scale)


@pytest.mark.parametrize("fault", ["gain 1.001", "one frame later", "one bin up", "eps", "buckets"])
def test_a_fault_exceeds_the_bound(scale, fault):
  encoder, params, features = make()
  together = run(encoder, params, features, FRAMES_B)
  if fault == "gain 1.001":  # of the last layer's norm, for the first one takes it away
    params = tree.flatten(params)
    params["layers_1/mlp_norm/scale"] = params["layers_1/mlp_norm/scale"] * np.float32(1.001)
    params = tree.unflatten(params)
  elif fault == "one frame later":
    features = np.roll(features, 1, axis=1)
  elif fault == "one bin up":
    features = np.roll(features, 1, axis=2)
  else:
    changes = {"norm_eps": 1e-3} if fault == "eps" else {"max_distance": 10}
    encoder = BEATsEncoder(dataclasses.replace(SMALL, **changes))
  with exceeds_the_bound():
    check_rows(together, encoder, params, features, scale)


@pytest.mark.parametrize("value", [1e4, np.nan])
def test_what_stands_in_the_padding_does_not_matter(value):
  encoder, params, features = make()
  before = run(encoder, params, features, FRAMES_B)
  for row, frames in zip(features, FRAMES_B):
    row[frames:] = value
  after = run(encoder, params, features, FRAMES_B)
  np.testing.assert_array_equal(before, after)


def test_every_valid_frame_of_a_whole_patch_matters_and_no_other():
  encoder, params, features = make()

  def tokens(features):
    valid_BT = np.arange(45) < np.array(FRAMES_B)[:, None]
    return apply(encoder, params, features, valid_BT)[0][:3, :4].sum((1, 2))

  moved = [np.asarray(jax.grad(lambda x, n=n: tokens(x)[n])(features)) for n in range(3)]
  for n, gradient in enumerate(moved):
    heard_T = np.abs(gradient[n]).sum(-1) > 0
    np.testing.assert_array_equal(heard_T, np.arange(45) < FRAMES_B[n] // 8 * 8)
    assert not np.delete(gradient, n, axis=0).any()


@functools.partial(jax.jit, static_argnums=0)
def gradient(encoder, params, features, valid_BT):
  def loss(params):
    out_BSD, valid_BS = encoder.apply({"params": params}, features, valid_BT)
    return jnp.where(valid_BS[..., None], jnp.sin(out_BSD), 0).mean()

  return jax.value_and_grad(loss)(params)


def test_a_row_without_a_valid_patch_stays_finite_also_backwards():
  encoder, params, features = make()
  valid_BT = np.arange(45) < np.array([0, 45, 7, 8])[:, None]
  out_BSD, valid_BS = apply(encoder, params, features, valid_BT)
  assert np.isfinite(out_BSD).all()
  np.testing.assert_array_equal(valid_BS.sum(1), [0, 20, 0, 4])
  value, grads = gradient(encoder, params, features, valid_BT)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scan_and_remat_change_neither_output_nor_gradient(remat):
  plain, params, features = make()
  scale = condition(lambda p: gradient(plain, p, features, ALL_VALID), params)
  # A key's bias moves all scores of a query alike, so its gradient is rounding alone: of gradients
  # of the size of the others.
  floor = 0.01 * max(map(np.max, jax.tree.leaves(scale[1])))
  bound = rounding(LONGEST, jax.tree.map(lambda x: np.maximum(x, floor), scale))
  value, grads = gradient(*make(scan=True, remat=remat), ALL_VALID)
  expected = gradient(plain, params, features, ALL_VALID)
  assert_within((value, tree.unstack_layers(grads)), expected, bound)
  with exceeds_the_bound():
    longer = gradient(plain, params, np.roll(features, 1, axis=1), ALL_VALID)
    assert_within(longer, expected, bound)


def test_dropout_acts_with_a_key_only(scale):
  encoder, params, features = make(dataclasses.replace(SMALL, dropout=0.2))
  expected = run(make()[0], params, features, FRAMES_B)
  np.testing.assert_array_equal(run(encoder, params, features, FRAMES_B), expected)
  one, again, two = (
    run(encoder, params, features, FRAMES_B, rngs={"dropout": jax.random.key(n)}) for n in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  for other in (expected, two):
    with exceeds_the_bound():
      assert_within(one[:2], other[:2], rounding(LONGEST, scale[:2]))


def test_bfloat16_is_close_and_takes_bfloat16_params(scale):
  encoder, params, features = make()
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  out = run(BEATsEncoder(SMALL, ExecutionConfig(dtype="bfloat16")), rounded, features, FRAMES_B)
  assert out.dtype == jnp.bfloat16
  # Products of bfloat16 are summed in float32, so one rounding of each input is all.
  bound = rounding(1, scale, jnp.bfloat16)
  expected = run(encoder, params, features, FRAMES_B)
  assert_within(out[0], expected[0], bound[0])
  with exceeds_the_bound():
    assert_within(out[0, :-1], expected[0, 1:], bound[0, 1:])


def test_near_distances_have_a_bucket_each_and_directions_never_share_one():
  rows = distance_buckets(2000, buckets=320, max_distance=800)
  before, behind = rows[:1999][::-1], rows[2000:]
  np.testing.assert_array_equal(before[:79], np.arange(1, 80))
  np.testing.assert_array_equal(behind, before + 160)
  assert (np.diff(before) >= 0).all() and rows[1999] == 0
  assert (
    (before[799:] == 159).all() and (before[776], before[777]) == (158, 159) and behind.max() == 319
  )


@pytest.mark.parametrize(
  "shape, message", [((1, 16, 31), "width 32, got 31"), ((2, 7, 32), "at least 8 frames, got T=7")]
)
def test_features_that_do_not_fit_are_refused(shape, message):
  encoder, params, _ = make()
  with pytest.raises(ValueError, match=message):
    apply(encoder, params, np.zeros(shape, np.float32), np.ones(shape[:2], bool))


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


def test_the_config_goes_through_json():
  assert part_from_json(part_to_json(SMALL), "encoders[0]") == SMALL
