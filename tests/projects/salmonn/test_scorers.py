import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from mooer_jax.projects.salmonn.scorers import rouge_l


def test_by_hand():
  # "the cat on mat" is common: recall 4 / 6, precision 4 / 5.
  assert rouge_l("The cat sat on the mat.", "the cat is on mat") == pytest.approx(8 / 11)
  assert rouge_l("the same", "The same!") == 1.0
  assert rouge_l("", "words") == rouge_l("words", "") == rouge_l("a", "b") == 0.0
  assert rouge_l("a b c b d a b", "b d c a b a") == pytest.approx(2 * 4 / 13)


def test_it_equals_googles_package():
  scorer = RougeScorer(["rougeL"])
  random.seed(0)
  vocabulary = "A slow, piano-led 80s ballad isn't café loud: strings; strings".split()
  for _ in range(200):
    pair = [" ".join(random.choices(vocabulary, k=random.randrange(12))) for _ in range(2)]
    assert rouge_l(*pair) == pytest.approx(scorer.score(*pair)["rougeL"].fmeasure)
