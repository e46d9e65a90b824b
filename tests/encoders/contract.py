"""Properties of every encoder; tests/encoders/test_NAME.py inherits them and adds its own tests."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import tree
from mooer_jax.config import part_from_json, part_to_json
from mooer_jax.nn.compute import ExecutionConfig
from tests import tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

# A fault takes and returns (config, params, features, valid frames of each row).
Fault = Callable[..., tuple[Any, dict, np.ndarray, tuple[int, ...]]]


def louder(config, params, features, frames_B):
  return config, params, features * np.float32(1.001), frames_B


def one_frame_later(config, params, features, frames_B):
  return config, params, np.roll(features, 1, axis=1), frames_B


def shorter_mask(config, params, features, frames_B):
  return config, params, features, tuple(max(frames - 1, 1) for frames in frames_B)


def other_eps(config, params, features, frames_B):
  return dataclasses.replace(config, norm_eps=1e-3), params, features, frames_B


@functools.partial(jax.jit, static_argnums=0)
def apply(encoder, params, features, valid_BT, **kwargs):
  return encoder.apply({"params": params}, features, valid_BT, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def gradient(encoder, params, features, valid_BT):
  def loss(params, features):
    out_BSD, valid_BS = encoder.apply({"params": params}, features, valid_BT)
    return jnp.where(valid_BS[..., None], jnp.sin(out_BSD), 0).mean()

  return jax.value_and_grad(loss, (0, 1))(params, features)


def valid_of(features, frames_B):
  return np.arange(features.shape[1]) < np.asarray(frames_B)[:, None]


class EncoderContract:
  """Tests of an encoder on a batch of random features whose rows have different lengths.

  Attributes:
    module: the encoder's class.
    config: a small config.
    frames_B: valid frames of each row; the first row fills the batch.
    empty_B: the same, with a row of padding alone.
    longest: number of terms of the longest sum.
    faults: deliberate faults that exceed the bound of the first test.
    fillers: values in the padding that must not matter.
    gradient_floor: smallest gradient that is more than rounding, relative to the largest.
  """

  module: Any
  config: Any
  frames_B: tuple[int, ...]
  empty_B: tuple[int, ...]
  longest: int
  faults: tuple[Fault, ...]
  fillers = (1e4, np.nan)
  gradient_floor = 0.0

  @staticmethod
  def tokens(frames: int) -> int:
    """Number of valid outputs of a row."""
    return frames

  @classmethod
  def make(cls, config=None, **execution):
    """An encoder, random params in its layout, features [B, T, F]."""
    config = config or cls.config
    size = (len(cls.frames_B), cls.frames_B[0], config.input_width)
    features = np.random.default_rng(0).normal(size=size).astype(np.float32)
    everything = np.ones(size[:2], bool)
    shapes = jax.eval_shape(cls.module(config).init, jax.random.key(0), features, everything)
    params = tiny.random_params(shapes["params"])
    encoder = cls.module(config, ExecutionConfig(**execution))
    return encoder, tree.stack_layers(params) if encoder.compute.scan else params, features

  @classmethod
  def run(cls, encoder, params, features, frames_B=None, **kwargs):
    """Outputs [B, S, D]; checks which of them are valid."""
    frames_B = cls.frames_B if frames_B is None else frames_B
    out_BSD, valid_BS = apply(encoder, params, features, valid_of(features, frames_B), **kwargs)
    tokens_B = np.array([cls.tokens(frames) for frames in frames_B])
    np.testing.assert_array_equal(valid_BS, np.arange(valid_BS.shape[1]) < tokens_B[:, None])
    return np.asarray(out_BSD)

  @classmethod
  @functools.cache
  def scale(cls):
    """Sensitivity of the outputs of `make` to rounding: [B, S, 1]."""
    encoder, params, features = cls.make()
    return condition(lambda *x: cls.run(encoder, *x), params, features, of_rows=True)

  def check_rows(self, together, encoder, params, features, frames_B):
    """Each row of a batch is what the encoder makes of its valid frames alone."""
    for n, frames in enumerate(self.frames_B):
      if self.tokens(frames):
        alone = self.run(encoder, params, features[n : n + 1, :frames], frames_B[n : n + 1])[0]
        rows = slice(len(alone))
        assert_within(together[n, rows], alone, rounding(self.longest, self.scale()[n, rows]))

  def test_a_row_is_the_same_alone_and_in_any_batch(self):
    encoder, params, features = self.make()
    together = self.run(encoder, params, features)
    self.check_rows(together, encoder, params, features, self.frames_B)

  def test_a_fault_exceeds_the_bound(self, fault):
    encoder, params, features = self.make()
    together = self.run(encoder, params, features)
    made = fault(self.config, params, features, self.frames_B)
    with exceeds_the_bound():
      self.check_rows(together, self.module(made[0]), *made[1:])

  def test_values_in_the_padding_do_not_matter(self, filler):
    encoder, params, features = self.make()
    before = self.run(encoder, params, features)
    for row, frames in zip(features, self.frames_B):
      row[frames:] = filler
    after = self.run(encoder, params, features)
    for n, frames in enumerate(self.frames_B):
      tokens = self.tokens(frames)
      np.testing.assert_array_equal(before[n, :tokens], after[n, :tokens])

  def test_a_row_of_padding_stays_finite_also_backwards(self):
    encoder, params, features = self.make()
    assert np.isfinite(self.run(encoder, params, features, self.empty_B)).all()
    found = gradient(encoder, params, features, valid_of(features, self.empty_B))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))

  def test_every_parameter_has_a_gradient(self):
    encoder, params, features = self.make()
    _, (grads, _) = gradient(encoder, params, features, valid_of(features, self.frames_B))
    assert [path for path, g in tree.flatten(grads).items() if not np.abs(g).max() > 0] == []

  @pytest.mark.parametrize("remat", ["none", "dots", "full"])
  def test_scan_and_remat_change_neither_output_nor_gradient(self, remat):
    plain, params, features = self.make()
    valid_BT = np.ones(features.shape[:2], bool)
    scale = condition(lambda *x: gradient(plain, *x, valid_BT), params, features)
    floor = self.gradient_floor * max(map(np.max, jax.tree.leaves(scale[1][0])))
    bound = rounding(self.longest, jax.tree.map(lambda x: np.maximum(x, floor), scale))
    value, (grads, of_features) = gradient(*self.make(scan=True, remat=remat), valid_BT)
    expected = gradient(plain, params, features, valid_BT)
    assert_within((value, (tree.unstack_layers(grads), of_features)), expected, bound)
    with exceeds_the_bound():
      later = gradient(plain, params, np.roll(features, 1, axis=1), valid_BT)
      assert_within(later[1][0], expected[1][0], bound[1][0])

  def test_dropout_acts_with_a_key_only(self):
    encoder, params, features = self.make(dataclasses.replace(self.config, dropout=0.2))
    expected = self.run(self.make()[0], params, features)
    np.testing.assert_array_equal(self.run(encoder, params, features), expected)
    one, again, two = (
      self.run(encoder, params, features, rngs={"dropout": jax.random.key(n)}) for n in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    for other in (expected, two):
      with exceeds_the_bound():
        assert_within(one[0], other[0], rounding(self.longest, self.scale()[0]))

  def test_bfloat16_is_close_and_takes_bfloat16_params(self):
    encoder, params, features = self.make()
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    out = self.run(self.make(dtype="bfloat16")[0], rounded, features)
    assert out.dtype == jnp.bfloat16
    # Products of bfloat16 are summed in float32, so one rounding of each input is all.
    bound = rounding(1, self.scale(), jnp.bfloat16)[0]
    expected = self.run(encoder, params, features)
    assert_within(out[0], expected[0], bound)
    with exceeds_the_bound():
      assert_within(out[0, :-1], expected[0, 1:], bound[1:])

  def test_features_of_another_width_are_refused(self):
    encoder, params, features = self.make()
    width = self.config.input_width
    with pytest.raises(ValueError, match=f"width {width}, got {width - 1}"):
      self.run(encoder, params, features[..., :-1])

  def test_the_config_goes_through_json(self):
    assert part_from_json(part_to_json(self.config), "encoders[0]") == self.config
