"""Inputs of `benchmarks.data`: shards of synthetic speech-like audio, and lengths like Emilia's."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

# Of a log-normal distribution within Emilia's limits. Its published figures are the limits and a
# mean of about 9 s; the shape is an assumption.
MIN_S, MAX_S, MEDIAN_S, SIGMA = 3.0, 30.0, 7.5, 0.6
TEXT = "N0 N1 N2"


def lengths_s(count: int, *, seed: int = 0) -> np.ndarray:
  """Lengths of utterances, float64 [count], seconds."""
  rng = np.random.default_rng(seed)
  drawn = MEDIAN_S * np.exp(SIGMA * rng.standard_normal(4 * count))
  return drawn[(drawn >= MIN_S) & (drawn <= MAX_S)][:count]


def speech_like(seconds: float, *, rate_hz: int, seed: int) -> np.ndarray:
  """Harmonics of a moving pitch under syllables of 4 Hz, with noise: float32 [samples]."""
  rng = np.random.default_rng(seed)
  time_N = np.arange(round(seconds * rate_hz)) / rate_hz
  pitch_N = rng.uniform(100, 220) * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * time_N))
  phase_N = 2 * np.pi * np.cumsum(pitch_N) / rate_hz
  voice_N = sum(np.sin(k * phase_N + rng.uniform(0, 6)) / k for k in range(1, 12))
  envelope_N = np.clip(np.sin(2 * np.pi * 4 * time_N + rng.uniform(0, 6)), 0, 1)
  noise_N = 0.05 * rng.standard_normal(len(time_N))
  return (0.15 * (voice_N * envelope_N + noise_N)).astype(np.float32)


def encode(samples_N: np.ndarray, suffix: str, rate_hz: int) -> bytes:
  """A file of 16-bit wav or of mp3, by libsndfile."""
  import soundfile

  file = io.BytesIO()
  kind = ("WAV", "PCM_16") if suffix == "wav" else ("MP3", "MPEG_LAYER_III")
  soundfile.write(file, samples_N, rate_hz, format=kind[0], subtype=kind[1])
  return file.getvalue()


def write_shards(folder: Path, *, suffix: str, rate_hz: int, count: int, per_shard: int) -> Path:
  """Writes tars of `count` utterances and their list, unless they are there; returns the list.

  wav has its text in a .txt (WeNet), mp3 in a .json (Emilia).
  """
  data_list = folder / "data.list"
  if data_list.is_file():
    return data_list
  folder.mkdir(parents=True, exist_ok=True)
  names = []
  lengths = lengths_s(count)
  for first in range(0, count, per_shard):
    names.append(f"shards_{first // per_shard:09d}.tar")
    with tarfile.open(folder / names[-1], "w") as tar:
      for number in range(first, min(first + per_shard, count)):
        samples_N = speech_like(lengths[number], rate_hz=rate_hz, seed=number)
        about = ("txt", TEXT) if suffix == "wav" else ("json", json.dumps({"text": TEXT}))
        for ending, content in (
          (about[0], about[1].encode()), (suffix, encode(samples_N, suffix, rate_hz)),
        ):  # fmt: skip
          info = tarfile.TarInfo(f"u{number:06d}.{ending}")
          info.size = len(content)
          tar.addfile(info, io.BytesIO(content))
  data_list.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
  return data_list
