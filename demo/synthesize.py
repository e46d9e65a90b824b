"""Synthesize the demo's speech: strings of 1 to 6 English digits in many synthetic voices.

Voices and strings of the test set do not occur in training. One seed determines everything, for any
number of processes.
"""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from rich.progress import track

from demo.espeak import Manner, synthesizer

SAMPLE_RATE_HZ = 16000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = (
  "en", "en-us", "en-us-nyc", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd",
  "en-029",
)  # fmt: skip
# Held out in all accents. The formants in their definitions differ by at least 5 % on average from
# those of every training voice.
TEST_VARIANTS = (
  "Alicia", "Annie", "belinda", "linda", "grandma", "shelby", "m2", "m5", "gustave", "pablo",
  "victor", "ed", "ian", "boris", "antonio",
)  # fmt: skip
# Training only: random voices (see `random_voice`), and the range of frequency shifts.
RANDOM_VARIANTS = tuple(f"random{number}" for number in range(100))
SHIFTS = (0.82, 1.22)
# Left out: Demonic, UniRobot, anikaRobot, AnxiousAndy, Tweaky, croak, fast, kaukovalta, whisper,
# whisperf (effects rather than voices) and copies that differ in name only.
TRAIN_VARIANTS = (
  "Alex", "Andrea", "Andy", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Jacky", "Lee",
  "Marco", "Mario", "Michael", "Mike", "Nguyen", "Reed", "RicishayMax", "RicishayMax2",
  "RicishayMax3", "Storm", "adam", "anika", "announcer", "aunty", "benjamin", "caleb", "david",
  "edward", "edward2", "f1", "f2", "f3", "f4", "f5", "grandpa", "iven", "iven2", "iven3", "iven4",
  "john", "klatt", "klatt2", "klatt3", "klatt4", "klatt5", "klatt6", "m1", "m3", "m4", "m6", "m7",
  "m8", "marcelo", "max", "michel", "miguel", "mike2", "norbert", "paul", "pedro", "quincy", "rob",
  "robert", "robosoft", "robosoft2", "robosoft3", "robosoft4", "robosoft6", "sandro", "steph",
  "steph2", "steph3", "travis", "zac",
)  # fmt: skip
LANE_CLIPS = 750


@dataclasses.dataclass(frozen=True)
class SpeechConfig:
  """Size and seed of the synthetic speech; the test has held-out voices and strings."""

  train_clips: int = 12000
  test_clips: int = 300
  max_digits: int = 6  # lengths are uniform from 1 (test: from 2)
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Utterance:
  """One clip: its digits, voice and prosody, and the seed of its acoustics.

  `shift` multiplies all frequencies, formants included, like a shorter or longer vocal tract; the
  clip is shorter by the same factor.
  """

  key: str
  digits: str
  manner: Manner
  seed: tuple[int, ...]
  shift: float = 1.0


def is_held_out(digits: str) -> bool:
  """Return whether a string is in the test set: a fifth of all strings of two or more digits."""
  return len(digits) > 1 and zlib.crc32(digits.encode()) % 5 == 0


def plan(config: SpeechConfig, split: str) -> list[Utterance]:
  """List the clips of a split ("train" or "test").

  There are only ten one-digit strings, which cannot be held out, so the test set starts at two
  digits.
  """
  if split not in ("train", "test"):
    raise ValueError(f"split={split!r}: allowed are 'train' and 'test'")
  if not 2 <= config.max_digits <= 12:
    raise ValueError(f"max_digits={config.max_digits}: allowed are 2 to 12")
  test = split == "test"
  count = config.test_clips if test else config.train_clips
  variants = TEST_VARIANTS if test else TRAIN_VARIANTS + RANDOM_VARIANTS
  rng = np.random.default_rng([config.seed, int(test)])
  utterances = []
  for index in range(count):
    digits = draw_digits(rng, config.max_digits, held_out=test)
    manner = Manner(
      # Voices alternate, so that each is equally frequent.
      voice=f"{ACCENTS[rng.integers(len(ACCENTS))]}+{variants[index % len(variants)]}",
      words_per_minute=int(rng.integers(120, 231)),
      pitch=int(rng.integers(20, 81)),
      pitch_range=int(rng.integers(20, 81)),
      word_gap=int(rng.integers(0, 13)) if rng.random() < 0.6 else 0,
    )
    key = f"{split}-{index:05d}-{manner.voice.replace('+', '-')}"
    # Training only: more vocal tracts than there are voices. Test voices are unchanged.
    shift = 1.0 if test or rng.random() < 0.3 else float(np.exp(rng.uniform(*np.log(SHIFTS))))
    utterances.append(Utterance(key, digits, manner, (config.seed, int(test), index), shift))
  return utterances


def random_voice(name: str) -> str:
  """Describe one of RANDOM_VARIANTS in espeak-ng's voice format; its name is the random seed.

  Each formant is shifted by itself, because voices differ in more than vocal tract length.
  """
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  tract = np.exp(rng.uniform(np.log(0.85), np.log(1.32)))
  low = rng.uniform(60, 210)
  lines = [
    "language variant",
    f"name {name}",
    f"pitch {low:.0f} {low * rng.uniform(1.2, 1.7):.0f}",
    f"flutter {rng.integers(0, 10)}",
    f"roughness {rng.integers(0, 4)}",
    f"voicing {rng.uniform(40, 110):.0f}",
    f"consonants {rng.uniform(20, 110):.0f} {rng.uniform(20, 110):.0f}",
    f"formant 0 {rng.uniform(85, 118):.0f} {rng.uniform(70, 160):.0f} {rng.uniform(100, 190):.0f}",
  ]
  for formant in range(1, 9):
    frequency = 100 * tract * np.exp(rng.uniform(-0.2, 0.2)) if formant < 6 else 100
    height, width = (rng.uniform(50, 150), rng.uniform(75, 175)) if formant < 6 else (60, 120)
    lines.append(f"formant {formant} {frequency:.0f} {height:.0f} {width:.0f}")
  return "\n".join(lines) + "\n"


def draw_digits(rng, max_digits: int, *, held_out: bool, repeats: float = 0.0) -> str:
  """Draw a string of 1 (held out: 2) to `max_digits` digits; all lengths are equally probable."""
  length = int(rng.integers(2 if held_out else 1, max_digits + 1))
  while True:
    digits = random_digits(rng, length, repeats)
    if is_held_out(digits) == held_out:
      return digits


def random_digits(rng, length: int, repeats: float = 0.0) -> str:
  """Draw `length` digits; each repeats its predecessor with probability `repeats`."""
  digits = rng.integers(0, 10, length)
  if repeats:
    for i in np.flatnonzero(rng.random(length - 1) < repeats) + 1:
      digits[i] = digits[i - 1]
  return "".join(map(str, digits))


def spell(digits: str) -> list[str]:
  """Return the words of a digit string."""
  return [WORDS[int(digit)] for digit in digits]


def say(text: str, manner: Manner) -> tuple[np.ndarray, int]:
  """Synthesize a text in one of espeak's or of RANDOM_VARIANTS: (float32 [samples], rate in Hz)."""
  engine = synthesizer()
  variant = manner.voice.partition("+")[2]
  if variant in RANDOM_VARIANTS:
    engine.define(variant, random_voice(variant))
  return engine.say(text, manner).astype(np.float32) / 32768, engine.sample_rate_hz


def render(utterance: Utterance) -> np.ndarray:
  """Synthesize one utterance with a random room and microphone: float32 in [-1, 1] at 16 kHz."""
  rng = np.random.default_rng(utterance.seed)
  spoken, rate_hz = say(" ".join(spell(utterance.digits)), utterance.manner)
  speech = soxr.resample(spoken, rate_hz * utterance.shift, SAMPLE_RATE_HZ)
  edges = rng.uniform(0.03, 0.3, 2) * SAMPLE_RATE_HZ
  speech = np.pad(speech, edges.astype(int))
  if rng.random() < 0.2:
    speech = add_room(speech, rng)
  if rng.random() < 0.35:
    speech = _limit_band(speech, rng)
  speech /= np.sqrt(np.mean(speech**2)) + 1e-9
  if rng.random() < 0.7:
    speech = add_noise(speech, rng.uniform(12, 40), rng)
  speech *= 10 ** (rng.uniform(-34, -16) / 20)
  return np.clip(speech, -1, 1 - 1 / 32768).astype(np.float32)


def add_room(speech, rng):
  """Convolve with exponentially decaying noise, the simplest model of late reverberation."""
  seconds = rng.uniform(0.1, 0.35)
  times = np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
  echo = rng.standard_normal(len(times)) * np.exp(-6.9 * times / seconds)
  echo *= 10 ** (-rng.uniform(4, 15) / 20) / np.linalg.norm(echo)
  echo[0] += 1
  size = _fast_size(len(speech) + len(echo))
  wet = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(echo, size), size)
  return wet[: len(speech)]


def _limit_band(speech, rng):
  """A telephone or a cheap microphone: nothing above 3.2 to 5.5 kHz, little below 80 to 300 Hz."""
  size = _fast_size(len(speech))
  hz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ)
  low, high = rng.uniform(80, 300), rng.uniform(3200, 5500)
  gain = 1 / (1 + (low / np.maximum(hz, 1)) ** 4) / (1 + (hz / high) ** 24)
  return np.fft.irfft(np.fft.rfft(speech, size) * gain, size)[: len(speech)]


def add_noise(speech, snr_db: float, rng):
  """Add noise to speech of unit power."""
  return speech + 10 ** (-snr_db / 20) * _noise(len(speech), rng)


def _noise(samples: int, rng):
  """Noise of unit power whose spectrum falls by 0 (white) to 6 dB (brown) per octave."""
  size = _fast_size(samples)
  half = size // 2 + 1
  spectrum = rng.standard_normal(half, np.float32) + 1j * rng.standard_normal(half, np.float32)
  spectrum *= np.maximum(np.arange(half), 20.0) ** -rng.uniform(0, 1)
  noise = np.fft.irfft(spectrum, size)[:samples]
  return noise / np.sqrt(np.mean(noise**2))


def _fast_size(samples: int) -> int:
  """The next multiple of 2048, whose factors keep the FFT fast."""
  return -(-samples // 2048) * 2048


def silence(seconds: float):
  """float32 [samples] at 16 kHz."""
  return np.zeros(int(seconds * SAMPLE_RATE_HZ), np.float32)


def write_clip(path: Path, speech, format: str = "WAV") -> None:
  """Write float samples in [-1, 1] at 16 kHz as 16-bit audio."""
  soundfile.write(path, speech, SAMPLE_RATE_HZ, subtype="PCM_16", format=format)


def _write_clips(utterances: list[Utterance], folder: Path) -> None:
  for utterance in utterances:
    write_clip(folder / f"{utterance.key}.wav", render(utterance))


@contextlib.contextmanager
def worker_processes(number: int | None) -> Iterator[concurrent.futures.Executor]:
  """Yield a pool that runs each task in a new process; default number: the number of cores.

  Workers ignore Ctrl-C; this process, which is a script, then terminates all its child processes.
  """
  with concurrent.futures.ProcessPoolExecutor(
    number or os.cpu_count() or 1,
    mp_context=multiprocessing.get_context("spawn"),
    max_tasks_per_child=1,
    initializer=signal.signal,
    initargs=(signal.SIGINT, signal.SIG_IGN),
  ) as pool:
    try:
      yield pool
    except BaseException:
      # The pool does not cancel queued tasks: when a process ends, it starts another.
      ending = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": True})
      ending.start()
      while ending.is_alive():
        for process in multiprocessing.active_children():
          process.terminate()
        ending.join(0.05)
      raise


def in_lanes(
  write: Callable[[list, Path], None], lanes: list[list], folder: Path, processes: int | None
) -> None:
  """Call `write(lane, folder)` for each lane of clips in a new process; show the progress.

  Synthesizers keep state from one sentence to the next. Lanes of a fixed size make the result
  independent of the number of processes and of interruptions.
  """
  with worker_processes(processes) as pool:
    futures = [pool.submit(write, lane, folder) for lane in lanes]
    finished = concurrent.futures.as_completed(futures)
    for future in track(finished, f"synthesizing {folder}", len(futures)):
      future.result()


def write_split(utterances: list[Utterance], folder: Path, processes: int | None = None) -> None:
  """Synthesize clips and write `wav/KEY.wav`, `wav.scp` and `text`."""
  (folder / "wav").mkdir(parents=True, exist_ok=True)
  # Sorted, because changing the voice costs as much as a short sentence.
  clips = sorted(utterances, key=lambda utterance: (utterance.manner.voice, utterance.key))
  lanes = [clips[i : i + LANE_CLIPS] for i in range(0, len(clips), LANE_CLIPS)]
  in_lanes(_write_clips, lanes, folder / "wav", processes)
  write_lists(folder, ((u.key, u.digits) for u in utterances))


def write_lists(folder: Path, rows: Iterable[tuple[str, str]]) -> None:
  """Write `text` and the `wav.scp` of `wav/KEY.wav` for (key, text) rows."""
  rows = list(rows)
  wav = folder.resolve() / "wav"
  (folder / "wav.scp").write_text("".join(f"{key} {wav / key}.wav\n" for key, _ in rows), "utf-8")
  (folder / "text").write_text("".join(f"{key} {text}\n" for key, text in rows), "utf-8")
