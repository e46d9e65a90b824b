"""Processing of the next token's scores before one is chosen.

Each function is the processor of that name in transformers, over any number of leading axes.
"""

import jax
import jax.numpy as jnp

from mooer_jax.generation.options import GenerationConfig


def process(
  scores_XV: jax.Array,
  tokens_XS: jax.Array,
  step: jax.Array | int,
  *,
  min_new_X: jax.Array,
  options: GenerationConfig,
) -> jax.Array:
  """Applies every option, in transformers' order.

  Args:
    scores_XV: float32 [..., V]: logits with one beam, log-probabilities in beam search.
    tokens_XS: int32 [..., S], tokens generated so far; the first `step` entries count.
    step: number of tokens generated so far; a scalar, or int32 that broadcasts against [...].
    min_new_X: int32, broadcast against [...]: eos is forbidden while `step` is below.
    options: decoding options; temperature, top_k and top_p apply if do_sample.

  Returns:
    float32 [..., V]; -inf for a forbidden token.

  Raises:
    ValueError: if sequence_bias or eos_token_id name a token that the vocabulary lacks.
  """
  vocab = scores_XV.shape[-1]
  named = (*options.eos_token_id, *(token for token, _ in options.sequence_bias))
  if any(token >= vocab for token in named):
    raise ValueError(
      f"generation.eos_token_id or sequence_bias names token {max(named)}; the vocabulary has"
      f" {vocab} tokens"
    )
  if options.sequence_bias:
    tokens, values = zip(*options.sequence_bias)
    scores_XV = scores_XV.at[..., jnp.array(tokens)].add(jnp.array(values, jnp.float32))
  if options.repetition_penalty != 1:
    scores_XV = penalize_repetition(scores_XV, tokens_XS, step, penalty=options.repetition_penalty)
  if options.no_repeat_ngram_size:
    scores_XV = ban_repeated_ngrams(scores_XV, tokens_XS, step, size=options.no_repeat_ngram_size)
  if options.eos_token_id:
    early_X1 = (step < min_new_X)[..., None]
    is_eos_V = jnp.isin(jnp.arange(vocab), jnp.array(options.eos_token_id))
    scores_XV = jnp.where(early_X1 & is_eos_V, -jnp.inf, scores_XV)
  if options.do_sample:
    # An open beam must remain even if every eos is among the most probable tokens.
    keep = 1 if options.num_beams == 1 else max(2, 1 + len(options.eos_token_id))
    scores_XV = apply_top_k_top_p(
      scores_XV / options.temperature, top_k=options.top_k, top_p=options.top_p, keep=keep
    )
  return scores_XV


def min_new_tokens(prompt_B: jax.Array, options: GenerationConfig) -> jax.Array:
  """Tokens that must precede the eos, int32 [B], from the lengths of the prompts."""
  if options.min_new_tokens is not None:
    return jnp.full_like(prompt_B, options.min_new_tokens)
  return jnp.maximum(options.min_length - prompt_B, 0)


def penalize_repetition(scores_XV, tokens_XS, step, *, penalty: float) -> jax.Array:
  """Makes tokens generated before less probable (penalty > 1) or more probable (< 1).

  Source: CTRL (Keskar et al., 2019).
  """
  filled_XS = jnp.arange(tokens_XS.shape[-1]) < jnp.asarray(step)[..., None]
  seen_XV = _marked(tokens_XS, filled_XS, scores_XV.shape[-1])
  penalized_XV = jnp.where(scores_XV < 0, scores_XV * penalty, scores_XV / penalty)
  return jnp.where(seen_XV, penalized_XV, scores_XV)


def ban_repeated_ngrams(scores_XV, tokens_XS, step, *, size: int) -> jax.Array:
  """Forbids every token that would repeat an n-gram of this size."""
  slots = tokens_XS.shape[-1]
  if slots < size:
    return scores_XV
  starts, step_X1 = jnp.arange(slots - size + 1), jnp.asarray(step)[..., None]
  # An n-gram repeats if it is complete and its first tokens are the last ones generated.
  repeats_XW = jnp.broadcast_to(starts + size <= step_X1, (*tokens_XS.shape[:-1], len(starts)))
  for offset in range(size - 1):
    place_X1 = jnp.clip(step_X1 - size + 1 + offset, 0, slots - 1)
    place_X1 = jnp.broadcast_to(place_X1, (*tokens_XS.shape[:-1], 1))
    last_X1 = jnp.take_along_axis(tokens_XS, place_X1, axis=-1)
    repeats_XW &= tokens_XS[..., offset : offset + len(starts)] == last_X1
  banned_XV = _marked(tokens_XS[..., size - 1 :], repeats_XW, scores_XV.shape[-1])
  return jnp.where(banned_XV, -jnp.inf, scores_XV)


def _marked(tokens_XS, chosen_XS, vocab: int) -> jax.Array:
  """bool [..., V], True for the tokens at the places where `chosen` is True."""

  def row(tokens_S, chosen_S):
    return jnp.zeros(vocab, bool).at[jnp.where(chosen_S, tokens_S, vocab)].set(True, mode="drop")

  chosen_XS = jnp.broadcast_to(chosen_XS, tokens_XS.shape)
  return jnp.vectorize(row, signature="(n),(n)->(v)")(tokens_XS, chosen_XS)


def apply_top_k_top_p(
  scores_XV: jax.Array, *, top_k: int, top_p: float, keep: int = 1
) -> jax.Array:
  """Sets scores outside the k most probable, then outside the nucleus of mass p, to -inf.

  Ties with the k-th score are kept; of equal scores at the edge of the nucleus, those with the
  lower ids. At least the `keep` most probable tokens are kept.

  Source: nucleus sampling (Holtzman et al., 2020).
  """
  vocab = scores_XV.shape[-1]
  if top_k and max(top_k, keep) < vocab:
    kth_X1 = jax.lax.top_k(scores_XV, max(top_k, keep))[0][..., -1:]
    scores_XV = jnp.where(scores_XV < kth_X1, -jnp.inf, scores_XV)
  if top_p < 1:
    order_XV = jnp.argsort(-scores_XV, axis=-1)
    probs_XV = jax.nn.softmax(jnp.take_along_axis(scores_XV, order_XV, axis=-1), axis=-1)
    mass_before_XV = jnp.cumsum(probs_XV, axis=-1) - probs_XV
    inside_XV = (mass_before_XV < top_p) | (jnp.arange(vocab) < keep)
    rank_XV = jnp.argsort(order_XV, axis=-1)
    inside_XV = jnp.take_along_axis(inside_XV, rank_XV, axis=-1)
    scores_XV = jnp.where(inside_XV, scores_XV, -jnp.inf)
  return scores_XV
