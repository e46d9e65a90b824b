"""A tiny random model whose greedy answers vary."""

import numpy as np
import pytest

from mooer_jax.speech_llm import Batch
from tests import tiny


@pytest.fixture(scope="session")
def config():
  return tiny.answering_config(vocab_size=40)


@pytest.fixture(scope="session")
def params(config):
  return tiny.answering_params(config)


@pytest.fixture
def batch():
  """Makes a batch of random clips with the given numbers of frames."""

  def make(frames, *, padded_to=20, prompt=3, seed=0):
    rng = np.random.default_rng(seed)
    features = np.zeros((len(frames), padded_to, 560), np.float32)
    for row, count in enumerate(frames):
      features[row, :count] = np.random.default_rng([seed, count]).normal(size=(count, 560))
    after = rng.integers(0, 40, (1, prompt)).astype(np.int32)
    return Batch(
      features=(features,),
      frames=(np.asarray(frames, np.int32),),
      prefix_BS=np.zeros((len(frames), 0), np.int32),
      suffix_BS=np.tile(after, (len(frames), 1)),
      labels_BS=np.full((len(frames), 1), -1, np.int32),
    )

  return make
