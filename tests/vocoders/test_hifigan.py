"""HiFi-GAN against the published structure in PyTorch; padding, context, folded weights."""

import functools

import jax
import numpy as np
import pytest
import torch

from convert.parts.vocoder import GENERATOR
from convert.verify.reference import vocoder as reference
from mooer_jax import tree
from mooer_jax.vocoders.hifigan import HiFiGANConfig, fold
from tests.numerics import (
  assert_as_accurate,
  assert_within,
  exceeds_the_bound,
  rounded_to,
  rounding,
)
from tests.vocoders import torch_vocoder

SMALL = HiFiGANConfig(
  input_width=24,
  speaker_width=16,
  hidden_size=32,
  stretch=4,
  rates=(8, 2),
  taps=(16, 4),
  block_taps=(3, 7),
  dilations=(1, 3),
)
FRAMES = 12


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, states_BTD, frames_B, speaker_BE):
  return config.module().apply({"params": params}, states_BTD, frames_B, speaker_BE)


def inputs(config, rows=2, frames=FRAMES):
  """(states [rows, frames, D], the number of all frames, unit speaker vectors)."""
  rng = np.random.default_rng(0)
  states_BTD = rng.normal(size=(rows, frames, config.input_width)).astype(np.float32)
  speaker_BE = rng.normal(size=(rows, config.speaker_width)).astype(np.float32)
  speaker_BE /= np.linalg.norm(speaker_BE, axis=1, keepdims=True)
  return states_BTD, np.full(rows, frames), speaker_BE


def params_of(state):
  leaves = {}
  for name, tensor in state.items():
    path, layout = GENERATOR.to_jax(name)
    leaves[path.removeprefix("vocoder/")] = np.ascontiguousarray(layout.to_jax(tensor.numpy()))
  return tree.unflatten(leaves)


def layers(config):
  """Sums on the way to a sample, and the terms of the longest."""
  depth = 3 + len(config.rates) * (1 + 2 * len(config.dilations))
  return depth * config.input_width * 7


@pytest.mark.parametrize(
  "config", [SMALL, pytest.param(HiFiGANConfig(), marks=pytest.mark.nightly)], ids=["small", "full"]
)
def test_the_waveform_is_that_of_pytorch(config):
  state = torch_vocoder.generator_state(config)
  states_BTD, frames_B, speaker_BE = inputs(config)

  def theirs(dtype):
    weights = {name: tensor.to(dtype) for name, tensor in state.items()}
    tensors = (torch.tensor(x, dtype=dtype) for x in (states_BTD, speaker_BE))
    return reference.generate(weights, *tensors, stretch=config.stretch).numpy()

  params, floor = params_of(state), rounding(layers(config))
  expected_BN, truth_BN = theirs(torch.float32), theirs(torch.float64)
  assert 0.05 < np.abs(truth_BN).mean() < 0.8  # neither silent nor saturated
  for weights in (params, jax.jit(fold)(params)):
    ours_BN = run(config, weights, states_BTD, frames_B, speaker_BE)
    assert_as_accurate(ours_BN, expected_BN, truth_BN, floor=floor)
    assert np.abs(ours_BN - expected_BN).max() <= 1e-4
  with exceeds_the_bound():
    faulty = rounded_to(jax.numpy.bfloat16, params)
    ours_BN = run(config, faulty, states_BTD, frames_B, speaker_BE)
    assert_as_accurate(ours_BN, expected_BN, truth_BN, floor=floor)


@pytest.fixture(scope="module")
def params():
  return fold(params_of(torch_vocoder.generator_state(SMALL)))


def test_fresh_params_have_the_structure_of_the_release():
  shapes = jax.eval_shape(lambda: SMALL.module().init(jax.random.key(0), *inputs(SMALL))["params"])
  released = params_of(torch_vocoder.generator_state(SMALL))
  assert jax.tree.map(np.shape, tree.flatten(shapes)) == jax.tree.map(
    np.shape, tree.flatten(released)
  )


def test_a_row_does_not_depend_on_its_padding(params):
  states_BTD, _, speaker_BE = inputs(SMALL)
  short = 7
  padded_BTD = states_BTD.copy()
  padded_BTD[1, short:] = np.nan
  samples = short * SMALL.samples_per_frame
  batch_BN = run(SMALL, params, padded_BTD, np.array([FRAMES, short]), speaker_BE)
  whole_BN = run(SMALL, params, states_BTD[:1], np.array([FRAMES]), speaker_BE[:1])
  alone_BN = run(SMALL, params, states_BTD[1:, :short], np.array([short]), speaker_BE[1:])
  bound = rounding(layers(SMALL))
  assert_within(batch_BN[:1], whole_BN, bound)
  assert_within(batch_BN[1:, :samples], alone_BN, bound)
  assert not batch_BN[1, samples:].any()


def test_a_sample_depends_on_the_context_only(params):
  states_BTD, frames_B, speaker_BE = inputs(SMALL, rows=1, frames=2 * SMALL.context + 8)
  middle = states_BTD.shape[1] // 2
  changed_BTD = states_BTD.copy()
  changed_BTD[:, middle] += 1
  first, second = (
    np.asarray(run(SMALL, params, x, frames_B, speaker_BE)) for x in (states_BTD, changed_BTD)
  )
  frames = np.flatnonzero((first != second)[0]) // SMALL.samples_per_frame
  reach = max(middle - frames.min(), frames.max() - middle)
  assert SMALL.context - 1 <= reach <= SMALL.context


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"taps": (16,)}, "as many numbers"),
    ({"taps": (12, 4)}, "12 must be a multiple of its rate 8"),
    ({"block_taps": (3, 4)}, "4 must be odd"),
    ({"hidden_size": 30}, "divisible by 4"),
    ({"rates": ()}, "rates"),
    ({"stretch": 0}, "hifigan.stretch=0 must be positive"),
  ],
)
def test_sizes_that_do_not_fit_are_errors(changes, said):
  with pytest.raises(ValueError, match=said):
    HiFiGANConfig(**{"rates": (8, 2), "taps": (16, 4), **changes})


def test_states_of_another_width_are_an_error(params):
  states_BTD, frames_B, speaker_BE = inputs(SMALL)
  with pytest.raises(ValueError, match="states of width 24 and speaker vectors of 16, got 23"):
    run(SMALL, params, states_BTD[..., 1:], frames_B, speaker_BE)
