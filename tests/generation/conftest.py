"""A tiny random model whose greedy answers vary."""

import jax
import numpy as np
import pytest

from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.speech_llm import Batch


@pytest.fixture(scope="session")
def config():
  return SpeechLLMConfig(
    encoders=(SANMConfig(hidden_size=32, layers=2, heads=2, intermediate_size=48),),
    connector=LinearConfig(hidden_size=24),
    decoder=LLMConfig(
      vocab_size=40,
      hidden_size=32,
      layers=2,
      heads=4,
      kv_heads=2,
      head_dim=8,
      intermediate_size=48,
      tie_word_embeddings=True,
    ),
  )


@pytest.fixture(scope="session")
def params(config):
  params = jax.jit(lambda key: speech_llm.init(key, config))(jax.random.key(0))
  # Larger weights than at the start of training: with those every answer is one token repeated.
  params["decoder"] = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params["decoder"])
  return params


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
