"""The clips of the mini SALMONN and their labels."""

import collections
import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from demo.mini.voices import ENGINES, Speaker, casting
from demo.synthesize import WORDS, draw_digits, spell

SPLITS = ("train", "test")
SPANISH = dict(
  zip(WORDS, ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"))
)
TRANSLATED = 3  # most digits in a translation: a Spanish digit has two or three tokens
# Probability that a training digit repeats its predecessor: models miscount repeated digits first.
REPEATS = 0.25
# Longest clip in seconds: digit strings, and all others.
DIGITS_LIMIT_S, LIMIT_S = 5.0, 10.0


@dataclasses.dataclass(frozen=True)
class SpeechConfig:
  """Size and seed of the synthetic speech; the test has held-out voices and strings."""

  digit_clips: int = 2700
  sentence_clips: int = 1500
  test_digit_clips: int = 300
  test_entries: int = 100  # for sentences and for each task except transcription
  max_digits: int = 7  # lengths are uniform from 1 (test: from 2)
  engines: tuple[str, ...] = ENGINES  # of the training voices; the test voices are espeak's
  seed: int = 0

  def __post_init__(self):
    if "espeak" not in self.engines or not {*self.engines} <= {*ENGINES}:
      raise ValueError(f"engines={self.engines}: must contain espeak, and only names in {ENGINES}")
    if not 2 <= self.max_digits <= 8:
      raise ValueError(f"max_digits={self.max_digits}: allowed are 2 to 8 (5 s)")

  def quick(self) -> "SpeechConfig":
    """Return a config of a tenth of the size, for a smoke test."""
    counts = {k: n // 10 for k, n in vars(self).items() if k.endswith(("clips", "entries"))}
    return dataclasses.replace(self, **counts)


@dataclasses.dataclass(frozen=True)
class Label:
  """A task for a clip: its answer, and its question if the prompt takes one."""

  task: str
  text: str
  question: str | None = None


@dataclasses.dataclass(frozen=True)
class Clip:
  """One clip to synthesize: its pieces one by one, joined with pauses, in at most `limit_s`."""

  key: str
  speaker: Speaker
  pieces: tuple[str, ...]
  labels: tuple[Label, ...]
  seed: tuple[int, ...]
  limit_s: float = LIMIT_S

  @property
  def file(self) -> str:
    return f"{self.key}.flac"


def plan(config: SpeechConfig, split: str) -> list[Clip]:
  """List the clips of a split ("train" or "test")."""
  if split not in SPLITS:
    raise ValueError(f"split={split!r}: allowed are {SPLITS}")
  test = split == "test"
  counts = {
    _digits: config.test_digit_clips if test else config.digit_clips,
    _sentence: config.test_entries if test else config.sentence_clips,
  }
  clips = []
  for number, (make, count) in enumerate(counts.items()):
    rng = np.random.default_rng([config.seed, int(test), number])
    cast = casting(rng, test=test, engines=config.engines)
    for index in range(count):
      clip = make(rng, cast, index, test=test, max_digits=config.max_digits)
      name = make.__name__.strip("_")
      seed = (config.seed, int(test), number, index)
      clips.append(dataclasses.replace(clip, key=f"{name}-{index:05d}", seed=seed))
  return clips


def _digits(rng, cast, index, *, test, max_digits) -> Clip:
  repeats = 0.0 if test else REPEATS
  digits = draw_digits(rng, max_digits, held_out=test, repeats=repeats)
  words = tuple(spell(digits))
  text, speaker = " ".join(words), cast()
  # Yes and no alternate, and the word in the question does not predict the answer.
  absent = [word for word in WORDS if word not in words]
  asked = absent if index % 2 else words
  labels = [
    Label("asr", text),
    Label("count", WORDS[len(words)]),
    Label("keyword", "no" if index % 2 else "yes", asked[rng.integers(len(asked))]),
  ]
  if len(words) <= TRANSLATED:
    labels.append(Label("translate", " ".join(SPANISH[word] for word in words)))
  if test and index < len(untrained()):
    labels += [Label(task, answer.format(text)) for task, answer in untrained()[index].items()]
  pieces = words if rng.random() < 0.5 else (text,)
  return Clip("", speaker, pieces, tuple(labels), (), DIGITS_LIMIT_S)


def _sentence(rng, cast, index, *, test, max_digits) -> Clip:
  sentences = sentences_of(test)
  # A stride that is coprime to the length of the list visits every sentence before it repeats one.
  sentence = sentences[index * _stride(len(sentences)) % len(sentences)]
  return Clip("", cast(), (sentence,), (Label("asr", sentence),), ())


@functools.cache
def untrained() -> list[dict[str, str]]:
  """Return answers to instructions that are not in training, with {} for the digits of a clip."""
  return json.loads((Path(__file__).parent / "untrained.json").read_text("utf-8"))


@functools.cache
def sentences_of(test: bool) -> list[str]:
  """Return the sentences of a split; about a tenth of all sentences are in the test split."""
  lines = (Path(__file__).parent / "sentences.txt").read_text("utf-8").splitlines()
  return [line for line in lines if (zlib.crc32(line.encode()) % 10 == 0) == test]


def _stride(count: int) -> int:
  return next(n for n in range(int(count * 0.38) + 1, 2 * count + 2) if np.gcd(n, count) == 1)


def balanced(pairs: Iterable[tuple[Clip, Label]], limit: int) -> list[tuple[Clip, Label]]:
  """Select at most `limit` pairs, with the different answers in equal numbers where possible."""
  by_answer: dict[str, list] = collections.defaultdict(list)
  for clip, label in pairs:
    by_answer[label.text].append((clip, label))
  rounds = itertools.zip_longest(*by_answer.values())
  return [pair for turn in rounds for pair in turn if pair is not None][:limit]
