"""HiFi-GAN's discriminators against their published structure in PyTorch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mooer_jax import tree
from mooer_jax.vocoders.discriminators import DiscriminatorConfig
from tests.numerics import assert_as_accurate, exceeds_the_bound, rounded_to, rounding
from tests.vocoders.torch_discriminators import discriminate, discriminator_state

NARROW = DiscriminatorConfig(width=2, periods=(2, 3), scales=2)
SAMPLES = 200  # 3 does not divide it
# Layers in a row, and the terms of the longest sum: taps of the 32-fold width.
ROUNDINGS = 8 * 5 * 32 * NARROW.width


def params_of(state, config) -> dict:
  """Our params with the weights of a state dict of PyTorch."""
  names = {f"mpd.{i}": f"period_{p}" for i, p in enumerate(config.periods)}
  names |= {f"msd.{i}": f"scale_{i}" for i in range(config.scales)}
  flat = {}
  for key, value in state.items():
    kind, number, *layer, leaf = key.split(".")
    layer = "last" if layer == ["conv_post"] else f"conv_{layer[1]}"
    value = value.numpy()
    value = {
      "weight_v": lambda v: v.reshape(v.shape[:3]).T,
      "weight_g": np.ravel,
      "bias": lambda v: v,
    }[leaf](value)
    ours = {"weight_v": "v", "weight_g": "g", "bias": "bias"}[leaf]
    flat[f"{names[f'{kind}.{number}']}/{layer}/{ours}"] = value
  return tree.unflatten(flat)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, waveform_BN):
  return config.module().apply({"params": params}, waveform_BN)


def waveforms():
  return np.random.default_rng(0).uniform(-1, 1, (2, SAMPLES)).astype(np.float32)


def test_all_activations_are_those_of_pytorch():
  state, waveform_BN = discriminator_state(NARROW), waveforms()

  def theirs(dtype):
    weights = {name: tensor.to(dtype) for name, tensor in state.items()}
    found = discriminate(weights, NARROW, torch.tensor(waveform_BN, dtype=dtype))
    return [[np.moveaxis(x.numpy(), 1, -1) for x in of] for of in found]

  params = params_of(state, NARROW)
  ours, expected, truth = (
    run(NARROW, params, waveform_BN),
    theirs(torch.float32),
    theirs(torch.float64),
  )
  assert [len(of) for of in ours] == [6, 6, 8, 8]

  def check(ours):
    for of_ours, of_theirs, of_truth in zip(ours, expected, truth, strict=True):
      for one, other, exact in zip(of_ours, of_theirs, of_truth, strict=True):
        assert one.shape == other.shape
        floor = rounding(ROUNDINGS, np.abs(exact).max())
        assert_as_accurate(one, other, exact, floor=floor)

  check(ours)
  with exceeds_the_bound():
    check(run(NARROW, rounded_to(jnp.bfloat16, params), waveform_BN))


def test_fresh_params_have_the_published_structure():
  def shapes(config):
    waveform_BN = jnp.zeros((1, max(config.periods)))
    made = jax.eval_shape(lambda: config.module().init(jax.random.key(0), waveform_BN))
    return {path: leaf.shape for path, leaf in tree.flatten(made["params"]).items()}

  released = tree.flatten(params_of(discriminator_state(NARROW), NARROW))
  assert shapes(NARROW) == {path: leaf.shape for path, leaf in released.items()}
  assert round(sum(map(math.prod, shapes(DiscriminatorConfig()).values())) / 1e6, 1) == 70.7


def test_a_row_does_not_depend_on_others():
  params, waveform_BN = params_of(discriminator_state(NARROW), NARROW), waveforms()
  together, alone = (run(NARROW, params, x_BN) for x_BN in (waveform_BN, waveform_BN[1:]))
  for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
    bound = rounding(ROUNDINGS, np.abs(other).max())
    np.testing.assert_allclose(one[1:], other, rtol=0, atol=bound)


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"width": 0}, "discriminators.width=0 must be positive"),
    ({"periods": (0,)}, "periods=.0,. must be at least 1"),
    ({"periods": (), "scales": 0}, "name at least one of them"),
  ],
)
def test_sizes_that_make_no_sense_are_errors(changes, said):
  with pytest.raises(ValueError, match=said):
    DiscriminatorConfig(**changes)
