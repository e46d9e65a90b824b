"""Prepare real recordings for the mini SALMONN; they are not part of this project.

    python -m demo.mini.real --fsdd FOLDER --out OUT
    python -m demo.mini.real --pocketsphinx FOLDER --out OUT

--fsdd joins single digits of the Free Spoken Digit Dataset ({digit}_{speaker}_{n}.wav) into strings
of 1 to 6. It writes `test_SPEAKER.json` for a held-out speaker, `train_real.json` for the others.
--pocketsphinx converts the read sentences of Debian's pocketsphinx-testdata (`apt-get download` it,
then `dpkg -x` into FOLDER) and writes `test_pocketsphinx.json`.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from rich.progress import track

from demo.mini.speech import entry, write_annotations, write_flac
from demo.real_speech import Voice, held_out_split, join, join_varied
from demo.synthesize import SAMPLE_RATE_HZ, random_digits, spell
from mooer_jax.audio.decode import load_audio

MAX_DIGITS = 6
HESITATION_S = (0.3, 1.5)  # an occasional pause within a string, as people make it
# <s> words </s> (name of the recording)
TRANSCRIPT = re.compile(r"<s>\s*(?P<text>.*?)\s*</s>\s*\((?P<name>[^)\s]+)\)")


def join_digits(voices: dict[str, Voice], path: Path, clips: int, *, seed: int, vary: bool) -> None:
  """Join recordings into strings and write their annotation file.

  The clips are in the folder beside the annotation file that has its stem. The speakers alternate,
  and all lengths from 1 to MAX_DIGITS are equally probable. With `vary`, every second clip is
  varied; half of these, except the longest strings, also get a pause of HESITATION_S, because
  otherwise a model takes a long pause for the end.
  """
  folder = path.with_suffix("")
  speakers = sorted(voices)
  entries = []
  for index in track(range(clips), f"joining {folder.name}"):
    rng = np.random.default_rng([seed, index])
    # The speaker changes every second clip, so that each speaker has varied and plain clips.
    speaker = speakers[index // 2 % len(speakers)]
    digits = random_digits(rng, int(rng.integers(1, MAX_DIGITS + 1)))
    if vary and index % 2:
      hesitates = len(digits) < MAX_DIGITS and rng.random() < 0.5
      hesitation_s = rng.uniform(*HESITATION_S) if hesitates else 0.0
      speech = join_varied(voices[speaker], digits, rng, hesitation_s=hesitation_s)
    else:
      speech = join(voices[speaker], digits, rng)
    clip = folder / f"{speaker}-{index:05d}.flac"
    write_flac(clip, speech)
    entries.append(entry(f"{folder.name}/{clip.name}", "asr", " ".join(spell(digits))))
  write_annotations(path, entries)


def read_transcripts(folder: Path) -> list[tuple[Path, str]]:
  """Return the recordings that the transcription files below a folder name, with their texts."""
  found = []
  for listing in sorted([*folder.rglob("transcription"), *folder.rglob("*.transcription")]):
    for match in TRANSCRIPT.finditer(listing.read_text("utf-8")):
      path = listing.parent / f"{match['name']}.wav"
      if not path.exists():
        raise FileNotFoundError(f"{listing} names {path.name}, but {path} does not exist")
      found.append((path, match["text"]))
  if not found:
    raise FileNotFoundError(
      f"{folder}: no transcription file with lines of the form '<s> words </s> (id)'"
    )
  return found


def copy_sentences(folder: Path, path: Path) -> None:
  """Write the read sentences of a folder, at 16 kHz, and their annotation file."""
  clips = path.with_suffix("")
  entries = []
  for source, text in read_transcripts(folder):
    name = f"{source.parent.name}-{source.stem}.flac"
    write_flac(clips / name, load_audio(source, sample_rate_hz=SAMPLE_RATE_HZ))
    entries.append(entry(f"{clips.name}/{name}", "asr", text))
  write_annotations(path, entries)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--fsdd", type=Path, help="folder of the Free Spoken Digit Dataset")
  parser.add_argument(
    "--pocketsphinx", type=Path, help="folder of the unpacked Debian package pocketsphinx-testdata"
  )
  parser.add_argument("--out", type=Path, required=True, help="output folder")
  parser.add_argument("--held-out", default="theo", help="speaker of the test set (default: theo)")
  parser.add_argument("--test-clips", type=int, default=150, help="default: 150")
  parser.add_argument("--train-clips", type=int, default=3000, help="default: 3000")
  args = parser.parse_args()
  if not (args.fsdd or args.pocketsphinx):
    parser.error("--fsdd FOLDER or --pocketsphinx FOLDER is required")
  try:
    if args.fsdd:
      others, held_out = held_out_split(args.fsdd, args.held_out)
      test = args.out / f"test_{args.held_out}.json"
      join_digits(held_out, test, args.test_clips, seed=2, vary=False)
      join_digits(others, args.out / "train_real.json", args.train_clips, seed=1, vary=True)
    if args.pocketsphinx:
      copy_sentences(args.pocketsphinx, args.out / "test_pocketsphinx.json")
  except (FileNotFoundError, ValueError) as error:
    parser.error(str(error))


if __name__ == "__main__":
  main()
