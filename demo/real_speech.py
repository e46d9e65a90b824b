"""Digit strings of real speakers, joined from the Free Spoken Digit Dataset.

    python -m demo.real_speech --fsdd FOLDER --held-out theo --out out/real/speech

Joins single digits of one speaker, with pauses, into strings of 1 to 5: `test` from the held-out
speaker, `train` from the others with varied vocal tract length, tempo, room and noise. Writes
wav.scp and text for `mooer-jax pack`. The recordings ({digit}_{speaker}_{n}.wav, 8 kHz; Jackson and
others, CC BY-SA 4.0) are not part of this project.
"""

import argparse
import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr
from rich.progress import track

from demo.synthesize import (
  SAMPLE_RATE_HZ,
  add_noise,
  add_room,
  random_digits,
  silence,
  write_clip,
  write_lists,
)
from mooer_jax.audio.decode import load_audio

MAX_DIGITS = 5
# Three voices are few. Resampling shifts pitch and formants together, like another vocal tract
# length; stretching changes only the tempo.
RATES = (0.78, 1.28)
STRETCHES = (0.8, 0.9, 1.0, 1.15, 1.3)
Voice = dict[str, list[np.ndarray]]  # {digit: [waveform at 16 kHz]} of a speaker


def find_recordings(folder: Path) -> list[Path]:
  """Return the recordings in the dataset's folder, or in its `recordings/`."""
  for place in (folder, folder / "recordings"):
    if found := sorted(place.glob("[0-9]_*_*.wav")):
      return found
  raise FileNotFoundError(
    f"{folder}: no {{digit}}_{{speaker}}_{{n}}.wav in it or in its recordings/; give the folder of"
    " the Free Spoken Digit Dataset"
  )


def held_out_split(folder: Path, speaker: str) -> tuple[dict[str, Voice], dict[str, Voice]]:
  """Return the voices of all other speakers, and that of a held-out speaker, by name."""
  voices: dict = collections.defaultdict(lambda: collections.defaultdict(list))
  for path in find_recordings(folder):
    digit, name, _ = path.stem.split("_")
    voices[name][digit].append(load_audio(path, sample_rate_hz=SAMPLE_RATE_HZ))
  if speaker not in voices:
    raise ValueError(f"--held-out={speaker}: must be one of {', '.join(sorted(voices))}")
  held_out = {speaker: voices.pop(speaker)}
  return voices, held_out


def stretched(voice: Voice) -> Voice:
  """Return every recording at every tempo of STRETCHES, with the same pitch."""
  from librosa.effects import time_stretch

  return {
    digit: [time_stretch(clip, rate=rate, n_fft=512) for clip in clips for rate in STRETCHES]
    for digit, clips in voice.items()
  }


def join(voice: Voice, digits: Sequence[str], rng) -> np.ndarray:
  """Join one speaker's unchanged recordings, with pauses of 0.05 to 0.25 s and a faint noise."""
  pieces = []
  for digit in digits:
    spoken = _one_of(voice[digit], rng)
    pieces += [silence(rng.uniform(0.05, 0.25)), spoken]
  pieces.append(silence(rng.uniform(0.05, 0.25)))
  speech = np.concatenate(pieces)
  return _at_level(speech + 10 ** (-35 / 20) * rng.standard_normal(len(speech)), -24.0)


def join_varied(
  voice: Voice, digits: Sequence[str], rng, *, hesitation_s: float = 0.0
) -> np.ndarray:
  """Join recordings for training, with random vocal tract, pauses, response, room, noise and level.

  `hesitation_s` is the length of an additional pause after any digit but the last.
  """
  rate = np.exp(rng.uniform(*np.log(RATES)))
  longest_s = rng.choice((0.02, 0.1, 0.25))
  hesitates_after = rng.integers(len(digits) - 1) if hesitation_s and len(digits) > 1 else None
  pieces = [silence(rng.uniform(0.03, 0.3))]
  for place, digit in enumerate(digits):
    spoken = _one_of(voice[digit], rng) * 10 ** (rng.uniform(-3, 3) / 20)
    spoken = soxr.resample(spoken, SAMPLE_RATE_HZ, round(SAMPLE_RATE_HZ * rate))
    pause_s = rng.uniform(0, longest_s) + hesitation_s * (place == hesitates_after)
    pieces += [spoken, silence(pause_s)]
  pieces.append(silence(rng.uniform(0.03, 0.3)))
  speech = np.concatenate(pieces)
  if rng.random() < 0.3:
    speech = add_room(speech, rng)
  if rng.random() < 0.7:
    speech = _colour(speech, rng)
  speech = add_noise(speech / np.sqrt(np.mean(speech**2)), rng.uniform(10, 45), rng)
  return _at_level(speech, rng.uniform(-34, -16))


def _one_of(clips, rng):
  spoken = clips[rng.integers(len(clips))]
  return spoken / (np.sqrt(np.mean(spoken**2)) + 1e-9)


def _at_level(speech, level_db: float):
  return np.clip(10 ** (level_db / 20) * speech, -1, 1 - 1 / 32768).astype(np.float32)


def _colour(speech, rng):
  """A smooth random frequency response of a few decibels, as of another mouth and microphone."""
  spectrum = np.fft.rfft(speech)
  mel = np.log1p(np.linspace(0, SAMPLE_RATE_HZ / 2, len(spectrum)) / 700)
  knots = np.linspace(0, mel[-1], 8)
  gain_db = np.interp(mel, knots, rng.normal(0, 4, len(knots)))
  return np.fft.irfft(spectrum * 10 ** (gain_db / 20), len(speech))


def write_split(voices: dict, folder: Path, clips: int, *, seed: int, vary: bool):
  """Write `wav/KEY.wav`, `wav.scp` and `text`, with equally many strings of each length, 1 to 5."""
  (folder / "wav").mkdir(parents=True, exist_ok=True)
  rows = []
  speakers = sorted(voices)
  if vary:
    voices = {name: stretched(voice) for name, voice in voices.items()}
  for index in track(range(clips), f"joining {folder.name}"):
    rng = np.random.default_rng([seed, index])
    speaker = speakers[index % len(speakers)]
    digits = random_digits(rng, int(rng.integers(1, MAX_DIGITS + 1)))
    key = f"{folder.name}-{index:05d}-{speaker}"
    speak = join_varied if vary else join
    write_clip(folder / "wav" / f"{key}.wav", speak(voices[speaker], digits, rng))
    rows.append((key, digits))
  write_lists(folder, rows)


def main():
  parser = argparse.ArgumentParser(description="Join recorded digits into strings.")
  parser.add_argument("--fsdd", type=Path, required=True, help="folder of the dataset")
  parser.add_argument("--held-out", required=True, help="speaker of the test set")
  parser.add_argument("--out", type=Path, required=True, help="output folder")
  parser.add_argument("--train-clips", type=int, default=24000, help="default: 24000")
  parser.add_argument("--test-clips", type=int, default=300, help="default: 300")
  args = parser.parse_args()
  try:
    others, held_out = held_out_split(args.fsdd, args.held_out)
  except (FileNotFoundError, ValueError) as error:
    parser.error(str(error))
  write_split(others, args.out / "train", args.train_clips, seed=1, vary=True)
  write_split(held_out, args.out / "test", args.test_clips, seed=2, vary=False)


if __name__ == "__main__":
  main()
