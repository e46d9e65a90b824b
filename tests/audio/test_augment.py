"""Speed, rooms, noise, volume and masks: measured on the signals that come out."""

import numpy as np
import pytest

from mooer_jax.audio.augment import (
  NO_MASKS,
  Masks,
  add_noise,
  change_speed,
  change_volume,
  mask_spectrogram,
  num_samples_at,
  reverberate,
)
from mooer_jax.audio.fbank import FbankConfig
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.audio.logmel import LogMelConfig

RATE_HZ = 16000


def _noise(samples, seed=0):
  return np.random.default_rng(seed).uniform(-0.3, 0.3, samples).astype(np.float32)


def _db(x_N, y_N):
  return 10 * np.log10(np.mean(np.square(x_N, dtype=float)) / np.mean(np.square(y_N, dtype=float)))


@pytest.mark.parametrize("speed", [0.5, 0.9, 1.1, 2.0])
def test_speed_divides_the_length_and_multiplies_the_pitch(speed):
  tone_N = np.sin(2 * np.pi * 1000 * np.arange(RATE_HZ) / RATE_HZ).astype(np.float32)
  changed_N = change_speed(tone_N, speed)
  assert changed_N.dtype == np.float32
  assert abs(len(changed_N) - RATE_HZ / speed) <= 0.5
  peak = np.abs(np.fft.rfft(changed_N * np.hanning(len(changed_N)))).argmax()
  # A bin of the DFT is rate / length wide.
  assert abs(peak * RATE_HZ / len(changed_N) - 1000 * speed) <= RATE_HZ / len(changed_N)


def test_every_length_is_the_announced_one():
  for samples in (*range(1, 30), 401, 999, 12345, 16001):
    for speed in (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0):
      assert len(change_speed(_noise(samples), speed)) == num_samples_at(samples, speed) >= 1


def test_a_room_keeps_length_power_and_the_time_of_the_direct_sound():
  clicks_N = np.zeros(8000, np.float32)
  clicks_N[[500, 4000]] = 0.5
  response_L = np.zeros(3000, np.float32)
  response_L[200], response_L[900], response_L[120] = -1.0, 0.4, 0.05  # direct sound at 200
  wet_N = reverberate(clicks_N, response_L)
  assert wet_N.shape == clicks_N.shape and wet_N.dtype == np.float32
  assert sorted(np.argsort(np.abs(wet_N))[-2:]) == [500, 4000]
  np.testing.assert_allclose(wet_N[[1200, 4700]] / wet_N[[500, 4000]], -0.4, rtol=1e-3)
  assert abs(_db(wet_N, clicks_N)) < 1e-3
  assert not reverberate(np.zeros(50, np.float32), response_L).any()


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
@pytest.mark.parametrize(("length", "start"), [(40000, 0), (40000, 9000), (700, 699)])
def test_noise_has_the_ratio_that_was_asked_for(snr_db, length, start):
  clip_N, noise_M = _noise(16000), _noise(length, seed=1) * 3
  mixed_N = add_noise(clip_N, noise_M, start=start, snr_db=snr_db)
  added_N = mixed_N - clip_N
  assert abs(_db(clip_N, added_N) - snr_db) < 1e-3
  expected_N = np.resize(np.roll(noise_M, -start), 16000)
  assert np.corrcoef(added_N, expected_N)[0, 1] > 1 - 1e-6


def test_a_silent_clip_and_silent_noise_add_nothing():
  clip_N, silent_N = _noise(800), np.zeros(800, np.float32)
  np.testing.assert_array_equal(add_noise(clip_N, silent_N, start=0, snr_db=3), clip_N)
  np.testing.assert_array_equal(add_noise(silent_N, clip_N, start=0, snr_db=3), silent_N)


def test_volume_is_in_decibels():
  clip_N = _noise(800)
  assert _db(change_volume(clip_N, 6.0), clip_N) == pytest.approx(6.0, abs=1e-4)


def test_masks_hide_their_frames_and_bins_behind_the_mean():
  x_TF = np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32)
  masked_TF = mask_spectrogram(
    x_TF, Masks(times=((480, 960),), bands=((0.3, 0.5),)), hop_length=160
  )
  hidden_TF = np.zeros((20, 10), bool)
  hidden_TF[3:6], hidden_TF[:, 3:5] = True, True
  np.testing.assert_array_equal(masked_TF[~hidden_TF], x_TF[~hidden_TF])
  np.testing.assert_allclose(masked_TF[hidden_TF], x_TF.mean(), rtol=1e-5)
  assert mask_spectrogram(x_TF, NO_MASKS, hop_length=160) is x_TF


def test_front_ends_mask_the_same_time_and_share_of_the_bins():
  """Also where frames are stacked: a mask hides the same fbank frame in each of its copies."""
  waveform_N = _noise(16000)
  masks = Masks(times=((3200, 4800),), bands=((0.5, 0.75),))
  stacked = FrontendConfig()
  plain = FrontendConfig(lfr_window=1, lfr_stride=1)
  fbank_TF = plain.features(waveform_N, masks=masks)
  frame_TW = np.arange(17)[:, None] * 6 + np.arange(7) - 3
  expected_TWF = fbank_TF[np.clip(frame_TW, 0, len(fbank_TF) - 1)]
  np.testing.assert_array_equal(
    stacked.features(waveform_N, masks=masks), expected_TWF.reshape(17, -1)
  )
  finer = FrontendConfig(FbankConfig(bins=40), lfr_window=1, lfr_stride=1)
  for frontend in (plain, finer, LogMelConfig(), LogMelConfig(bins=128)):
    changed_TF = frontend.features(waveform_N) != frontend.features(waveform_N, masks=masks)
    bins = frontend.bins
    assert np.flatnonzero(changed_TF.all(1)).tolist() == list(range(20, 30))
    assert np.flatnonzero(changed_TF.all(0)).tolist() == list(range(bins // 2, bins * 3 // 4))
