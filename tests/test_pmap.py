"""The pieces of both models under jax.pmap, a clip on each of 8 devices, against the clip alone."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import speech_llm
from mooer_jax.speech_llm import Batch
from tests import tiny

DEVICES = 8  # faked by tests/conftest.py on a CPU
MODELS = {"mooer": (tiny.model_config(), 14), "salmonn": (tiny.salmonn_config(), 64)}


def batch_of(config, frames) -> Batch:
  """Clips of 8 lengths, prompts before and behind them, answers; rows first."""
  rng = np.random.default_rng(0)

  def tokens(n):
    return rng.integers(0, config.decoder.vocab, (DEVICES, n)).astype(np.int32)

  return Batch(
    features=tuple(
      rng.normal(size=(DEVICES, frames, encoder.input_width)).astype(np.float32)
      for encoder in config.encoders
    ),
    frames=(frames - np.arange(DEVICES, dtype=np.int32) * (frames // 10),) * len(config.encoders),
    before_BS=tokens(2),
    after_BS=tokens(4),
    answer_BS=tokens(3),
  )


@pytest.mark.parametrize("name", MODELS)
def test_a_device_gives_what_its_clip_gives_alone(name):
  config, frames = MODELS[name]
  params, batch = tiny.init(config), batch_of(config, frames)
  rows = jax.tree.map(lambda x: x[:, None], batch)

  def pieces(params, row):
    streams = speech_llm.encode_each(params, row, config)
    speech = speech_llm.connect(params, *speech_llm.join(params, streams, config), config)
    return streams, speech, speech_llm.answer_logits(params, row, config)

  def on_a_device(params, row):
    _, sums = speech_llm.loss(params, row, config)
    return pieces(params, row), jax.lax.psum(sums["loss_sum"], "devices")

  assert jax.device_count() >= DEVICES
  devices = jax.devices()[:DEVICES]
  mapped = jax.pmap(on_a_device, "devices", in_axes=(None, 0), devices=devices)
  got, total = mapped(params, rows)
  assert len({shard.device for shard in got[2].addressable_shards}) == DEVICES
  alone = jax.jit(pieces)
  expected = [alone(params, jax.tree.map(operator.itemgetter(n), rows)) for n in range(DEVICES)]
  expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
  # The same sums in another program; values are of size 1 to 10.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)
  streams, (_, valid), _ = got
  assert streams.keys() == {encoder.kind for encoder in config.encoders}
  assert valid.any(-1).all()
  _, sums = jax.jit(lambda p, b: speech_llm.loss(p, b, config))(params, batch)
  np.testing.assert_allclose(total, np.full(DEVICES, sums["loss_sum"]), rtol=1e-5)
