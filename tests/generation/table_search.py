"""Our search over a table of logits, in the form of reference.table_answers."""

import functools

import jax
import numpy as np

from mooer_jax.generation import search
from mooer_jax.generation.processors import min_new_tokens
from tests.generation import reference


def table_answers(table, options, prompt, key=None):
  """([[tokens of each answer] of each utterance], scores [utterances, answers])."""
  utterances = np.arange(len(table))
  min_new_B = min_new_tokens(np.full(len(table), prompt, np.int32), options)

  @jax.jit
  def advance(state, logits_BRV):
    keys_B = None
    if key is not None:
      step_keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(state.step_B)
      keys_B = jax.vmap(jax.random.fold_in)(step_keys_B, utterances)
    return search.advance(state, logits_BRV, options, min_new_B=min_new_B, keys_B=keys_B)

  state = search.start(len(table), options)
  while not state.done_B.all():
    held = np.asarray(state.running.tokens_BRS)[..., : int(state.step_B.max())]
    state = advance(state, table[utterances[:, None], reference.history_row(held)])
  found = search.best(state, options)
  tokens = [
    [row[:length].tolist() for row, length in zip(*utterance)]
    for utterance in zip(np.asarray(found.tokens_BRS), np.asarray(found.lengths_BR))
  ]
  return tokens, np.asarray(found.scores_BR)
