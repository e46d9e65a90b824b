"""The speaker encoder and its features against the published structure in PyTorch."""

import jax
import numpy as np
import pytest
import torch

from convert.parts.vocoder import SPEAKER
from convert.verify.reference import vocoder as reference
from mooer_jax import tree
from mooer_jax.audio.decode import AudioError
from mooer_jax.audio.speaker_mel import speaker_mel
from mooer_jax.vocoders.speaker import SpeakerConfig
from tests.numerics import assert_as_accurate, assert_within, exceeds_the_bound, rounding
from tests.vocoders import torch_vocoder

SMALL = SpeakerConfig(bins=16, blocks=(1, 2, 1), channels=(8, 16, 24), output_width=32)


def params_of(state):
  leaves = {}
  for name, tensor in state.items():
    if not name.endswith("num_batches_tracked"):
      path, layout = SPEAKER.to_jax(name)
      leaves[path.removeprefix("speaker/")] = np.ascontiguousarray(layout.to_jax(tensor.numpy()))
  return tree.unflatten(leaves)


@pytest.mark.parametrize(
  "config", [SMALL, pytest.param(SpeakerConfig(), marks=pytest.mark.nightly)], ids=["small", "full"]
)
@pytest.mark.parametrize("frames", [40, 67])
def test_the_vector_is_that_of_pytorch(config, frames):
  state = torch_vocoder.speaker_state(config)
  rng = np.random.default_rng(0)
  mel_BTF = rng.normal(size=(2, frames, config.bins)).astype(np.float32) - 5
  params, encoder = params_of(state), config.module()
  run = jax.jit(lambda params: encoder.apply({"params": params}, mel_BTF))

  def theirs(dtype):
    weights = {name: tensor.to(dtype) for name, tensor in state.items()}
    features = torch.tensor(mel_BTF.swapaxes(1, 2), dtype=dtype)
    return reference.speaker_vector(weights, features).numpy()

  expected_BE, truth_BE = theirs(torch.float32), theirs(torch.float64)
  floor = rounding(sum(config.blocks) * 2 * 9 * max(config.channels))
  ours_BE = run(params)
  assert_as_accurate(ours_BE, expected_BE, truth_BE, floor=floor)
  assert (ours_BE * expected_BE).sum(1).min() >= 0.99999
  params["block_1_0"]["norm1"]["mean"] += 0.01
  with exceeds_the_bound():
    assert_as_accurate(run(params), expected_BE, truth_BE, floor=floor)


def test_fresh_params_have_the_structure_of_the_release():
  mel_BTF = np.zeros((1, 40, SMALL.bins), np.float32)
  shapes = jax.eval_shape(lambda: SMALL.module().init(jax.random.key(0), mel_BTF)["params"])
  released = params_of(torch_vocoder.speaker_state(SMALL))
  assert jax.tree.map(np.shape, tree.flatten(shapes)) == jax.tree.map(
    np.shape, tree.flatten(released)
  )


@pytest.mark.parametrize("samples", [512, 5000, 16000])
def test_the_features_are_those_of_the_definition(samples):
  waveform_N = np.random.default_rng(0).normal(size=samples).astype(np.float32) / 10
  expected_TF = reference.speaker_mel(torch.tensor(waveform_N, dtype=torch.float64)).numpy().T
  mel_TF = speaker_mel(waveform_N)
  assert mel_TF.dtype == np.float32 and mel_TF.shape == (1 + samples // 160, 64)
  bound = rounding(1, np.abs(expected_TF))  # ours is computed in float64 and rounded once
  assert_within(mel_TF, expected_TF, bound)
  with exceeds_the_bound():
    assert_within(speaker_mel(waveform_N * np.float32(1.001)), expected_TF, bound)


def test_a_prompt_that_is_too_short_is_an_error():
  with pytest.raises(AudioError, match="voice.wav: 511 samples at 16 kHz are too short"):
    speaker_mel(np.zeros(511, np.float32), name="voice.wav")


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"blocks": (3, 4)}, "a positive number for each"),
    ({"channels": (32, 60, 128, 256)}, "60 must be divisible by reduction=8"),
    ({"bins": 20}, "bins=20 must be divisible"),
  ],
)
def test_sizes_that_do_not_fit_are_errors(changes, said):
  with pytest.raises(ValueError, match=said):
    SpeakerConfig(**changes)
