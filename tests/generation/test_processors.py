"""The choice of a token, against transformers' logits processors and against its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from mooer_jax.generation.processors import restrict


@pytest.mark.parametrize("top_k", [0, 1, 5, 49, 50, 80])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.1, 1e-6])
def test_restrict_keeps_what_transformers_keeps(top_k, top_p):
  logits = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32) * 2
  expected = torch.tensor(logits)
  if top_k:
    expected = TopKLogitsWarper(top_k)(None, expected)
  if top_p < 1:
    expected = TopPLogitsWarper(top_p)(None, expected)
  found = restrict(jnp.asarray(logits), top_k=top_k, top_p=top_p)
  np.testing.assert_array_equal(found, expected.numpy())


def test_draws_follow_the_distribution():
  logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
  draws = 20_000
  options = Sampling(do_sample=True, temperature=2.0, top_k=3)
  keys = jax.random.split(jax.random.key(0), draws)
  tokens = choose(jnp.tile(logits, (draws, 1)), options, keys)
  found = np.bincount(np.asarray(tokens), minlength=4) / draws
  expected = np.array([0.5, 0.3, 0.15, 0]) ** 0.5
  expected /= expected.sum()
  # Five standard errors of a share.
  assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_greedy_takes_the_first_of_equals():
  logits = jnp.asarray([[0.0, 1.0, 1.0]])
  keys = jax.random.split(jax.random.key(0), 1)
  assert choose(logits, Sampling(), keys).tolist() == [1]
