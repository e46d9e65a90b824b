"""The search alone against transformers' generate: both take their logits from the same table."""

import collections

import numpy as np
import pytest

from tests.generation import reference
from tests.generation.table_search import table_answers

PROMPT, VOCAB, LENGTH, UTTERANCES = 3, 48, 12, 8
pytestmark = pytest.mark.filterwarnings("ignore:Passing")  # that penalties skip the prompt: meant


def compare(seeds):
  """Runs both sides on UTTERANCES tables a seed.

  Returns (cases compared, mismatches, cases left out, share of answers that each option changes).
  Left out, before our side is looked at, are cases in which transformers itself answers otherwise
  when the logits move by 1e-5: there two candidates are equal but for rounding.
  """
  cases, mismatches, ties = 0, [], []
  changed, asked = collections.Counter(), collections.Counter()
  for seed in seeds:
    rng = np.random.default_rng(seed)
    options = reference.random_options(
      rng, beams=(1, 2, 4, 8)[seed % 4], vocab=VOCAB, max_new_tokens=LENGTH, prompt=PROMPT
    )
    table = reference.random_table(
      rng, UTTERANCES, vocab=VOCAB, length=LENGTH, eos_ids=options.eos_ids, eos_boost=2.5
    )
    expected, scores = reference.table_answers(table, options, PROMPT)
    noise = 1e-5 * rng.normal(size=(2, *table.shape)).astype(np.float32)
    shaken = [reference.table_answers(table + x, options, PROMPT)[0] for x in noise]
    found, found_scores = table_answers(table, options, PROMPT)
    for row in range(UTTERANCES):
      case = seed, row, options
      if any(other[row] != expected[row] for other in shaken):
        ties.append(case)
        continue
      cases += 1
      if found[row] != expected[row]:
        mismatches.append(case)
    # Sums of 12 log-probabilities of size 5 in float32.
    np.testing.assert_allclose(found_scores, scores, rtol=1e-5, atol=1e-5)
    for name, other in reference.without(options).items():
      plain, _ = reference.table_answers(table, other, PROMPT)
      changed[name] += sum(a != b for a, b in zip(plain, expected, strict=True))
      asked[name] += UTTERANCES
  return cases, mismatches, ties, {name: changed[name] / count for name, count in asked.items()}


def check(seeds, least):
  cases, mismatches, ties, shares = compare(seeds)
  print(f"{cases} cases, left out as ties {len(ties)}, answers changed by option: {shares}")
  assert mismatches == []
  assert cases >= least and len(ties) <= 0.02 * cases
  # Each option must matter, or equality shows nothing about it.
  assert len(shares) == 6 and min(shares.values()) >= 0.1, shares


def test_search_equals_transformers():
  check(range(8), 60)


@pytest.mark.slow
@pytest.mark.nightly
def test_search_equals_transformers_on_many_cases():
  check(range(100, 200), 750)
