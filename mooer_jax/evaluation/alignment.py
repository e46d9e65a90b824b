"""Edit distance between two token sequences, and its alignment."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

# (reference token, hypothesis token); None on the right is a deletion, on the left an insertion.
Pair = tuple[str | None, str | None]


@dataclasses.dataclass(frozen=True)
class Counts:
  """Numbers of tokens by kind of edit; the sum over utterances is that of the corpus."""

  correct: int = 0
  substitutions: int = 0
  deletions: int = 0
  insertions: int = 0

  def __add__(self, other: "Counts") -> "Counts":
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
    return Counts(*map(sum, pairs))

  @property
  def reference(self) -> int:
    """Tokens of the reference."""
    return self.correct + self.substitutions + self.deletions

  @property
  def hypothesis(self) -> int:
    """Tokens of the hypothesis."""
    return self.correct + self.substitutions + self.insertions

  @property
  def errors(self) -> int:
    return self.substitutions + self.deletions + self.insertions

  @property
  def rate(self) -> float:
    """Errors per reference token (1.0 = 100 %, may exceed it).

    Without reference tokens: 0 if nothing was inserted, else infinity.
    """
    if self.reference:
      return self.errors / self.reference
    return float("inf") if self.errors else 0.0


# rapidfuzz chooses another of the best alignments, and so another split into kinds of errors.
def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Pair]:
  """Aligns R and H tokens with the fewest errors, in O(R * H) time and 4 * R * H bytes.

  Of several best alignments it takes the one that, read from the end, deletes before it inserts
  and inserts before it pairs; MooER's script does the same, so the split into kinds agrees too.
  """
  cost = _cost_table(reference, hypothesis)
  pairs: list[Pair] = []
  r, h = len(reference), len(hypothesis)
  while r or h:
    if r and cost[r - 1, h] + 1 == cost[r, h]:
      r -= 1
      pairs.append((reference[r], None))
    elif h and cost[r, h - 1] + 1 == cost[r, h]:
      h -= 1
      pairs.append((None, hypothesis[h]))
    else:
      r, h = r - 1, h - 1
      pairs.append((reference[r], hypothesis[h]))
  return pairs[::-1]


def mark(reference: str | None, hypothesis: str | None) -> str:
  """The kind of a pair: "D" deletion, "I" insertion, "S" substitution, " " correct."""
  if hypothesis is None:
    return "D"
  if reference is None:
    return "I"
  return " " if reference == hypothesis else "S"


def count(pairs: Sequence[Pair]) -> Counts:
  """Counts the kinds of pairs of an alignment."""
  marks = Counter(mark(*pair) for pair in pairs)
  return Counts(marks[" "], marks["S"], marks["D"], marks["I"])


def _cost_table(reference, hypothesis):
  """int32 [R + 1, H + 1]: the fewest errors between every two prefixes."""
  numbers: dict[str, int] = {}
  r_R = [numbers.setdefault(token, len(numbers)) for token in reference]
  h_H = np.array([numbers.setdefault(token, len(numbers)) for token in hypothesis], np.int32)
  steps = np.arange(len(h_H) + 1, dtype=np.int32)
  cost = np.empty((len(r_R) + 1, len(h_H) + 1), np.int32)
  cost[0] = steps
  for i, token in enumerate(r_R):
    row = cost[i] + 1
    row[1:] = np.minimum(row[1:], cost[i, :-1] + (h_H != token))
    # Insertions run along the row: cost[j] = min over k <= j of row[k] + (j - k).
    cost[i + 1] = np.minimum.accumulate(row - steps) + steps
  return cost
