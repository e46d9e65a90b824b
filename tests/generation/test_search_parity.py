"""The search alone against transformers' generate: both take their logits from the same table."""

import collections
import dataclasses
import functools

import numpy as np
import pytest

from mooer_jax.generation import GenerationConfig
from tests.generation import reference
from tests.generation.table_search import table_answers
from tests.numerics import assert_within, exceeds_the_bound, rounding

PROMPT, VOCAB, LENGTH, UTTERANCES = 3, 48, 12, 8
pytestmark = pytest.mark.filterwarnings("ignore:Passing")  # that penalties skip the prompt: meant


def tie_free(rng, options):
  """Tables on which transformers' answer is no matter of rounding.

  Those on which it answers otherwise when the logits move by a third of what rounding may change
  hold two candidates that are equal but for rounding; they are drawn again, before our side is
  looked at.

  Returns (table, transformers' tokens, its scores, how many were drawn again).
  """
  draw = functools.partial(
    reference.random_table,
    rng,
    vocab=VOCAB,
    length=LENGTH,
    eos_token_id=options.eos_token_id,
    eos_boost=2.5,
  )
  table, again = draw(UTTERANCES), 0
  while True:
    noise = rounding(LENGTH, np.abs(table).max()) / 3 * rng.normal(size=(2, *table.shape))
    tables = np.concatenate([table, *(table + noise.astype(np.float32))])
    answers, scores = reference.table_answers(tables, options, PROMPT)
    expected, *shaken = (answers[i : i + UTTERANCES] for i in range(0, len(answers), UTTERANCES))
    ties = [
      row for row in range(UTTERANCES) if any(other[row] != expected[row] for other in shaken)
    ]
    if not ties:
      return table, expected, scores[:UTTERANCES], again
    table[ties] = draw(len(ties))
    again += len(ties)


def assert_scores_within(found, expected, table, options):
  """Compares scores, which are sums of LENGTH log-probabilities of these logits."""
  by_length = max(1, LENGTH**-options.length_penalty)
  bound = rounding(LENGTH, np.abs(expected) + np.abs(table).max() * by_length)
  assert_within(np.array(found), np.array(expected), bound)


def compare(seeds):
  """Runs both sides on UTTERANCES tables a seed.

  Returns (cases, mismatches, tables drawn again, share of answers that each option changes).
  """
  cases, mismatches, redrawn = 0, [], 0
  changed, asked = collections.Counter(), collections.Counter()
  for seed in seeds:
    rng = np.random.default_rng(seed)
    options = reference.random_options(
      rng, beams=(1, 2, 4, 8)[seed % 4], vocab=VOCAB, max_new_tokens=LENGTH, prompt=PROMPT
    )
    table, expected, scores, again = tie_free(rng, options)
    redrawn += again
    found, found_scores = table_answers(table, options, PROMPT)
    cases += UTTERANCES
    for row in range(UTTERANCES):
      if found[row] != expected[row]:
        mismatches.append((seed, row, options))
    assert_scores_within(found_scores, scores, table, options)
    for name, other in reference.without(options).items():
      plain, _ = reference.table_answers(table, other, PROMPT)
      changed[name] += sum(a != b for a, b in zip(plain, expected, strict=True))
      asked[name] += UTTERANCES
  return cases, mismatches, redrawn, {name: changed[name] / count for name, count in asked.items()}


def check(seeds):
  cases, mismatches, redrawn, shares = compare(seeds)
  print(f"{cases} cases, drawn again for ties {redrawn}, answers changed by option: {shares}")
  assert mismatches == []
  assert cases == len(seeds) * UTTERANCES and redrawn <= 0.01 * cases
  # Each option must matter, or equality shows nothing about it.
  assert len(shares) == 6 and min(shares.values()) >= 0.1, shares


def test_search_equals_transformers():
  check(range(32))


@pytest.mark.parametrize(
  "fault", [{"length_penalty": 0.801}, {"repetition_penalty": 1.21}], ids=str
)
def test_scores_of_a_search_that_is_a_little_off_exceed_the_bound(fault):
  options = GenerationConfig(
    max_new_tokens=LENGTH,
    eos_token_id=(5,),
    num_beams=4,
    length_penalty=0.8,
    repetition_penalty=1.2,
  )
  table, expected, scores, _ = tie_free(np.random.default_rng(0), options)
  found, found_scores = table_answers(table, options, PROMPT)
  assert found == expected
  assert_scores_within(found_scores, scores, table, options)
  _, found_scores = table_answers(table, dataclasses.replace(options, **fault), PROMPT)
  with exceeds_the_bound():
    assert_scores_within(found_scores, scores, table, options)


@pytest.mark.slow
@pytest.mark.nightly
def test_search_equals_transformers_on_many_cases():
  check(range(100, 200))
