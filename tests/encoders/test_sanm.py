import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import tree
from mooer_jax.encoders.sanm import SANMConfig, SANMEncoder
from mooer_jax.nn.compute import Compute
from tests import tiny

ALL_VALID = np.ones((3, 12), bool)


def make(sanm=tiny.SANM, **compute):
  """An encoder, random params in its layout, features [3, 12, F]."""
  features = np.random.default_rng(0).normal(size=(3, 12, sanm.input_width)).astype(np.float32)
  shapes = jax.eval_shape(SANMEncoder(sanm).init, jax.random.key(0), features, ALL_VALID)
  params = tiny.random_params(shapes["params"])
  encoder = SANMEncoder(sanm, Compute(**compute))
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
    encoder = SANMEncoder(config, Compute(scan=scan))
    trees[scan] = jax.eval_shape(encoder.init, jax.random.key(0), *shapes)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(trees[False])) == 157_975_648
  assert tree.stack_layers(trees[False]) == trees[True]
  out, _ = jax.eval_shape(SANMEncoder(config).apply, {"params": trees[False]}, *shapes)
  assert out.shape == (1, 8, 512)


def test_padding_and_batch_size_change_nothing():
  encoder, params, features = make()
  frames_B = [12, 7, 1]
  together = run(encoder, params, features, frames_B)
  for n, frames in enumerate(frames_B):
    alone = run(encoder, params, features[n : n + 1, :frames], [frames])
    # Sums of up to 48 terms run in another order when shapes change.
    np.testing.assert_allclose(together[n, :frames], alone[0], atol=2e-5)


def test_what_stands_in_the_padding_does_not_matter():
  encoder, params, features = make()
  before = run(encoder, params, features, [12, 7, 1])
  features[1, 7:], features[2, 1:] = 1e4, -1e4
  after = run(encoder, params, features, [12, 7, 1])
  for n, frames in enumerate([12, 7, 1]):
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
  value, grads = gradient(*make(scan=scan, remat=remat), ALL_VALID)
  grads = tree.unstack_layers(grads) if scan else grads
  expected_value, expected = gradient(*make(), ALL_VALID)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  # Fusions differ, so float32 rounding does, relative to the largest term of a sum.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max())),
    grads,
    expected,
  )


def test_dropout_acts_with_a_key_only():
  encoder, params, features = make(dataclasses.replace(tiny.SANM, dropout=0.2))
  plain, _, _ = make()
  frames_B = [12, 12, 12]
  expected = run(plain, params, features, frames_B)
  np.testing.assert_array_equal(run(encoder, params, features, frames_B), expected)
  one, again, two = (
    run(encoder, params, features, frames_B, rngs={"dropout": jax.random.key(n)}) for n in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  assert not np.allclose(one, expected) and not np.allclose(one, two)


def test_bfloat16_is_close_and_takes_bfloat16_params():
  encoder, params, features = make()
  expected = run(encoder, params, features, [12, 7, 1])
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  out = run(SANMEncoder(tiny.SANM, Compute(dtype="bfloat16")), rounded, features, [12, 7, 1])
  assert out.dtype == jnp.bfloat16
  error = np.abs(out[0].astype(np.float32) - expected[0])
  # 8 bits of mantissa through 3 layers; outputs are of size 1.
  assert error.mean() < 0.05 and error.max() < 0.3


def test_the_wrong_feature_width_is_refused():
  encoder, params, features = make()
  with pytest.raises(ValueError, match="width 56, got 55"):
    run(encoder, params, features[..., :-1], [12, 12, 12])


@pytest.mark.parametrize(
  "values, message",
  [
    ({"width": 510}, "sanm.width=510 .* sanm.heads=4"),
    ({"memory_kernel": 10}, "memory_kernel=10 must be odd"),
    ({"layers": 1}, "sanm.layers=1"),
  ],
)
def test_impossible_sizes_are_refused_by_name(values, message):
  with pytest.raises(ValueError, match=message):
    SANMConfig(**values)
