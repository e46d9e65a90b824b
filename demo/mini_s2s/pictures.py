"""Mel spectrograms of two waveforms, one above the other."""

from pathlib import Path

import numpy as np

from mooer_jax.audio.decode import load_audio
from mooer_jax.files import replace_file

RATE_HZ = 16000
HOP, BINS = 160, 80  # of a mel spectrogram: samples, so 10 ms, and its height
FLOOR_DB = -80.0


def log_mel(waveform_N: np.ndarray) -> np.ndarray:
  """Return mel energies in dB below the loudest: float32 [80, frames of 10 ms]."""
  from librosa import power_to_db
  from librosa.feature import melspectrogram

  mel_FT = melspectrogram(y=waveform_N, sr=RATE_HZ, n_fft=1024, hop_length=HOP, n_mels=BINS)
  return power_to_db(mel_FT, ref=np.max, top_db=-FLOOR_DB)


def draw_pair(reference: Path, output: Path, picture: Path) -> None:
  """Draw the spectrograms of the reference and of the output into a PNG file, on one time axis."""
  from matplotlib.figure import Figure

  mels = {
    name: log_mel(load_audio(path, sample_rate_hz=RATE_HZ))
    for name, path in (("reference", reference), ("output", output))
  }
  figure = Figure(figsize=(8, 5), layout="constrained")
  for axes, (name, mel_FT) in zip(figure.subplots(2, 1, sharex=True), mels.items(), strict=True):
    seconds = mel_FT.shape[1] * HOP / RATE_HZ
    axes.imshow(mel_FT, origin="lower", aspect="auto", extent=(0, seconds, 0, BINS), vmin=FLOOR_DB)
    axes.set(title=name, ylabel="mel bin")
  axes.set(xlabel="seconds", xlim=(0, None))
  with replace_file(picture) as beside:
    figure.savefig(beside, format="png", dpi=100)
