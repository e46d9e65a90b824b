"""Augmentation of waveforms and spectrograms, with parameters that the caller has drawn."""

from typing import NamedTuple

import numpy as np


def num_samples_at(samples: int, speed: float) -> int:
  """Number of samples that `change_speed` returns for a clip of `samples`."""
  return max(1, int(samples / speed + 0.5))


def change_speed(waveform_N: np.ndarray, speed: float) -> np.ndarray:
  """Resamples a clip so that it plays `speed` times as fast; tempo and pitch change.

  Returns:
    float32 [num_samples_at(N, speed)].

  Source: Ko et al., "Audio Augmentation for Speech Recognition" (2015).
  """
  if speed == 1:
    return waveform_N
  import soxr

  changed_N = soxr.resample(waveform_N, speed, 1.0, quality="HQ")
  missing = num_samples_at(len(waveform_N), speed) - len(changed_N)  # rounding: at most one
  return np.pad(changed_N, (0, missing)) if missing > 0 else changed_N[: len(changed_N) + missing]


def reverberate(waveform_N: np.ndarray, response_L: np.ndarray) -> np.ndarray:
  """Convolves a clip with the impulse response of a room; length and power stay the same.

  The largest peak of the response, the direct sound, is at time 0, so the speech does not move. The
  reverberation after the end of the clip is cut off.

  Source: Ko et al., "A Study on Data Augmentation of Reverberant Speech" (2017).
  """
  import scipy.signal

  peak = int(np.abs(response_L).argmax())
  wet_N = scipy.signal.fftconvolve(waveform_N, response_L)[peak : peak + len(waveform_N)]
  return _with_power(wet_N, _power(waveform_N))


def add_noise(
  waveform_N: np.ndarray, noise_M: np.ndarray, *, start: int, snr_db: float
) -> np.ndarray:
  """Adds a segment of a recording at a signal-to-noise ratio, measured over the whole clip.

  The segment begins at sample `start`; a recording that ends before the clip is repeated. A silent
  segment, or a silent clip, adds nothing.
  """
  segment_N = np.take(noise_M, np.arange(start, start + len(waveform_N)), mode="wrap")
  return waveform_N + _with_power(segment_N, _power(waveform_N) / 10 ** (snr_db / 10))


def change_volume(waveform_N: np.ndarray, gain_db: float) -> np.ndarray:
  """Scales a clip; samples beyond full scale are not clipped."""
  return waveform_N * np.float32(10 ** (gain_db / 20))


def _power(x_N: np.ndarray) -> float:
  return float(np.mean(np.square(x_N, dtype=np.float64)))


def _with_power(x_N: np.ndarray, power: float) -> np.ndarray:
  """Scales a signal to a mean square; a silent one stays silent."""
  have = _power(x_N)
  return x_N * np.float32((power / have) ** 0.5 if have else 0)


class Masks(NamedTuple):
  """Parts of a spectrogram that are hidden, in units that all front ends share.

  Attributes:
    times: first sample, and sample behind the last.
    bands: lower and upper edge, as shares of the mel bins, between 0 and 1.
  """

  times: tuple[tuple[int, int], ...] = ()
  bands: tuple[tuple[float, float], ...] = ()


NO_MASKS = Masks()


def mask_spectrogram(x_TF: np.ndarray, masks: Masks, *, hop_length: int) -> np.ndarray:
  """Replaces masked frames and mel bins by the mean of the spectrogram.

  Args:
    x_TF: float32 [T, F], log-mel energies, before frames are stacked.
    masks: the parts to replace.
    hop_length: samples from one frame to the next.

  Source: Park et al., "SpecAugment" (2019), whose zeros are the mean of normalised features.
  """
  if masks == NO_MASKS:
    return x_TF
  frames, bins = x_TF.shape
  sample_T1 = np.arange(frames)[:, None] * hop_length
  share_F = np.arange(bins) / bins
  hidden_TF = np.zeros(x_TF.shape, bool)
  for start, stop in masks.times:
    hidden_TF |= (start <= sample_T1) & (sample_T1 < stop)
  for low, high in masks.bands:
    hidden_TF |= (low <= share_F) & (share_F < high)
  return np.where(hidden_TF, x_TF.mean(dtype=np.float64).astype(x_TF.dtype), x_TF)
