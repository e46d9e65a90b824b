"""ROUGE-L of generated descriptions."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TOKEN = re.compile(r"[a-z0-9]+")


def rouge_l(reference: str, hypothesis: str) -> float:
  """F-measure of the longest common subsequence of words, 0 to 1; 0 if either has no words.

  Words are runs of a-z and 0-9 in lower case, without stemming; precision and recall weigh the
  same.

  Source: Lin (2004), "ROUGE: a package for automatic evaluation of summaries"; words and weights
  as in Google's package rouge-score, to which it is equal.
  """
  wanted, given = _TOKEN.findall(reference.lower()), _TOKEN.findall(hypothesis.lower())
  common = common_length(wanted, given)
  return 2 * common / (len(wanted) + len(given)) if common else 0.0


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
  """Length of the longest common subsequence, in O(len(first) * len(second)) time."""
  best = [0] * (len(second) + 1)
  for token in first:
    before = 0  # the entry to the left, one row up
    for j, other in enumerate(second, start=1):
      above = best[j]
      best[j] = before + 1 if token == other else max(above, best[j - 1])
      before = above
  return best[-1]
