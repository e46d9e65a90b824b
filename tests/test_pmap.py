"""The pieces of both models under jax.pmap, a clip on each of 8 devices, against the clip alone."""

import operator

import jax
import numpy as np
import pytest

from mooer_jax import speech_llm
from mooer_jax.generation import GenerationConfig, generate
from mooer_jax.speech_llm import Batch
from tests import tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

# The longest sums, over a frame's features or an MLP, in at most nine layers.
TERMS = 9 * 64
DEVICES = 8  # faked by tests/conftest.py on a CPU
MODELS = {"mooer": (tiny.model_config(), 14), "salmonn": (tiny.salmonn_config(), 64)}


def batch_of(config, frames, seed=0) -> Batch:
  """Clips of 8 lengths, prompts before and behind them, answers; rows first."""
  rng = np.random.default_rng(seed)

  def tokens(n):
    return rng.integers(0, config.decoder.vocab_size, (DEVICES, n)).astype(np.int32)

  return Batch(
    features=tuple(
      rng.normal(size=(DEVICES, frames, encoder.input_width)).astype(np.float32)
      for encoder in config.encoders
    ),
    frames=(frames - np.arange(DEVICES, dtype=np.int32) * (frames // 10),) * len(config.encoders),
    prefix_BS=tokens(2),
    suffix_BS=tokens(4),
    labels_BS=tokens(3),
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

  def each_alone(params, batch):
    return [alone(params, jax.tree.map(operator.itemgetter(n), batch)) for n in range(DEVICES)]

  streams, (_, valid), _ = got
  assert streams.keys() == {encoder.kind for encoder in config.encoders}
  assert valid.any(-1).all()
  bound = rounding(TERMS, condition(each_alone, params, rows))
  expected = each_alone(params, rows)
  of_each = [jax.tree.map(operator.itemgetter(n), got) for n in range(DEVICES)]
  assert_within(of_each, expected, bound)
  one_frame_less = batch.replace(frames=tuple(frames_B - 1 for frames_B in batch.frames))
  shorter = each_alone(params, jax.tree.map(lambda x: x[:, None], one_frame_less))
  for n in range(DEVICES):
    with exceeds_the_bound():
      assert_within(of_each[n][2], shorter[n][2], bound[n][2])

  together = jax.jit(lambda p, b: speech_llm.loss(p, b, config)[1]["loss_sum"])
  bound = rounding(TERMS, condition(together, params, batch))
  assert_within(total, np.full(DEVICES, together(params, batch)), bound)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_device_generates_what_its_clip_gives_alone(num_beams):
  config, frames = MODELS["mooer"]
  params = tiny.init(config)
  rows = jax.tree.map(lambda x: x[:, None], batch_of(config, frames))
  options = GenerationConfig(max_new_tokens=5, num_beams=num_beams, eos_token_id=(3,))

  def on_a_device(params, row):
    return generate(params, row, config, options)

  mapped = jax.pmap(on_a_device, in_axes=(None, 0), devices=jax.devices()[:DEVICES])
  got = jax.device_get(mapped(params, rows))
  for n in range(DEVICES):
    alone = generate(params, jax.tree.map(operator.itemgetter(n), rows), config, options)
    np.testing.assert_array_equal(got.tokens_BRS[n], alone.tokens_BRS)
    np.testing.assert_array_equal(got.lengths_BR[n], alone.lengths_BR)
  assert len({tokens_BS.tobytes() for tokens_BS in got.tokens_BRS[:, :, 0]}) > 1
