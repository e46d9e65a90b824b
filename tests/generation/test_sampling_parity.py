"""Sampling, with and without beams, draws from the same distribution as transformers' generate."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
import scipy.stats
import torch

from mooer_jax.generation import GenerationConfig
from tests.generation import reference
from tests.generation.table_search import table_answers

VOCAB, DRAWS, PROMPT = 8, 4000, 3
BEAMS = GenerationConfig(
  max_new_tokens=4,
  eos_token_id=(1,),
  do_sample=True,
  num_beams=2,
  num_return_sequences=2,
  temperature=0.7,
  top_k=6,
  top_p=0.95,
  length_penalty=0.5,
)
# Seeds are fixed, so these tests pass or fail for good; a right program fails one draw of seeds in
# a thousand a case.
LEAST_P = 1e-3


def same_distribution(left, right) -> float:
  """p-value of the chi-squared test that two lists of outcomes follow one distribution."""
  counts = [collections.Counter(map(str, outcomes)) for outcomes in (left, right)]
  totals = counts[0] + counts[1]
  common = [outcome for outcome, count in totals.items() if count >= 20]
  table = [[c[outcome] for outcome in common] for c in counts]
  table = np.array([[*row, DRAWS - sum(row)] for row in table])
  assert len(common) >= 5  # else it tests little
  return scipy.stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue


def table_for(options):
  """DRAWS times the same table, so that the utterances of a batch are draws."""
  [table] = reference.random_table(
    np.random.default_rng(0),
    1,
    vocab=VOCAB,
    length=options.max_new_tokens,
    eos_token_id=options.eos_token_id,
    eos_boost=0.5,
  )
  return np.broadcast_to(0.5 * table, (DRAWS, *table.shape))


@functools.cache
def our_draws(options):
  """DRAWS times all answers that one utterance gets back."""
  return table_answers(table_for(options), options, PROMPT, jax.random.key(0))[0]


@functools.cache
def their_draws(options):
  torch.manual_seed(0)
  return reference.table_answers(table_for(options), options, PROMPT)[0]


@pytest.mark.parametrize(
  "options",
  [
    BEAMS,
    dataclasses.replace(BEAMS, early_stopping=True, num_beams=3, top_k=0, top_p=1.0),
    # Of so small a nucleus, beams stand on candidates of no probability at first.
    dataclasses.replace(BEAMS, num_beams=4, temperature=1.5, top_p=0.5, num_return_sequences=1),
    dataclasses.replace(BEAMS, num_beams=1, num_return_sequences=1, top_p=0.7),
    dataclasses.replace(BEAMS, num_beams=1, num_return_sequences=2, max_new_tokens=2),
  ],
  ids=["beams", "stops early", "small nucleus", "one draw", "two draws"],
)
def test_draws_follow_transformers(options):
  found, expected = our_draws(options), their_draws(options)
  for rank in range(options.num_return_sequences):
    p = same_distribution([o[rank] for o in found], [o[rank] for o in expected])
    assert p > LEAST_P, (rank, p)
  if options.num_beams == 1 and options.num_return_sequences > 1:
    assert same_distribution(found, expected) > LEAST_P  # so the draws are independent


@pytest.mark.parametrize(
  "wrong",
  [{"temperature": 0.8}, {"top_k": 5}, {"top_p": 0.85}],
  ids=str,
)
def test_the_comparison_sees_a_wrong_option(wrong):
  found, expected = our_draws(dataclasses.replace(BEAMS, **wrong)), their_draws(BEAMS)
  ps = [same_distribution([o[r] for o in found], [o[r] for o in expected]) for r in range(2)]
  assert min(ps) < LEAST_P / 1000, ps
