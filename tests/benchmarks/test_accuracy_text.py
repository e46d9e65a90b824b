"""The comparison of rounded weights on text, at tiny size."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.accuracy_text import CASES, Sizes, measure, perplexity, read_rows
from mooer_jax.text.tokenizer import Tokenizer
from tests import tiny


@pytest.mark.nightly
def test_each_rounding_is_compared_with_float32():
  tokenizer = Tokenizer.from_characters("0123456789 ", ("<|end|>",), eos="<|end|>")
  config = tiny.model_config()
  decoder = dataclasses.replace(config.decoder, vocab_size=16)
  config = dataclasses.replace(config, decoder=decoder)
  sizes = Sizes(rows=9, tokens=7, prompt=3, new=4)
  tokens_BS = read_rows("0123 45 6789 " * 5, tokenizer, sizes)
  params = jax.tree.map(jax.numpy.asarray, tiny.init(config))
  rows = measure(params, config, tokens_BS, tokenizer, sizes)
  assert [row["name"] for row in rows] == [name for name, *_ in CASES]
  exact, *others = rows
  assert exact["mean_kl"] == 0 and exact["agreement"] == 1
  assert exact["generated"] == {"same_tokens": 1, "same_rows": 1, "word_error_rate": 0}
  # A rounding that changes nothing was not applied.
  assert all(0 < row["mean_kl"] < 0.1 for row in others)
  assert len({row["mean_kl"] for row in others}) == len(others)


def test_perplexity_is_that_of_a_known_distribution():
  probs_AV = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
  logits_AV = (np.log(probs_AV) + 3).astype(np.float32)
  found = perplexity(logits_AV, np.array([0, 2]))
  np.testing.assert_allclose(found, 8**0.5, rtol=8 * np.finfo(np.float32).eps)


def test_a_short_text_is_refused():
  tokenizer = Tokenizer.from_characters("01", ("<|end|>",), eos="<|end|>")
  with pytest.raises(ValueError, match="4 tokens; 1536 are needed"):
    read_rows("0101", tokenizer, Sizes())
