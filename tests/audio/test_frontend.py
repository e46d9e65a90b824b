"""Waveform to 560 values a step: NumPy equals JAX row by row, lengths are known before the work.

Low frame rate equals funasr's to the last bit; rows of a padded batch equal the row alone.
"""

import functools

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mooer_jax.audio.decode import AudioError, load_audio
from mooer_jax.audio.fbank import FbankConfig
from mooer_jax.audio.frontend import (
  FrontendConfig,
  num_stacks,
  stack_frames,
  stack_frames_jax,
)
from tests.numerics import assert_within, exceeds_the_bound, log_energy_rounding

# Of all samples up to 0.5 s; the batch below is compiled once for this.
LONGEST = 8000
DEFAULT = FrontendConfig()


@functools.partial(jax.jit, static_argnames="config")
def batch_features(waveform_BN, samples_B, config=FrontendConfig()):
  return config.features_jax(waveform_BN, samples_B)


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
  assert features_BTF.shape == (4, DEFAULT.num_frames(LONGEST), 560)
  for row, steps, waveform_N, count in zip(features_BTF, steps_B, waveform_BN, counts):
    assert steps == DEFAULT.num_frames(count)
    if steps:
      ours = DEFAULT.features(waveform_N[:count])
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
      assert config.num_frames(samples) == 0
      with pytest.raises(AudioError):
        config.features(np.zeros(samples, np.float32))
    else:
      steps = config.features(np.zeros(samples, np.float32))
      assert steps.shape == (config.num_frames(samples), config.width)
      assert steps.dtype == np.float32


def test_mooer_sizes():
  assert DEFAULT.width == 560
  # 1 s: 98 frames, 17 steps. The card's longest clip of 20 s: 1998 frames.
  assert DEFAULT.num_frames(16000) == 17
  assert DEFAULT.num_frames(320000) == 333


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_a_clip_shorter_than_a_frame_is_refused_by_name(samples):
  with pytest.raises(AudioError, match=f"utterance-7: {samples} samples.*400") as caught:
    DEFAULT.features(np.zeros(samples, np.float32), name="utterance-7")
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
    steps = DEFAULT.features(waveform_N)
    assert len(steps) == DEFAULT.num_frames(len(waveform_N)) > 2
    # Speech is loud and soft: the mean log energy of steps spans more than a factor e^2.
    assert np.ptp(steps.mean(axis=1)) > 2


stack = jax.jit(stack_frames_jax, static_argnames=("window", "stride"))


def frames(count, bins=3):
  return np.random.default_rng(count).normal(size=(count, bins)).astype(np.float32)


@pytest.mark.parametrize(("window", "stride"), [(7, 6), (1, 1), (5, 3), (4, 4)])
def test_equals_funasr(window, stride):
  from funasr.frontends import wav_frontend

  for count in range(1, 40):
    theirs = wav_frontend.apply_lfr(torch.from_numpy(frames(count)), window, stride).numpy()
    np.testing.assert_array_equal(stack_frames(frames(count), window=window, stride=stride), theirs)


def test_by_hand():
  counted = np.arange(8, dtype=np.float32)[:, None]
  np.testing.assert_array_equal(
    stack_frames(counted), [[0, 0, 0, 0, 1, 2, 3], [3, 4, 5, 6, 7, 7, 7]]
  )


# One shape, so that JAX compiles once for each setting.
@given(
  st.lists(st.integers(0, 31), min_size=6, max_size=6), st.sampled_from([(7, 6), (1, 1), (4, 2)])
)
def test_rows_of_a_batch_equal_the_row_alone(counts, window_and_stride):
  window, stride = window_and_stride
  fbank_BTF = np.full((6, 31, 3), np.nan, np.float32)
  for row, count in zip(fbank_BTF, counts):
    row[:count] = frames(count)
  stacked_BTF, steps_B = stack(fbank_BTF, np.array(counts), window=window, stride=stride)
  assert stacked_BTF.shape == (6, num_stacks(31, stride), 3 * window)
  for row, steps, count in zip(np.asarray(stacked_BTF), np.asarray(steps_B), counts):
    assert steps == num_stacks(count, stride)
    if count:
      alone = stack_frames(frames(count), window=window, stride=stride)
      np.testing.assert_array_equal(row[:steps], alone)
    assert not row[steps:].any()


@pytest.mark.parametrize("count", [0, 1, 3, 6, 7])
def test_the_padded_length_may_be_anything(count):
  fbank_BTF = np.full((2, count, 2), 5.0, np.float32)
  stacked_BTF, steps_B = stack(fbank_BTF, np.array([count, min(count, 1)]))
  assert stacked_BTF.shape == (2, num_stacks(count, 6), 14)
  np.testing.assert_array_equal(steps_B, [num_stacks(count, 6), min(count, 1)])
  valid_BT = np.arange(num_stacks(count, 6)) < np.asarray(steps_B)[:, None]
  np.testing.assert_array_equal(stacked_BTF, 5.0 * valid_BT[..., None] * np.ones(14))


def test_no_frames_are_refused():
  with pytest.raises(ValueError, match="0 frames"):
    stack_frames(np.zeros((0, 80), np.float32))


@pytest.mark.parametrize(("window", "stride"), [(3, 4), (7, 0)])
def test_stacking_that_would_lose_frames_is_refused(window, stride):
  with pytest.raises(ValueError, match=f"lfr_window={window}, lfr_stride={stride}"):
    stack_frames(frames(10), window=window, stride=stride)
  with pytest.raises(ValueError, match=f"lfr_window={window}, lfr_stride={stride}"):
    stack_frames_jax(frames(10)[None], np.array([10]), window=window, stride=stride)
