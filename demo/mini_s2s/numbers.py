"""Spoken numbers and sums, as Asterisk composes them from its prompts, in five languages."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping

import numpy as np

NUMBERS = range(100)
LONGEST = 2  # numbers in a sequence
LARGEST = 12  # operand of a sum
SIGNS = {1: "letters/plus", -1: "digits/minus"}
HELD_OUT = 10  # one of this many combinations is for the test


def prompts_of(number: int, language: str, recorded: Callable[[str], bool]) -> list[str]:
  """Return the names of the prompts that say a number, -99 to 99.

  Args:
    number: the number.
    language: code of the language.
    recorded: whether the language has a prompt of this name.
  """
  if number < 0:
    return [SIGNS[-1], *prompts_of(-number, language, recorded)]
  if recorded(f"digits/{number}"):
    return [f"digits/{number}"]
  tens, ones = number - number % 10, number % 10
  joint: list[str] = []
  if language == "fr":
    if tens in (70, 90):  # soixante-douze, quatre-vingt-douze
      tens, ones = tens - 10, ones + 10
    joint = ["vm-and"] if ones % 10 == 1 and tens < 80 else []
  elif language == "es":
    joint = ["digits/and"]
  return [f"digits/{tens}", *joint, f"digits/{ones}"]


@dataclasses.dataclass(frozen=True)
class Utterance:
  """What is said: numbers, each with the sign that is said before it (0: none)."""

  numbers: tuple[int, ...]
  signs: tuple[int, ...]

  @property
  def name(self) -> str:
    """A word of ASCII characters that identifies the utterance."""
    marks = {0: "", 1: "p", -1: "m"}
    return "_".join(
      f"{marks[sign]}{'n' if n < 0 else ''}{abs(n)}"
      for n, sign in zip(self.numbers, self.signs, strict=True)
    )

  @property
  def held_out(self) -> bool:
    """Whether this combination is for the test: a tenth of all those of two or more numbers."""
    return len(self.numbers) > 1 and zlib.crc32(self.name.encode()) % HELD_OUT == 0

  def groups(self, language: str, recorded: Callable[[str], bool]) -> list[list[str]]:
    """Return the names of the prompts, one list for each number and each sign between numbers."""
    said = []
    for number, sign in zip(self.numbers, self.signs, strict=True):
      said += [[SIGNS[sign]]] if sign else []
      said.append(prompts_of(number, language, recorded))
    return said

  def text(self, language: str, texts: Mapping[str, str]) -> str:
    """Return the words in lower case: "forty two, seven", "three plus eight".

    Args:
      language: code of the language.
      texts: transcripts of its prompts, by name.
    """
    words = ""
    for number, sign in zip(self.numbers, self.signs, strict=True):
      words += f" {texts[SIGNS[sign]]} " if sign else ", " if words else ""
      words += " ".join(texts[name] for name in prompts_of(number, language, texts.__contains__))
    return words.lower()


def sequence(*numbers: int) -> Utterance:
  """Numbers one after another."""
  return Utterance(numbers, (0,) * len(numbers))


def sums() -> dict[Utterance, Utterance]:
  """Return all spoken sums and differences of numbers up to LARGEST, and their results."""
  operands = range(LARGEST + 1)
  return {
    Utterance((a, b), (0, sign)): sequence(a + sign * b)
    for a in operands
    for b in operands
    for sign in SIGNS
  }


def sequences(count: int, *, held_out: bool, seed: int) -> list[Utterance]:
  """Draw different sequences of 1 to LONGEST numbers (held out: of 2 or more).

  In training, all single numbers come first, so that each is there.
  """
  rng = np.random.default_rng([seed, int(held_out)])
  found = {} if held_out else {sequence(n): None for n in NUMBERS}
  while len(found) < count:
    length = int(rng.integers(2, LONGEST + 1))
    drawn = sequence(*map(int, rng.choice(NUMBERS, length)))
    if drawn.held_out == held_out:
      found[drawn] = None
  return [*found][:count]
