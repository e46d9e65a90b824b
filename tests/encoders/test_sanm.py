import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import tree
from mooer_jax.encoders.sanm import SANMConfig, SANMEncoder
from mooer_jax.nn.compute import ExecutionConfig
from tests import tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

ALL_VALID = np.ones((3, 12), bool)
FRAMES_B = [12, 7, 1]
LONGEST = 56  # terms of the longest sum, that over a frame's features


def make(sanm=tiny.SANM, **compute):
  """An encoder, random params in its layout, features [3, 12, F]."""
  features = np.random.default_rng(0).normal(size=(3, 12, sanm.input_width)).astype(np.float32)
  shapes = jax.eval_shape(SANMEncoder(sanm).init, jax.random.key(0), features, ALL_VALID)
  params = tiny.random_params(shapes["params"])
  encoder = SANMEncoder(sanm, ExecutionConfig(**compute))
  return encoder, tree.stack_layers(params) if encoder.compute.scan else params, features


@functools.partial(jax.jit, static_argnums=0)
def apply(encoder, params, features, valid_BT, **kwargs):
  return encoder.apply({"params": params}, features, valid_BT, **kwargs)


def run(encoder, params, features, frames_B, **kwargs):
  valid_BT = np.arange(features.shape[1]) < np.asarray(frames_B)[:, None]
  out, valid = apply(encoder, params, features, valid_BT, **kwargs)
  np.testing.assert_array_equal(valid, valid_BT)
  return np.asarray(out)


def test_paraformer_large_has_157_98_million_parameters():
  config = SANMConfig()
  shapes = (jax.ShapeDtypeStruct((1, 8, 560), jnp.float32), jax.ShapeDtypeStruct((1, 8), bool))
  trees = {}
  for scan in (False, True):
    encoder = SANMEncoder(config, ExecutionConfig(scan=scan))
    trees[scan] = jax.eval_shape(encoder.init, jax.random.key(0), *shapes)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(trees[False])) == 157_975_648
  assert tree.stack_layers(trees[False]) == trees[True]
  out, _ = jax.eval_shape(SANMEncoder(config).apply, {"params": trees[False]}, *shapes)
  assert out.shape == (1, 8, 512)


@pytest.fixture(scope="module")
def scale():
  """Sensitivity of the outputs of `make` to rounding: [B, T, 1]."""
  encoder, params, features = make()
  return condition(lambda *x: run(encoder, *x, FRAMES_B), params, features, of_rows=True)


def check_rows(together, encoder, params, features, scale, *, frames_B=FRAMES_B):
  """Each row of a batch is what the encoder makes of its valid frames alone."""
  for n, frames in enumerate(FRAMES_B):
    alone = run(encoder, params, features[n : n + 1, :frames], frames_B[n : n + 1])
    assert_within(together[n, :frames], alone[0], rounding(LONGEST, scale[n, :frames]))


def test_padding_and_batch_size_change_nothing(scale):
  encoder, params, features = make()
  check_rows(run(encoder, params, features, FRAMES_B), encoder, params, features, scale)


@pytest.mark.parametrize("fault", ["gain 1.001", "one frame later", "mask", "kernel 1.001", "eps"])
def test_a_fault_exceeds_the_bound(scale, fault):
  encoder, params, features = make()
  together, frames_B = run(encoder, params, features, FRAMES_B), FRAMES_B
  if fault == "gain 1.001":
    features = features * np.float32(1.001)
  elif fault == "one frame later":
    features = np.roll(features, 1, axis=1)
  elif fault == "mask":
    frames_B = [11, 6, 1]
  elif fault == "kernel 1.001":
    params = tree.flatten(params)
    params["layers_0/attention/fsmn/kernel"] *= np.float32(1.001)
    params = tree.unflatten(params)
  else:
    encoder = SANMEncoder(dataclasses.replace(tiny.SANM, norm_eps=1e-3))
  with exceeds_the_bound():
    check_rows(together, encoder, params, features, scale, frames_B=frames_B)


def test_what_stands_in_the_padding_does_not_matter():
  encoder, params, features = make()
  before = run(encoder, params, features, FRAMES_B)
  features[1, 7:], features[2, 1:] = 1e4, -1e4
  after = run(encoder, params, features, FRAMES_B)
  for n, frames in enumerate(FRAMES_B):
    np.testing.assert_array_equal(before[n, :frames], after[n, :frames])


@functools.partial(jax.jit, static_argnums=0)
def gradient(encoder, params, features, valid_BT):
  def loss(params):
    return jnp.sin(encoder.apply({"params": params}, features, valid_BT)[0]).mean()

  return jax.value_and_grad(loss)(params)


def test_a_row_of_padding_stays_finite_also_backwards():
  valid_BT = np.array([[False] * 12, [True] * 12, [True] + [False] * 11])
  value, grads = gradient(*make(), valid_BT)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("scan, remat", [(True, "none"), (True, "dots"), (True, "full")])
def test_scan_and_remat_change_neither_output_nor_gradient(scan, remat):
  plain, params, features = make()
  bound = rounding(LONGEST, condition(lambda p: gradient(plain, p, features, ALL_VALID), params))
  value, grads = gradient(*make(scan=scan, remat=remat), ALL_VALID)
  expected = gradient(plain, params, features, ALL_VALID)
  assert_within((value, tree.unstack_layers(grads)), expected, bound)
  with exceeds_the_bound():
    louder = gradient(plain, params, features * np.float32(1.001), ALL_VALID)
    assert_within(louder, expected, bound)


def test_dropout_acts_with_a_key_only(scale):
  encoder, params, features = make(dataclasses.replace(tiny.SANM, dropout=0.2))
  plain, _, _ = make()
  frames_B = [12, 12, 12]
  expected = run(plain, params, features, frames_B)
  np.testing.assert_array_equal(run(encoder, params, features, frames_B), expected)
  one, again, two = (
    run(encoder, params, features, frames_B, rngs={"dropout": jax.random.key(n)}) for n in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  for other in (expected, two):
    with exceeds_the_bound():
      assert_within(one, other, rounding(LONGEST, scale))


def test_bfloat16_is_close_and_takes_bfloat16_params(scale):
  encoder, params, features = make()
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  out = run(SANMEncoder(tiny.SANM, ExecutionConfig(dtype="bfloat16")), rounded, features, FRAMES_B)
  assert out.dtype == jnp.bfloat16
  # Products of bfloat16 are summed in float32, so one rounding of each input is all.
  bound = rounding(1, scale, jnp.bfloat16)
  expected = run(encoder, params, features, FRAMES_B)
  assert_within(out[0], expected[0], bound[0])
  with exceeds_the_bound():
    assert_within(out[0, :-1], expected[0, 1:], bound[0, 1:])


def test_the_wrong_feature_width_is_refused():
  encoder, params, features = make()
  with pytest.raises(ValueError, match="width 56, got 55"):
    run(encoder, params, features[..., :-1], [12, 12, 12])


@pytest.mark.parametrize(
  "values, message",
  [
    ({"hidden_size": 510}, "sanm.hidden_size=510 .* sanm.heads=4"),
    ({"memory_kernel": 10}, "memory_kernel=10 must be odd"),
    ({"layers": 1}, "sanm.layers=1"),
  ],
)
def test_impossible_sizes_are_refused_by_name(values, message):
  with pytest.raises(ValueError, match=message):
    SANMConfig(**values)
