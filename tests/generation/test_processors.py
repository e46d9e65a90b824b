"""What is done to scores, against transformers' processors; draws against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from mooer_jax.generation import GenerationConfig, processors, search
from tests.numerics import assert_within, exceeds_the_bound, rounding

VOCAB, SLOTS = 50, 9


def random_scores(seed=0, rows=20):
  return 2 * np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32)


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("top_k", [0, 1, 5, 49, 50, 80])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.1, 1e-6])
def test_restrict_keeps_what_transformers_keeps(top_k, top_p, keep):
  scores = random_scores()
  expected = torch.tensor(scores)
  if top_k:
    warp = logits_process.TopKLogitsWarper(top_k, min_tokens_to_keep=keep)
    expected = warp(None, expected)
  if top_p < 1:
    expected = logits_process.TopPLogitsWarper(top_p, min_tokens_to_keep=keep)(None, expected)
  found = processors.apply_top_k_top_p(jnp.asarray(scores), top_k=top_k, top_p=top_p, keep=keep)
  np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("step", [0, 1, 2, 5, SLOTS])
@pytest.mark.parametrize(
  "values, theirs",
  [
    ({"sequence_bias": ((3, -0.2), (7, 4.0))}, ("SequenceBias", {(3,): -0.2, (7,): 4.0})),
    ({"repetition_penalty": 1.7}, ("RepetitionPenalty", 1.7)),
    ({"repetition_penalty": 0.6}, ("RepetitionPenalty", 0.6)),
    ({"no_repeat_ngram_size": 1}, ("NoRepeatNGram", 1)),
    ({"no_repeat_ngram_size": 2}, ("NoRepeatNGram", 2)),
    ({"no_repeat_ngram_size": 4}, ("NoRepeatNGram", 4)),
    ({"no_repeat_ngram_size": SLOTS + 1}, ("NoRepeatNGram", SLOTS + 1)),
    ({"min_new_tokens": 2}, ("MinLength", 2, torch.tensor([3, 7]))),
  ],
  ids=str,
)
def test_each_option_equals_transformers_processor(values, theirs, step):
  assert_equal_to_processor(values, theirs, step)


@pytest.mark.parametrize(
  "values, theirs",
  [
    ({"sequence_bias": ((3, -0.2001), (7, 4.0))}, ("SequenceBias", {(3,): -0.2, (7,): 4.0})),
    ({"repetition_penalty": 1.7001}, ("RepetitionPenalty", 1.7)),
  ],
  ids=str,
)
def test_an_option_that_is_a_little_off_does_not_equal_it(values, theirs):
  with exceeds_the_bound():
    assert_equal_to_processor(values, theirs, step=5)


def assert_equal_to_processor(values, theirs, step):
  scores = random_scores()
  tokens = np.random.default_rng(1).integers(0, 3, (len(scores), SLOTS))  # few, so they repeat
  tokens[:, step:] = -1
  options = GenerationConfig(eos_token_id=(3, 7), **values)
  min_new = processors.min_new_tokens(jnp.zeros(len(scores), jnp.int32), options)
  found = processors.process(
    jnp.asarray(scores),
    jnp.asarray(tokens, jnp.int32),
    jnp.int32(step),
    min_new_X=min_new,
    options=options,
  )
  name, *arguments = theirs
  processor = getattr(logits_process, f"{name}LogitsProcessor")(*arguments)
  expected = processor(torch.tensor(tokens[:, :step]), torch.tensor(scores))
  # One rounding; XLA may divide by a constant as it multiplies by the reciprocal, which is two.
  assert_within(found, expected.numpy(), rounding(2, np.abs(expected.numpy())))


def test_min_length_counts_the_prompt_and_min_new_tokens_does_not():
  prompt_B = jnp.array([3, 10], jnp.int32)
  for values, expected in (
    ({}, [0, 0]),
    ({"min_length": 8}, [5, 0]),
    ({"min_length": 8, "min_new_tokens": 2}, [2, 2]),
    ({"min_length": 8, "min_new_tokens": 0}, [0, 0]),
  ):
    options = GenerationConfig(**values)
    assert processors.min_new_tokens(prompt_B, options).tolist() == expected


def test_a_token_outside_of_the_vocabulary_is_refused():
  for values in ({"eos_token_id": (50,)}, {"sequence_bias": ((50, 1.0),)}):
    with pytest.raises(ValueError, match="token 50; the vocabulary has 50"):
      processors.process(
        jnp.zeros((1, VOCAB)),
        jnp.zeros((1, 2), jnp.int32),
        0,
        min_new_X=jnp.zeros(1, jnp.int32),
        options=GenerationConfig(**values),
      )


def first_tokens(logits_BV, options, keys_B=None):
  state = search.start(len(logits_BV), options)
  min_new_B = jnp.zeros(len(logits_BV), jnp.int32)
  logits_B1V = jnp.asarray(logits_BV)[:, None]
  state = search.advance(state, logits_B1V, options, min_new_B=min_new_B, keys_B=keys_B)
  return np.asarray(state.running.tokens_BRS[:, 0, 0])


def test_draws_follow_the_distribution():
  logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
  draws = 20_000
  options = GenerationConfig(max_new_tokens=1, do_sample=True, temperature=2.0, top_k=3)
  keys = jax.random.split(jax.random.key(0), draws)
  tokens = first_tokens(np.tile(logits, (draws, 1)), options, keys)
  found = np.bincount(tokens, minlength=4) / draws
  expected = np.array([0.5, 0.3, 0.15, 0]) ** 0.5
  expected /= expected.sum()
  # Five standard errors of a share.
  assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_greedy_takes_the_first_of_equals():
  assert first_tokens([[0.0, 1.0, 1.0]], GenerationConfig(max_new_tokens=1)).tolist() == [1]


@pytest.mark.parametrize(
  "values, message",
  [
    ({"num_beams": 0}, "num_beams=0"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 .* num_beams=2"),
    ({"num_return_sequences": 2}, "do_sample=True"),
    ({"early_stopping": "always"}, "early_stopping='always'"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ({"sequence_bias": ((3, 1.0), (3, 2.0))}, "each token once"),
    ({"min_new_tokens": -1}, "min_new_tokens=-1"),
  ],
)
def test_impossible_options_are_refused_by_name(values, message):
  with pytest.raises(ValueError, match=message):
    GenerationConfig(**values)
