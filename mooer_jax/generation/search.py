"""Greedy decoding, sampling and beam search as pure functions over logits, for any model.

    state = start(rows, options)
    while not state.done_B.all():
      logits_BRV = ...  # of row b, after state.running.tokens_BRS[b, :, : state.step_B[b]]
      state = advance(state, logits_BRV, options, min_new_B=..., keys_B=...)
    hypotheses = best(state, options)

Each utterance has its own number of steps, so that they may begin at different times.

R hypotheses of an utterance run side by side: the beams of a beam search, or independent samples.
The cache is never copied: `slots_BRS` is the place, of R, under which the model read each token of
a hypothesis, and only these small integers move when beams are reordered.

Source: the semantics of `generate` in transformers 5.23.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax.generation.options import GenerationConfig
from mooer_jax.generation.processors import process

PAD = -1
NEG_INF = -1e9  # transformers adds it to the scores of forbidden candidates; finite, so it sums


class Hypotheses(NamedTuple):
  """Generated tokens, finished or not.

  Attributes:
    tokens_BRS: int32 [B, R, max_new_tokens], -1 after the end.
    slots_BRS: int32, place in 0 … R-1 of the hypothesis when each token was chosen.
    lengths_BR: int32, number of tokens.
    scores_BR: float32, summed log-probabilities; if finished, after the length penalty.
  """

  tokens_BRS: jax.Array
  slots_BRS: jax.Array
  lengths_BR: jax.Array
  scores_BR: jax.Array


class State(NamedTuple):
  """State of the search.

  Attributes:
    step_B: int32, tokens chosen so far.
    running: the open beams, best first; or the samples, which also end here.
    finished: the best finished hypotheses of a beam search.
    is_finished_BR: bool, True where `finished` holds a hypothesis, or where a sample has ended.
    done_B: bool, True where nothing changes any more, at the latest after max_new_tokens.
  """

  step_B: Any
  running: Hypotheses
  finished: Hypotheses
  is_finished_BR: jax.Array
  done_B: jax.Array


def start(rows: int, options: GenerationConfig, done_B: jax.Array | None = None) -> State:
  """Empty hypotheses for `rows` utterances; those with done_B True stay empty."""
  R, S = options.width, options.max_new_tokens
  empty = Hypotheses(
    tokens_BRS=jnp.full((rows, R, S), PAD, jnp.int32),
    slots_BRS=jnp.zeros((rows, R, S), jnp.int32),
    lengths_BR=jnp.zeros((rows, R), jnp.int32),
    scores_BR=jnp.zeros((rows, R), jnp.float32),
  )
  running, finished = empty, empty
  if options.num_beams > 1:
    # All beams start alike: only the first counts, or all would choose the same tokens.
    running = empty._replace(scores_BR=empty.scores_BR.at[:, 1:].set(NEG_INF))
    finished = empty._replace(scores_BR=jnp.full((rows, R), NEG_INF, jnp.float32))
  return State(
    step_B=jnp.zeros(rows, jnp.int32),
    running=running,
    finished=finished,
    is_finished_BR=jnp.zeros((rows, R), bool),
    done_B=jnp.zeros(rows, bool) if done_B is None else done_B,
  )


def advance(
  state: State,
  logits_BRV: jax.Array,
  options: GenerationConfig,
  *,
  min_new_B: jax.Array,
  keys_B: jax.Array | None = None,
) -> State:
  """Chooses one more token for every running hypothesis.

  Args:
    state: the search so far; an utterance that is done no longer changes.
    logits_BRV: float32, logits of the token after each running hypothesis.
    options: decoding options.
    min_new_B: int32, tokens before an eos is allowed; see `processors.min_new_tokens`.
    keys_B: a PRNG key per utterance and step, if do_sample.
  """
  choose = _advance_beams if options.num_beams > 1 else _advance_samples
  new = choose(state, logits_BRV, options, min_new_B=min_new_B, keys_B=keys_B)

  def kept(old, new):
    done = state.done_B.reshape(-1, *[1] * (new.ndim - 1))
    return jnp.where(done, old, new)

  step_B = jnp.where(state.done_B, state.step_B, state.step_B + 1)
  is_last_B = step_B >= options.max_new_tokens
  new = new._replace(step_B=step_B, done_B=new.done_B | is_last_B)
  return jax.tree.map(kept, state, new)


def best(state: State, options: GenerationConfig) -> Hypotheses:
  """The `num_return_sequences` hypotheses of each utterance, best first; samples in their order."""
  if options.num_beams > 1:
    return jax.tree.map(lambda x: x[:, : options.num_return_sequences], state.finished)
  found, divisors_S = state.running, _divisors(options)
  last_BR = jnp.maximum(found.lengths_BR - 1, 0)
  return found._replace(scores_BR=found.scores_BR / divisors_S[last_BR])


def _divisors(options: GenerationConfig) -> jax.Array:
  """length ** length_penalty for the lengths 1 … max_new_tokens."""
  lengths_S = np.arange(1, options.max_new_tokens + 1, dtype=np.float64)
  return jnp.asarray(lengths_S**options.length_penalty, jnp.float32)


def is_eos(tokens: jax.Array, options: GenerationConfig) -> jax.Array:
  """Whether each token is one of eos_token_id: bool, in the shape of the int32 tokens."""
  return jnp.isin(tokens, jnp.array(options.eos_token_id, jnp.int32))


def _advance_samples(state, logits_BRV, options, *, min_new_B, keys_B) -> State:
  """Greedy decoding or sampling; hypotheses are independent."""
  begun, step_B = state.running, state.step_B
  scores_BRV = process(
    logits_BRV, begun.tokens_BRS, step_B[:, None], min_new_X=min_new_B[:, None], options=options
  )
  if options.do_sample:
    tokens_BR = jax.vmap(jax.random.categorical)(keys_B, scores_BRV).astype(jnp.int32)
  else:
    tokens_BR = scores_BRV.argmax(-1).astype(jnp.int32)
  log_probs_BRV = jax.nn.log_softmax(scores_BRV)
  gained_BR = jnp.take_along_axis(log_probs_BRV, tokens_BR[..., None], axis=-1)[..., 0]
  is_open_BR = ~state.is_finished_BR
  tokens_BR = jnp.where(is_open_BR, tokens_BR, PAD)
  running = Hypotheses(
    tokens_BRS=_put(begun.tokens_BRS, step_B, tokens_BR),
    slots_BRS=_put(begun.slots_BRS, step_B, jnp.arange(options.width)),
    lengths_BR=begun.lengths_BR + is_open_BR,
    scores_BR=begun.scores_BR + jnp.where(is_open_BR, gained_BR, 0),
  )
  is_finished_BR = state.is_finished_BR | is_eos(tokens_BR, options)
  return State(None, running, state.finished, is_finished_BR, is_finished_BR.all(axis=1))


def _put(x_BXS: jax.Array, step_B: jax.Array, values) -> jax.Array:
  """Sets entry `step` of each utterance to values that broadcast against [B, X]."""
  is_step_B1S = jnp.arange(x_BXS.shape[-1]) == step_B[:, None, None]
  return jnp.where(is_step_B1S, jnp.asarray(values)[..., None], x_BXS)


def _take(hypotheses: Hypotheses, index_BX: jax.Array) -> Hypotheses:
  """Picks hypotheses of each utterance."""

  def pick(x):
    return jnp.take_along_axis(x, index_BX.reshape(*index_BX.shape, *[1] * (x.ndim - 2)), axis=1)

  return jax.tree.map(pick, hypotheses)


def _advance_beams(state, logits_BRV, options, *, min_new_B, keys_B) -> State:
  """One step of beam search: candidates, the open beams, the finished hypotheses."""
  step_B, R = state.step_B, options.num_beams
  divisors_S = _divisors(options)
  log_probs_BRV = jax.nn.log_softmax(logits_BRV)
  log_probs_BRV = process(
    log_probs_BRV,
    state.running.tokens_BRS,
    step_B[:, None],
    min_new_X=min_new_B[:, None],
    options=options,
  )
  candidates = _candidates(state, log_probs_BRV, options, keys_B=keys_B)
  chosen_BX1 = jnp.take_along_axis(candidates.tokens_BRS, step_B[:, None, None], axis=-1)
  stops_BX = is_eos(chosen_BX1[..., 0], options)
  stops_BX |= step_B[:, None] + 1 >= options.max_new_tokens

  open_BX = candidates.scores_BR + stops_BX * NEG_INF
  running = _take(candidates._replace(scores_BR=open_BX), jax.lax.top_k(open_BX, R)[1])
  running = running._replace(slots_BRS=_put(running.slots_BRS, step_B, jnp.arange(R)))

  divisor_B1 = divisors_S[step_B][:, None]
  # Candidates after the first R only replace beams that end; they cannot become finished.
  ends_BX = stops_BX & (jnp.arange(stops_BX.shape[1]) < R)
  scores_BX = candidates.scores_BR / divisor_B1 + ~ends_BX * NEG_INF
  both = jax.tree.map(
    lambda *x: jnp.concatenate(x, axis=1),
    (state.finished, state.is_finished_BR),
    (candidates._replace(scores_BR=scores_BX), ends_BX),
  )
  chosen_BR = jax.lax.top_k(both[0].scores_BR, R)[1]
  finished = _take(both[0], chosen_BR)
  is_finished_BR = jnp.take_along_axis(both[1], chosen_BR, axis=1)

  to_the_end = options.early_stopping == "never" and options.length_penalty > 0
  hope_B1 = running.scores_BR[:, :1] / (divisors_S[-1] if to_the_end else divisor_B1)
  worst_B1 = finished.scores_BR.min(axis=1, keepdims=True)
  done_B = ~(hope_B1 > jnp.where(is_finished_BR, worst_B1, NEG_INF)).any(axis=1)
  done_B |= stops_BX.all(axis=1)
  if options.early_stopping is True:
    done_B |= is_finished_BR.all(axis=1)
  return State(None, running, finished, is_finished_BR, done_B)


def _candidates(state, log_probs_BRV, options, *, keys_B) -> Hypotheses:
  """The most probable continuations of all beams together, or samples without replacement.

  There are enough for R open beams even if every beam could end with each eos.
  """
  B, R, V = log_probs_BRV.shape
  number = R * max(2, 1 + len(options.eos_token_id))
  if number > R * V:
    raise ValueError(
      f"generation.eos_token_id has {len(options.eos_token_id)} tokens of a vocabulary of {V}; beam"
      " search needs at least one token more"
    )
  totals_BY = (log_probs_BRV + state.running.scores_BR[..., None]).reshape(B, R * V)
  ranked_BY = totals_BY
  if options.do_sample:
    # The largest sums with Gumbel noise are samples without replacement, in order (Kool et al.,
    # 2019).
    ranked_BY += jax.vmap(lambda key: jax.random.gumbel(key, (R * V,)))(keys_B)
  index_BX = jax.lax.top_k(ranked_BY, number)[1]
  begun = _take(state.running, index_BX // V)
  return Hypotheses(
    tokens_BRS=_put(begun.tokens_BRS, state.step_B, index_BX % V),
    slots_BRS=begun.slots_BRS,
    lengths_BR=begun.lengths_BR + 1,
    scores_BR=jnp.take_along_axis(totals_BY, index_BX, axis=1),
  )
