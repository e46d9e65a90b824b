"""Properties of beam search with a model: one prompt cache, hidden states, padding, scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import speech_llm
from mooer_jax.generation import GenerationConfig, generate
from tests import jaxprs
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

BEAMS = GenerationConfig(
  max_new_tokens=7, eos_token_id=(28, 32), num_beams=4, num_return_sequences=3
)
DRAWS = dataclasses.replace(BEAMS, num_beams=1, do_sample=True)
GREEDY = dataclasses.replace(BEAMS, num_beams=1, num_return_sequences=1, eos_token_id=(34, 11))

# The longest sums: over a frame's features, then over the MLP in each of four layers.
TERMS = 560 + 4 * 48


@pytest.fixture(scope="module")
def teacher_forced(config):
  """Hidden states at the tokens of given answers, zeros behind them, and mean log-probabilities.

  From one pass without a cache.
  """

  @jax.jit
  def run(params, batch, tokens_BS):
    inputs_BSD, valid_BS = speech_llm.prompt(params, batch, config)
    answer_BSD = speech_llm.embed(params, tokens_BS, config)
    inputs_BSD = jnp.concatenate([inputs_BSD, answer_BSD], axis=1)
    held_BS = tokens_BS >= 0
    valid_BS = jnp.concatenate([valid_BS, held_BS], axis=1)
    hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, valid_BS, config)
    logits_BSV = speech_llm.logits(params, hidden_BSD, config)
    steps = tokens_BS.shape[1]
    log_probs_BSV = jax.nn.log_softmax(logits_BSV[:, -steps - 1 : -1])
    at_BS1 = jnp.maximum(tokens_BS, 0)[..., None]
    gained_BS = jnp.take_along_axis(log_probs_BSV, at_BS1, -1)[..., 0]
    scores_B = jnp.where(held_BS, gained_BS, 0).sum(1) / held_BS.sum(1)
    return {"hidden": hidden_BSD[:, -steps:] * held_BS[..., None], "scores": scores_B}

  return run


@pytest.fixture(scope="module")
def bound_for(teacher_forced):
  """Bound on what rounding changes of given answers' hidden states and scores."""

  def bound(params, batch, tokens_BS):
    return rounding(TERMS, condition(teacher_forced, params, batch, tokens_BS))

  return bound


@pytest.mark.parametrize("options", [BEAMS, DRAWS, GREEDY], ids=["beams", "draws", "greedy"])
def test_hidden_states_and_scores_are_those_of_a_pass_over_the_answer(
  params, config, batch, teacher_forced, bound_for, options
):
  clips = batch([20, 13, 7, 18])
  options = dataclasses.replace(options, return_hidden=True)
  found = jax.device_get(generate(params, clips, config, options, key=jax.random.key(0)))
  assert len(set(found.lengths_BR.ravel().tolist())) > 1 and not found.finished_BR.all()
  for rank in range(options.num_return_sequences):
    tokens_BS = found.tokens_BRS[:, rank]
    ours = {"hidden": found.hidden_BRSD[:, rank], "scores": found.scores_BR[:, rank]}
    bound = bound_for(params, clips, tokens_BS)
    assert_within(ours, teacher_forced(params, clips, tokens_BS), bound)
    moved = dataclasses.replace(clips, suffix_BS=clips.suffix_BS[:, ::-1])  # another prompt
    other = teacher_forced(params, moved, tokens_BS)
    for name in ours:
      with exceeds_the_bound():
        assert_within(ours[name], other[name], bound[name])


def test_answers_come_best_first_and_differ(params, config, batch):
  found = jax.device_get(generate(params, batch([20, 13, 7]), config, BEAMS))
  assert (np.diff(found.scores_BR) <= 0).all()
  for tokens_RS in found.tokens_BRS:
    assert len({tuple(row) for row in tokens_RS.tolist()}) == 3
  for name in ("tokens_BS", "lengths_B", "scores_B", "finished_B"):
    all_ranks = getattr(found, name.replace("_B", "_BR"))
    np.testing.assert_array_equal(getattr(found, name), all_ranks[:, 0])


def test_one_token_is_the_most_probable_one(params, config, batch, bound_for):
  one = dataclasses.replace(BEAMS, max_new_tokens=1, num_return_sequences=1, return_hidden=True)
  clips = batch([20, 7])
  found = generate(params, clips, config, one)
  greedy = generate(params, clips, config, GenerationConfig(max_new_tokens=1))
  np.testing.assert_array_equal(found.tokens_BRS, greedy.tokens_BRS)
  bound = bound_for(params, clips, found.tokens_BRS[:, 0])
  assert_within(found.scores_BR, greedy.scores_BR, bound["scores"])
  assert found.hidden_BRSD.all()


def test_padding_and_neighbours_change_no_answer(params, config, batch, bound_for):
  together = generate(params, batch([20, 13, 7, 0], padded_to=32), config, BEAMS)
  bound = bound_for(params, batch([20, 13, 7]), together.tokens_BRS[:3, 0])
  assert together.hidden_BRSD is None  # not asked for
  for row, count in enumerate([20, 13, 7]):
    alone = generate(params, batch([count], padded_to=20), config, BEAMS)
    np.testing.assert_array_equal(together.tokens_BRS[row], alone.tokens_BRS[0])
    assert_within(together.scores_BR[row], alone.scores_BR[0], bound["scores"])
  # A row of padding.
  assert not together.lengths_BR[3].any() and together.finished_BR[3].all()
  assert not together.scores_BR[3].any() and (together.tokens_BRS[3] == -1).all()


def test_the_prompt_is_cached_once_an_utterance(params, config, batch):
  """No array of the program holds the prompt's keys or values once a beam, in any layout."""
  clips = batch([20, 13], padded_to=38)
  rows, beams, width = 2, 4, config.decoder.kv_heads * config.decoder.head_dim
  prompt = 38 // 2 + 3
  traced = jax.make_jaxpr(lambda p, b: generate(p, b, config, BEAMS))(params, clips)
  [loop] = [e for e in jaxprs.equations(traced) if e.primitive.name == "while"]
  slots = prompt + (BEAMS.max_new_tokens - 1) * beams
  cache = (rows, slots, width)
  caches = [v.aval.shape for v in loop.outvars if v.aval.shape == cache]
  assert caches == [cache] * 2 * config.decoder.layers
  per_beam = rows * beams * prompt * width
  inside = jaxprs.shapes(loop.params["body_jaxpr"])
  assert cache in inside
  # Scores [beams, heads, slots] are smaller, logits [beams, vocab] too.
  assert max(np.prod(shape, initial=1) for shape in inside) < per_beam
  # And nothing gathers from the cache: a reorder of beams moves integers.
  moved = [
    equation.invars[0].aval.shape
    for equation in jaxprs.equations(loop.params["body_jaxpr"])
    if equation.primitive.name in ("gather", "dynamic_slice")
  ]
  assert moved and cache not in moved


def test_the_loop_ends_once_every_utterance_is_done(params, config, batch):
  """Early stopping costs steps only as long as an answer can still come."""
  clips = batch([20, 13])
  steps = []

  def count(params, *args, **kwargs):
    jax.debug.callback(lambda: steps.append(1))
    return decode(params, *args, **kwargs)

  # Everything ends an answer but four tokens, so the first beams are whole at once.
  options = GenerationConfig(
    max_new_tokens=30, eos_token_id=tuple(range(36)), num_beams=2, early_stopping=True
  )
  decode, speech_llm.decode = speech_llm.decode, count
  try:
    run = jax.jit(lambda p, b: generate.__wrapped__(p, b, config, options))
    jax.block_until_ready(run(params, clips))
    jax.effects_barrier()
  finally:
    speech_llm.decode = decode
  assert len(steps) < 6
