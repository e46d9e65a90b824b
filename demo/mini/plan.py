"""Decides every clip of the mini SALMONN's speech, and with it every label."""

import collections
import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from demo.mini.voices import ENGINES, Casting, Speaker
from demo.synthesize import WORDS, draw_digits

SPLITS = ("train", "test")
NUMBERS = (
  *WORDS, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
  "eighteen", "nineteen", "twenty",
)  # fmt: skip
SPANISH = dict(
  zip(WORDS, ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"))
)
TRANSLATED = 4  # digits at most: a Spanish one is two or three tokens
OPENINGS = ("what is", "how much is", "tell me")
# Seconds: of a string of digits, and of everything else.
DIGITS_LIMIT_S, LIMIT_S = 5.0, 10.0


@dataclasses.dataclass(frozen=True)
class SpeechConfig:
  """What to synthesize.

  Attributes:
    digit_clips: training clips of strings of digits.
    speaker_clips: training clips of one to three people.
    arithmetic_clips: training clips of spoken sums.
    sentence_clips: training clips of open vocabulary.
    test_digit_clips: digit clips of held-out voices and strings.
    test_entries: of each further task, and of sentences, in the test.
    max_digits: longest string; lengths are uniform from 1 (test: from 2) to this.
    engines: which of ENGINES speak in training; the test voices are espeak's.
    seed: decides everything.
  """

  digit_clips: int = 2700
  speaker_clips: int = 600
  arithmetic_clips: int = 600
  sentence_clips: int = 600
  test_digit_clips: int = 300
  test_entries: int = 100
  max_digits: int = 7
  engines: tuple[str, ...] = ENGINES
  seed: int = 0

  def __post_init__(self):
    if "espeak" not in self.engines or not {*self.engines} <= {*ENGINES}:
      raise ValueError(f"engines={self.engines}: espeak and any of the others of {ENGINES}")
    if not 2 <= self.max_digits <= 8:
      raise ValueError(f"max_digits={self.max_digits}: allowed are 2 to 8 (5 s)")

  def quick(self) -> "SpeechConfig":
    """A tenth of everything, to try things out."""
    counts = [field.name for field in dataclasses.fields(self) if field.name.endswith("clips")]
    counts.append("test_entries")
    return dataclasses.replace(self, **{name: getattr(self, name) // 10 for name in counts})


@dataclasses.dataclass(frozen=True)
class Turn:
  """What one speaker says: pieces that are spoken each by itself and joined with pauses."""

  speaker: Speaker
  pieces: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Label:
  """A task that a clip serves: the answer, and the question where the prompt has one."""

  task: str
  text: str
  question: str | None = None


@dataclasses.dataclass(frozen=True)
class Clip:
  """One recording to make; `seed` decides its acoustics."""

  key: str
  turns: tuple[Turn, ...]
  labels: tuple[Label, ...]
  seed: tuple[int, ...]
  limit_s: float = LIMIT_S


def plan(config: SpeechConfig, split: str) -> list[Clip]:
  """Decides every clip of a split ("train" or "test").

  Raises:
    ValueError: for an unknown split.
  """
  if split not in SPLITS:
    raise ValueError(f"split={split!r}: allowed are {SPLITS}")
  test = split == "test"
  counts = {
    _digits: config.test_digit_clips if test else config.digit_clips,
    _speakers: config.test_entries if test else config.speaker_clips,
    _arithmetic: config.test_entries if test else config.arithmetic_clips,
    _sentence: config.test_entries if test else config.sentence_clips,
  }
  clips = []
  for number, (make, count) in enumerate(counts.items()):
    rng = np.random.default_rng([config.seed, int(test), number])
    casting = Casting(rng, test=test, engines=config.engines)
    for index in range(count):
      clip = make(rng, casting, index, test=test, max_digits=config.max_digits)
      name = make.__name__.strip("_")
      seed = (config.seed, int(test), number, index)
      clips.append(dataclasses.replace(clip, key=f"{name}-{index:05d}", seed=seed))
  return clips


def _digits(rng, casting, index, *, test, max_digits) -> Clip:
  digits = draw_digits(rng, max_digits, held_out=test)
  words = tuple(WORDS[int(digit)] for digit in digits)
  text = " ".join(words)
  speaker = casting.draw()
  # Yes and no take turns, and the word asked for says nothing of the answer.
  absent = [word for word in WORDS if word not in words]
  asked = absent if index % 2 else words
  labels = (
    Label("asr", text),
    Label("count", NUMBERS[len(words)]),
    Label("keyword", "no" if index % 2 else "yes", asked[rng.integers(len(asked))]),
    *_sex(speaker),
  )
  if len(words) <= TRANSLATED:
    labels += (Label("translate", " ".join(SPANISH[word] for word in words)),)
  pieces = words if rng.random() < 0.5 else (text,)
  return Clip("", (Turn(speaker, pieces),), labels, (), DIGITS_LIMIT_S)


def _speakers(rng, casting, index, *, test, max_digits) -> Clip:
  """Three or four turns whatever the number of people, so that turns do not tell it."""
  people = casting.draw_people(1 + index % 3)
  order = (people * 4)[: rng.integers(3, 5)]
  rng.shuffle(order)
  turns = []
  for speaker in order:
    digits = draw_digits(rng, min(3, max_digits), held_out=test)
    turns.append(Turn(speaker, (" ".join(WORDS[int(digit)] for digit in digits),)))
  return Clip("", tuple(turns), (Label("speakers", NUMBERS[len(people)]),), ())


def _arithmetic(rng, casting, index, *, test, max_digits) -> Clip:
  problems = problems_of(test)
  results = sorted(problems)
  result = results[rng.integers(len(results))]
  problem = problems[result][rng.integers(len(problems[result]))]
  question = f"{OPENINGS[rng.integers(len(OPENINGS))]} {problem}"
  speaker = casting.draw()
  labels = [Label("arithmetic", NUMBERS[result])]
  if not test:
    labels += [Label("asr", question), *_sex(speaker)]
  return Clip("", (Turn(speaker, (question,)),), tuple(labels), ())


def _sentence(rng, casting, index, *, test, max_digits) -> Clip:
  sentences = sentences_of(test)
  # A stride that shares no factor with the list visits every sentence before one comes again.
  sentence = sentences[index * _stride(len(sentences)) % len(sentences)]
  speaker = casting.draw()
  labels = (Label("asr", sentence), *(_untrained(sentence) if test else _sex(speaker)))
  return Clip("", (Turn(speaker, (sentence,)),), labels, ())


def _untrained(sentence: str) -> tuple[Label, ...]:
  """Answers to instructions that training never gives, each sentence's own."""
  texts = json.loads((Path(__file__).parent / "untrained.json").read_text("utf-8"))
  return tuple(Label(task, text) for task, text in texts.get(sentence, {}).items())


def _sex(speaker: Speaker) -> tuple[Label, ...]:
  return (Label("sex", speaker.sex),) if speaker.sex else ()


@functools.cache
def problems_of(test: bool) -> dict[int, list[str]]:
  """The sums of a split by their result, 0 to 20; a fifth of all belongs to the test only.

  A sum and its mirror image ("three plus four", "four plus three") are in the same split.
  """
  found = collections.defaultdict(list)
  for a in range(21):
    for b in range(21):
      for sign, result in (("plus", a + b), ("minus", a - b), ("times", a * b)):
        if (max(a, b) > 10 and (sign != "minus" or b > 10)) or not 0 <= result <= 20:
          continue
        pair = (a, b) if sign == "minus" else (min(a, b), max(a, b))
        if (zlib.crc32(f"{sign} {pair}".encode()) % 5 == 0) == test:
          found[result].append(f"{NUMBERS[a]} {sign} {NUMBERS[b]}")
  return dict(found)


@functools.cache
def sentences_of(test: bool) -> list[str]:
  """The sentences of a split; about a tenth of all belongs to the test only."""
  lines = (Path(__file__).parent / "sentences.txt").read_text("utf-8").splitlines()
  return [line for line in lines if (zlib.crc32(line.encode()) % 10 == 0) == test]


def _stride(count: int) -> int:
  return next(n for n in range(int(count * 0.38) + 1, 2 * count + 2) if np.gcd(n, count) == 1)


def balanced(pairs: Iterable[tuple[Clip, Label]], limit: int) -> list[tuple[Clip, Label]]:
  """At most `limit` of the pairs; the answers take turns, as far as each of them is there."""
  by_answer: dict[str, list] = collections.defaultdict(list)
  for clip, label in pairs:
    by_answer[label.text].append((clip, label))
  rounds = itertools.zip_longest(*by_answer.values())
  return [pair for turn in rounds for pair in turn if pair is not None][:limit]
