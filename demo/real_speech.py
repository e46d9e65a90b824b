"""Digit strings out of the Free Spoken Digit Dataset, to hear how a demo model fares on people.

    python -m demo.real_speech --fsdd FOLDER --held-out theo --out out/real/speech

joins single digits of one speaker, with pauses, into strings of 1 to 5: `test` from the held-out
speaker, `train` from the others, as wav.scp and text for `mooer-jax pack`. The recordings
({digit}_{speaker}_{n}.wav, 8 kHz; Jackson and others, CC BY-SA 4.0) are not part of this project.
"""

import argparse
import collections
from pathlib import Path

import numpy as np
import soxr
from rich.progress import track

from demo.synthesize import SAMPLE_RATE_HZ, write_clip
from mooer_jax.audio.decode import load_audio

MAX_DIGITS = 5
# Speaking rate and pitch move together here; beyond these the voices turn unnatural.
RATES = (0.85, 1.18)


def read_recordings(folder: Path) -> dict[str, dict[str, list[np.ndarray]]]:
  """Returns {speaker: {digit: [waveform at 16 kHz]}}.

  Raises:
    FileNotFoundError: if the folder holds no recording of that naming.
  """
  recordings: dict = collections.defaultdict(lambda: collections.defaultdict(list))
  for path in sorted(folder.glob("[0-9]_*_*.wav")):
    digit, speaker, _ = path.stem.split("_")
    recordings[speaker][digit].append(load_audio(path, sample_rate_hz=SAMPLE_RATE_HZ))
  if not recordings:
    raise FileNotFoundError(f"{folder}: no {{digit}}_{{speaker}}_{{n}}.wav")
  return recordings


def join(voice: dict[str, list[np.ndarray]], digits: str, rng, *, augment: bool) -> np.ndarray:
  """Speaks a string with one speaker's recordings, 0.05 to 0.25 s of faint noise between them.

  With `augment`, the rate (and pitch) is changed and the level varied, as for training.
  """
  rate = rng.uniform(*RATES) if augment else 1.0
  level_db = rng.uniform(-30, -18) if augment else -24.0
  pieces = []
  for digit in digits:
    spoken = voice[digit][rng.integers(len(voice[digit]))]
    spoken = spoken / (np.sqrt(np.mean(spoken**2)) + 1e-9)
    if rate != 1.0:
      spoken = soxr.resample(spoken, SAMPLE_RATE_HZ, round(SAMPLE_RATE_HZ * rate))
    pieces += [np.zeros(int(rng.uniform(0.05, 0.25) * SAMPLE_RATE_HZ), np.float32), spoken]
  pieces.append(np.zeros(int(rng.uniform(0.05, 0.25) * SAMPLE_RATE_HZ), np.float32))
  speech = np.concatenate(pieces)
  snr_db = rng.uniform(15, 45) if augment else 35.0
  speech = speech + 10 ** (-snr_db / 20) * rng.standard_normal(len(speech))
  return np.clip(10 ** (level_db / 20) * speech, -1, 1 - 1 / 32768).astype(np.float32)


def write_split(voices: dict, folder: Path, clips: int, *, seed: int, augment: bool):
  """Writes `wav/KEY.wav`, `wav.scp` and `text`; every length from 1 to 5 is equally often there."""
  (folder / "wav").mkdir(parents=True, exist_ok=True)
  rows = []
  speakers = sorted(voices)
  for index in track(range(clips), f"joining {folder.name}"):
    rng = np.random.default_rng([seed, index])
    speaker = speakers[index % len(speakers)]
    digits = "".join(map(str, rng.integers(0, 10, rng.integers(1, MAX_DIGITS + 1))))
    key = f"{folder.name}-{index:05d}-{speaker}"
    path = (folder / "wav" / f"{key}.wav").resolve()
    write_clip(path, join(voices[speaker], digits, rng, augment=augment))
    rows.append((key, path, digits))
  (folder / "wav.scp").write_text("".join(f"{k} {p}\n" for k, p, _ in rows), "utf-8")
  (folder / "text").write_text("".join(f"{k} {d}\n" for k, _, d in rows), "utf-8")


def main():
  parser = argparse.ArgumentParser(description="Joins recorded digits into strings.")
  parser.add_argument("--fsdd", type=Path, required=True, help="folder of the recordings")
  parser.add_argument("--held-out", required=True, help="the speaker of the test set")
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--train-clips", type=int, default=9000)
  parser.add_argument("--test-clips", type=int, default=300)
  args = parser.parse_args()
  recordings = read_recordings(args.fsdd)
  if args.held_out not in recordings:
    parser.error(f"--held-out={args.held_out}: the speakers are {sorted(recordings)}")
  others = {speaker: voice for speaker, voice in recordings.items() if speaker != args.held_out}
  write_split(others, args.out / "train", args.train_clips, seed=1, augment=True)
  held_out = {args.held_out: recordings[args.held_out]}
  write_split(held_out, args.out / "test", args.test_clips, seed=2, augment=False)


if __name__ == "__main__":
  main()
