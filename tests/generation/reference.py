"""transformers' generate as the judge of ours, and a model that looks its logits up."""

import dataclasses

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, logging
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from mooer_jax.generation import GenerationConfig

logging.set_verbosity_error()  # it warns about every min_length beside min_new_tokens
HASHES = 101  # histories of one length that a table tells apart


def random_table(rng, utterances, *, vocab, length, eos_token_id, eos_boost) -> np.ndarray:
  """Logits [utterances, length * HASHES, vocab]; some tokens are likely everywhere and repeat."""
  table = 1.5 * rng.normal(size=(utterances, length * HASHES, vocab))
  table += 1.5 * rng.normal(size=(utterances, 1, vocab))
  table[..., list(eos_token_id)] += eos_boost
  return table.astype(np.float32)


def history_row(tokens: np.ndarray) -> np.ndarray:
  """Which row of its table a history [..., tokens so far] reads; every token and its place count.

  Histories of different lengths share no row: two answers that walked the same rows in another
  order would tie.
  """
  found = np.zeros(tokens.shape[:-1], np.int64)
  for token in np.moveaxis(tokens, -1, 0):
    found = (found * 31 + token + 7) % HASHES
  return found + tokens.shape[-1] * HASHES


class TableModel(PreTrainedModel, GenerationMixin):
  """Gives logits by utterance and history of tokens."""

  config_class = PreTrainedConfig

  def __init__(self, table: np.ndarray):
    super().__init__(PreTrainedConfig(vocab_size=table.shape[-1], num_hidden_layers=1))
    self.table = torch.tensor(table)

  @property
  def device(self):
    return torch.device("cpu")

  def prepare_inputs_for_generation(
    self, input_ids, utterance=None, inputs_embeds=None, attention_mask=None, **_
  ):
    return {"input_ids": input_ids, "utterance": utterance}

  def forward(self, input_ids=None, utterance=None, attention_mask=None, **_):
    rows = torch.tensor(history_row(input_ids.numpy()))
    return CausalLMOutputWithPast(logits=self.table[utterance, rows][:, None])


def arguments(options: GenerationConfig) -> dict:
  """Our options as arguments of transformers' generate."""
  given = dict(
    max_new_tokens=options.max_new_tokens,
    eos_token_id=list(options.eos_token_id) or None,
    pad_token_id=0,
    do_sample=options.do_sample,
    num_beams=options.num_beams,
    num_return_sequences=options.num_return_sequences,
    min_length=options.min_length,
    min_new_tokens=options.min_new_tokens,
    repetition_penalty=options.repetition_penalty,
    no_repeat_ngram_size=options.no_repeat_ngram_size,
    return_dict_in_generate=True,
    output_scores=True,
  )
  if options.sequence_bias:
    given["sequence_bias"] = {(token,): value for token, value in options.sequence_bias}
  if options.num_beams > 1:
    given |= dict(length_penalty=options.length_penalty, early_stopping=options.early_stopping)
  if options.do_sample:
    given |= dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
  return given


def answers(model, options: GenerationConfig, inputs_embeds, attention_mask, **inputs):
  """What transformers generates: ([[tokens of each answer] of each utterance], scores alike).

  Tokens up to the first eos, included. With one beam, which transformers does not score, the
  score is its own transition scores, summed and divided as the beams' are.
  """
  with torch.no_grad():
    found = model.generate(
      inputs_embeds=inputs_embeds,
      attention_mask=attention_mask,
      **inputs,
      **arguments(options),
    )
  tokens = [cut(row, options.eos_token_id) for row in found.sequences.tolist()]
  if options.num_beams > 1:
    scores = found.sequences_scores.tolist()
  else:
    gained = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    scores = [
      row[: len(t)].sum().item() / len(t) ** options.length_penalty
      for row, t in zip(gained, tokens, strict=True)
    ]
  R = options.num_return_sequences
  rows = range(0, len(tokens), R)
  return [tokens[i : i + R] for i in rows], [scores[i : i + R] for i in rows]


def table_answers(table, options: GenerationConfig, prompt: int):
  """transformers' answers where the logits come from a table; `prompt` embeddings stand before."""
  utterances = len(table)
  return answers(
    TableModel(table),
    options,
    torch.zeros(utterances, prompt, 1),
    torch.ones(utterances, prompt, dtype=torch.long),
    utterance=torch.arange(utterances),
  )


def cut(tokens: list[int], eos_token_id) -> list[int]:
  ends = [place for place, token in enumerate(tokens) if token in eos_token_id]
  return tokens[: ends[0] + 1] if ends else tokens


def random_options(rng, *, beams, vocab, max_new_tokens, prompt, eos_from=None):
  """Options of a search without sampling, each of them off in a good part of the draws."""
  eos_from = vocab if eos_from is None else eos_from
  eos_token_id = rng.choice(eos_from, rng.choice([1, 1, 1, 2, 3]), replace=False)
  eos_token_id = tuple(int(token) for token in eos_token_id)
  bias = ()
  if rng.random() < 0.6:
    tokens = [*eos_token_id[:1], *rng.choice(vocab, rng.integers(0, 4), replace=False).tolist()]
    values = [float(rng.choice([-0.2, -1.0, 1.0, -3.0])), *rng.normal(size=len(tokens)).tolist()]
    bias = tuple(dict(zip(tokens[::-1], values[: len(tokens)][::-1])).items())
  return GenerationConfig(
    max_new_tokens=max_new_tokens,
    eos_token_id=eos_token_id if rng.random() < 0.95 else (),
    num_beams=beams,
    num_return_sequences=int(rng.integers(1, beams + 1)),
    length_penalty=float(rng.choice([-1.0, 0.0, 0.5, 0.8, 1.0, 1.0, 1.5, 2.5])),
    early_stopping=[True, False, "never"][rng.integers(3)],
    min_length=int(rng.choice([0, 0, 1, prompt + 3])),
    min_new_tokens=[None, None, 0, 2, 5][rng.integers(5)],
    repetition_penalty=float(rng.choice([1.0, 1.0, 0.7, 1.2, 2.0])),
    no_repeat_ngram_size=int(rng.choice([0, 0, 1, 2, 3])),
    sequence_bias=bias,
  )


def without(options: GenerationConfig) -> dict[str, GenerationConfig]:
  """The same options but for one, named, that does nothing: to count the answers that it changes.

  Early stopping has no such value; True and the others stand against each other.
  """
  values = {
    "sequence_bias": dict(sequence_bias=()),
    "repetition_penalty": dict(repetition_penalty=1.0),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=0),
    "min_length": dict(min_length=0, min_new_tokens=None),
  }
  if options.num_beams > 1:
    values["length_penalty"] = dict(length_penalty=1.0)
    values["early_stopping"] = dict(
      early_stopping="never" if options.early_stopping is True else True
    )
  changed = {name: dataclasses.replace(options, **v) for name, v in values.items()}
  return {name: other for name, other in changed.items() if other != options}
