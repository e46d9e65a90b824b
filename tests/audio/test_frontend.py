"""Waveform to 560 values a step: NumPy equals JAX row by row, lengths are known before the work."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooer_jax.audio.decode import AudioError, load_audio
from mooer_jax.audio.fbank import FbankConfig
from mooer_jax.audio.frontend import (
  FrontendConfig,
  features,
  features_jax,
  num_frames,
  width,
)
from tests.numerics import assert_within, exceeds_the_bound, log_energy_rounding

# Of all samples up to 0.5 s; the batch below is compiled once for this.
LONGEST = 8000


@functools.partial(jax.jit, static_argnames="config")
def batch_features(waveform_BN, samples_B, config=FrontendConfig()):
  return features_jax(waveform_BN, samples_B, config)


def noise(samples, seed=0):
  return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


# Beside random lengths, those around the edges of a frame (400 + 160 k) and of a step (960 k).
lengths = st.one_of(
  st.integers(0, LONGEST),
  st.builds(lambda k, d: 400 + 160 * k + d, st.integers(0, 46), st.sampled_from([-1, 0, 1])),
)


@settings(max_examples=25)
@given(st.lists(lengths, min_size=4, max_size=4), st.integers(0, 1000))
def test_numpy_equals_jax_row_by_row(counts, seed):
  waveform_BN = np.full((4, LONGEST), 9.0, np.float32)
  for number, (row, count) in enumerate(zip(waveform_BN, counts)):
    row[:count] = noise(count, seed + number)
  features_BTF, steps_B = map(np.asarray, batch_features(waveform_BN, np.array(counts)))
  assert features_BTF.shape == (4, num_frames(LONGEST), 560)
  for row, steps, waveform_N, count in zip(features_BTF, steps_B, waveform_BN, counts):
    assert steps == num_frames(count)
    if steps:
      ours = features(waveform_N[:count])
      # JAX's rounded products are 2^8 times smaller than a frame's peak.
      bound = log_energy_rounding(ours, terms=512, share=2.0**-8)
      assert_within(row[:steps], ours, bound)
      if steps > 1:
        with exceeds_the_bound():
          assert_within(row[1:steps], ours[:-1], bound[:-1])
    assert not row[steps:].any()


@pytest.mark.parametrize(
  "config",
  [FrontendConfig(), FrontendConfig(FbankConfig(bins=4, hop_ms=5), lfr_window=3, lfr_stride=2)],
  ids=["mooer", "other"],
)
def test_num_frames_is_the_real_length(config):
  for samples in [*range(395, 405), *range(405, 9000, 97), *range(1350, 1370)]:
    if samples < 400:
      assert num_frames(samples, config) == 0
      with pytest.raises(AudioError):
        features(np.zeros(samples, np.float32), config)
    else:
      steps = features(np.zeros(samples, np.float32), config)
      assert steps.shape == (num_frames(samples, config), width(config))
      assert steps.dtype == np.float32


def test_mooer_sizes():
  assert width() == 560
  # 1 s: 98 frames, 17 steps. The card's longest clip of 20 s: 1998 frames.
  assert num_frames(16000) == 17
  assert num_frames(320000) == 333


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_a_clip_shorter_than_a_frame_is_refused_by_name(samples):
  with pytest.raises(AudioError, match=f"utterance-7: {samples} samples.*400") as caught:
    features(np.zeros(samples, np.float32), name="utterance-7")
  assert caught.value.cause == "too short"


@pytest.mark.parametrize(("window", "stride"), [(6, 7), (7, 0)])
def test_settings_that_would_lose_frames_are_refused(window, stride):
  with pytest.raises(ValueError, match=f"lfr_window={window}, lfr_stride={stride}"):
    FrontendConfig(lfr_window=window, lfr_stride=stride)


def test_an_empty_batch_has_no_steps():
  features_BTF, steps_B = batch_features(np.zeros((2, 399), np.float32), np.array([0, 399]))
  assert features_BTF.shape == (2, 0, 560)
  np.testing.assert_array_equal(steps_B, [0, 0])


def test_committed_clips_are_heard(clips):
  for clip in clips:
    waveform_N = load_audio(clip.path)
    steps = features(waveform_N)
    assert len(steps) == num_frames(len(waveform_N)) > 2
    # Speech is loud and soft: the mean log energy of steps spans more than a factor e^2.
    assert np.ptp(steps.mean(axis=1)) > 2
