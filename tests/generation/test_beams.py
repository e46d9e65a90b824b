"""Properties of beam search with a model: one prompt cache, hidden states, padding, scores."""

import dataclasses

import jax
import numpy as np
import pytest

from mooer_jax import speech_llm
from mooer_jax.generation import GenerationOptions, generate
from tests import jaxprs

BEAMS = GenerationOptions(max_new_tokens=7, eos_ids=(28, 32), num_beams=4, num_return_sequences=3)
DRAWS = dataclasses.replace(BEAMS, num_beams=1, do_sample=True)
GREEDY = dataclasses.replace(BEAMS, num_beams=1, num_return_sequences=1, eos_ids=(34, 11))


@pytest.fixture
def teacher_forced(params, config):
  """Hidden states and logits at the tokens of given answers, from one pass without a cache."""

  def run(batch, tokens_BS):
    inputs_BSD, valid_BS = speech_llm.prompt(params, batch, config)
    answer_BSD = speech_llm.embed(params, tokens_BS, config)
    inputs_BSD = np.concatenate([inputs_BSD, answer_BSD], axis=1)
    valid_BS = np.concatenate([valid_BS, tokens_BS >= 0], axis=1)
    hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, valid_BS, config)
    logits_BSV = speech_llm.logits(params, hidden_BSD, config)
    steps = tokens_BS.shape[1]
    return np.asarray(hidden_BSD[:, -steps:]), np.asarray(logits_BSV[:, -steps - 1 : -1])

  return run


@pytest.mark.parametrize("options", [BEAMS, DRAWS, GREEDY], ids=["beams", "draws", "greedy"])
def test_hidden_states_and_scores_are_those_of_a_pass_over_the_answer(
  params, config, batch, teacher_forced, options
):
  clips = batch([20, 13, 7, 18])
  options = dataclasses.replace(options, return_hidden=True)
  found = jax.device_get(generate(params, clips, config, options, key=jax.random.key(0)))
  assert len(set(found.lengths_BR.ravel().tolist())) > 1 and not found.finished_BR.all()
  for rank in range(options.num_return_sequences):
    tokens_BS, lengths_B = found.tokens_BRS[:, rank], found.lengths_BR[:, rank]
    hidden_BSD, logits_BSV = teacher_forced(clips, tokens_BS)
    held_BS = np.arange(options.max_new_tokens) < lengths_B[:, None]
    # The same sums in another order; hidden states are of size 1.
    np.testing.assert_allclose(found.hidden_BRSD[:, rank][held_BS], hidden_BSD[held_BS], atol=5e-5)
    assert not found.hidden_BRSD[:, rank][~held_BS].any()
    log_probs_BSV = np.asarray(jax.nn.log_softmax(logits_BSV))
    at_BS1 = np.maximum(tokens_BS, 0)[..., None]
    sums_B = np.where(held_BS, np.take_along_axis(log_probs_BSV, at_BS1, -1)[..., 0], 0).sum(1)
    np.testing.assert_allclose(found.scores_BR[:, rank], sums_B / lengths_B, atol=2e-4)


def test_answers_come_best_first_and_differ(params, config, batch):
  found = jax.device_get(generate(params, batch([20, 13, 7]), config, BEAMS))
  assert (np.diff(found.scores_BR) <= 0).all()
  for tokens_RS in found.tokens_BRS:
    assert len({tuple(row) for row in tokens_RS.tolist()}) == 3
  for name in ("tokens_BS", "lengths_B", "scores_B", "finished_B"):
    all_ranks = getattr(found, name.replace("_B", "_BR"))
    np.testing.assert_array_equal(getattr(found, name), all_ranks[:, 0])


def test_one_token_is_the_most_probable_one(params, config, batch):
  one = dataclasses.replace(BEAMS, max_new_tokens=1, num_return_sequences=1, return_hidden=True)
  clips = batch([20, 7])
  found = generate(params, clips, config, one)
  greedy = generate(params, clips, config, GenerationOptions(max_new_tokens=1))
  np.testing.assert_array_equal(found.tokens_BRS, greedy.tokens_BRS)
  np.testing.assert_allclose(found.scores_BR, greedy.scores_BR, atol=1e-5)
  assert found.hidden_BRSD.all()


def test_padding_and_neighbours_change_no_answer(params, config, batch):
  together = generate(params, batch([20, 13, 7, 0], padded_to=32), config, BEAMS)
  assert together.hidden_BRSD is None  # not asked for
  for row, count in enumerate([20, 13, 7]):
    alone = generate(params, batch([count], padded_to=20), config, BEAMS)
    np.testing.assert_array_equal(together.tokens_BRS[row], alone.tokens_BRS[0])
    np.testing.assert_allclose(together.scores_BR[row], alone.scores_BR[0], atol=1e-4)
  # A row of padding.
  assert not together.lengths_BR[3].any() and together.finished_BR[3].all()
  assert not together.scores_BR[3].any() and (together.tokens_BRS[3] == -1).all()


def test_the_prompt_is_cached_once_an_utterance(params, config, batch):
  """No array of the program holds the prompt's keys or values once a beam, in any layout."""
  clips = batch([20, 13], padded_to=38)
  rows, beams, heads, channels = 2, 4, config.decoder.kv_heads, config.decoder.head_width
  prompt = 38 // 2 + 3
  traced = jax.make_jaxpr(lambda p, b: generate(p, b, config, BEAMS))(params, clips)
  [loop] = [e for e in jaxprs.equations(traced) if e.primitive.name == "while"]
  slots = prompt + (BEAMS.max_new_tokens - 1) * beams
  caches = [v.aval.shape for v in loop.outvars if v.aval.shape[-2:] == (heads, channels)]
  assert caches == [(rows, slots, heads, channels)] * 2 * config.decoder.layers
  per_beam = rows * beams * prompt * heads * channels
  inside = jaxprs.shapes(loop.params["body_jaxpr"])
  assert (rows, slots, heads, channels) in inside
  # Scores [beams, heads, slots] are smaller, logits [beams, vocab] too.
  assert max(np.prod(shape, initial=1) for shape in inside) < per_beam
  # And nothing gathers from the cache: a reorder of beams moves integers.
  moved = [
    equation.invars[0].aval.shape
    for equation in jaxprs.equations(loop.params["body_jaxpr"])
    if equation.primitive.name in ("gather", "dynamic_slice")
  ]
  assert moved and (rows, slots, heads, channels) not in moved


def test_the_loop_ends_once_every_utterance_is_done(params, config, batch):
  """Early stopping costs steps only as long as an answer can still come."""
  clips = batch([20, 13])
  steps = []

  def count(params, *args, **kwargs):
    jax.debug.callback(lambda: steps.append(1))
    return decode(params, *args, **kwargs)

  # Everything ends an answer but four tokens, so the first beams are whole at once.
  options = GenerationOptions(
    max_new_tokens=30, eos_ids=tuple(range(36)), num_beams=2, early_stopping=True
  )
  decode, speech_llm.decode = speech_llm.decode, count
  try:
    run = jax.jit(lambda p, b: generate.__wrapped__(p, b, config, options))
    jax.block_until_ready(run(params, clips))
    jax.effects_barrier()
  finally:
    speech_llm.decode = decode
  assert len(steps) < 6
