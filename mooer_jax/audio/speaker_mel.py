"""Mel spectrogram of the speaker encoder, as torchaudio's `MelSpectrogram` computes it."""

import functools

import numpy as np

from mooer_jax.audio.decode import AudioError
from mooer_jax.audio.fbank import as_waveform

SAMPLE_RATE_HZ = 16000
BINS = 64
FFT, WINDOW, HOP = 512, 400, 160
PREEMPHASIS = 0.97
LOG_OFFSET = 1e-6
MIN_SAMPLES = FFT


def speaker_mel(waveform_N: np.ndarray, *, name: str = "waveform") -> np.ndarray:
  """Log-mel features of a voice prompt: float32 [1 + N // 160, 64].

  Pre-emphasis 0.97, periodic Hamming windows of 25 ms centred every 10 ms, power spectrum of 512
  points with reflected edges, 64 triangles on the HTK mel scale up to 8 kHz without normalisation
  of their areas, log(x + 1e-6).

  Args:
    waveform_N: mono, 16 kHz, at least 512 samples.
    name: of the clip, for errors.

  Raises:
    AudioError: if it is too short.
    ValueError: if it is not a finite waveform (`fbank.as_waveform`).
  """
  import librosa

  waveform_N = as_waveform(waveform_N, name).astype(np.float64)
  if len(waveform_N) < MIN_SAMPLES:
    raise AudioError(
      f"{name}: {len(waveform_N)} samples at 16 kHz are too short for a voice; a few seconds are"
      " best",
      "too short",
    )
  before_N = np.concatenate([waveform_N[1:2], waveform_N[:-1]])
  emphasized_N = waveform_N - PREEMPHASIS * before_N
  spectrum_KT = librosa.stft(
    emphasized_N,
    n_fft=FFT,
    hop_length=HOP,
    win_length=WINDOW,
    window="hamming",
    center=True,
    pad_mode="reflect",
  )
  power_TK = (spectrum_KT.real**2 + spectrum_KT.imag**2).T
  return np.log(power_TK @ mel_matrix() + LOG_OFFSET).astype(np.float32)


@functools.cache
def mel_matrix() -> np.ndarray:
  """The triangles, float64 [257, 64]."""
  import librosa

  mel_FK = librosa.filters.mel(
    sr=SAMPLE_RATE_HZ, n_fft=FFT, n_mels=BINS, htk=True, norm=None, dtype=np.float64
  )
  return mel_FK.T
