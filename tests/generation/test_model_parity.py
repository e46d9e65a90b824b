"""Decoding with small random Qwen2 and LLaMA models against transformers, token for token.

Ours decodes left-padded batches; transformers decodes every utterance alone and without padding,
which is what a user sees from it and free of what its batches change (docs/generation.md).
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.generation import GenerationConfig, generate_from
from tests.generation import reference
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding
from tests.parity import torch_models

VOCAB, WIDTH, PROMPT, LENGTH = 40, 32, 9, 12
LLM = LLMConfig(
  vocab_size=VOCAB,
  hidden_size=WIDTH,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  intermediate_size=48,
  tie_word_embeddings=True,
  rope_theta=1e4,
)
pytestmark = pytest.mark.filterwarnings("ignore:Passing")  # that penalties skip the prompt: meant


@functools.cache
def model(kind):
  """(transformers' model, our params, our config); weights large enough for varied answers."""
  config = LLM
  if kind == "llama":
    config = dataclasses.replace(LLM, qkv_bias=False, tie_word_embeddings=False)
  module = torch_models.llm(config)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      if parameter.ndim > 1:
        parameter *= 20 if "embed" in name or "head" in name else 8
  # generate fills in defaults from here; ours are given in full.
  module.generation_config.bos_token_id = module.generation_config.eos_token_id = None
  params = {"decoder": torch_models.qwen2_params(module, config)}
  return module, params, SpeechLLMConfig(decoder=config)


def prompts(rng, rows):
  """Embeddings [rows, PROMPT, WIDTH], random ones at padding too, and lengths."""
  lengths = rng.integers(2, PROMPT + 1, rows)
  return 0.4 * rng.normal(size=(rows, PROMPT, WIDTH)).astype(np.float32), lengths


@functools.cache
def likely_tokens(kind):
  """The tokens that the model says most; of those come the eos, so that answers do end."""
  inputs_BSD, _ = prompts(np.random.default_rng(0), 32)
  options = GenerationConfig(max_new_tokens=LENGTH)
  tokens, _ = reference.answers(
    model(kind)[0],
    options,
    torch.tensor(inputs_BSD),
    torch.ones(inputs_BSD.shape[:2], dtype=torch.long),
    use_cache=True,
  )
  return np.argsort(-np.bincount(np.ravel(tokens), minlength=VOCAB))[:4]


@functools.cache
def program(kind, options):
  return jax.jit(functools.partial(generate_from, config=model(kind)[2], options=options))


def our_answers(kind, options, inputs_BSD, lengths):
  valid_BS = np.arange(PROMPT) >= PROMPT - lengths[:, None]
  found = jax.device_get(program(kind, options)(model(kind)[1], inputs_BSD, valid_BS))
  tokens = [
    [row[:length].tolist() for row, length in zip(*utterance)]
    for utterance in zip(found.tokens_BRS, found.lengths_BR)
  ]
  return tokens, found.scores_BR


def their_answers(kind, options, inputs_SD, noise=None):
  """One utterance alone."""
  inputs_embeds = torch.tensor(inputs_SD)[None]
  more = {} if noise is None else {"logits_processor": [noise]}
  [tokens], [scores] = reference.answers(
    model(kind)[0],
    options,
    inputs_embeds,
    torch.ones(inputs_embeds.shape[:2], dtype=torch.long),
    use_cache=True,
    **more,
  )
  return tokens, scores


@functools.cache
def logit_bound(kind) -> float:
  """Bound on what rounding changes of the logits of a prompt and an answer."""
  _, params, config = model(kind)
  inputs_BSD, lengths = prompts(np.random.default_rng(0), 8)
  valid_BS = np.arange(PROMPT) >= PROMPT - lengths[:, None]
  labels_BS = np.random.default_rng(1).integers(0, VOCAB, (8, LENGTH))

  @jax.jit
  def logits(params, inputs_BSD):
    answer_BSD = speech_llm.embed(params, labels_BS, config)
    inputs_BSD = jnp.concatenate([inputs_BSD, answer_BSD], 1)
    attended_BS = np.concatenate([valid_BS, np.ones(labels_BS.shape, bool)], 1)
    hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, attended_BS, config)
    return speech_llm.logits(params, hidden_BSD, config)[:, PROMPT:]

  terms = 2 * 48  # the longest sums, over the MLP, in each of two layers
  return float(rounding(terms, condition(logits, params, inputs_BSD)))


def score_bound(kind, options) -> float:
  """Bound on what rounding changes of a score, which is a sum of log-probabilities.

  Their errors add up over the tokens; a length penalty below 0 multiplies.
  """
  return logit_bound(kind) * LENGTH**0.5 * max(1, LENGTH**-options.length_penalty)


def hangs_on_rounding(kind, options, inputs_SD, answer) -> bool:
  """Whether transformers gives this answer too once its logits differ by less than their bound."""

  def noise(_, scores):
    return scores + (2 * torch.rand(scores.shape, generator=generator) - 1) * logit_bound(kind)

  generator = torch.Generator().manual_seed(0)
  return any(their_answers(kind, options, inputs_SD, noise)[0] == answer for _ in range(40))


def compare(seeds, rows=None):
  """Decodes `rows` utterances a seed, by default 1 to 8.

  Returns (cases, mismatches excused, mismatches, share of answers that each option changes).
  """
  cases, excused, mismatches = 0, [], []
  changed, asked = collections.Counter(), collections.Counter()
  for seed in seeds:
    rng = np.random.default_rng(seed)
    kind = ("qwen2", "llama")[seed % 2]
    beams = (1, 2, 4, 8)[(3 * seed + seed // 8) % 4]
    options = reference.random_options(
      rng,
      beams=beams,
      vocab=VOCAB,
      max_new_tokens=LENGTH,
      prompt=PROMPT - 3,
      eos_from=likely_tokens(kind),
    )
    inputs_BSD, lengths = prompts(rng, rows or 1 + seed % 8)
    found, found_scores = our_answers(kind, options, inputs_BSD, lengths)
    for row, length in enumerate(lengths):
      inputs_SD = inputs_BSD[row, PROMPT - length :]
      expected, scores = their_answers(kind, options, inputs_SD)
      cases += 1
      if found[row] != expected:
        excuse = hangs_on_rounding(kind, options, inputs_SD, found[row])
        (excused if excuse else mismatches).append((seed, row, options))
        continue
      assert_within(found_scores[row], np.array(scores), score_bound(kind, options))
      for name, other in reference.without(options).items():
        changed[name] += their_answers(kind, other, inputs_SD)[0] != expected
        asked[name] += 1
  return cases, excused, mismatches, {name: changed[name] / asked[name] for name in asked}


def check(seeds, *, rows=None, least):
  cases, excused, mismatches, shares = compare(seeds, rows)
  print(f"{cases} cases, excused: {excused}, answers changed by option: {shares}")
  assert mismatches == []
  assert cases >= least and len(excused) <= 0.01 * cases, excused
  # Each option must matter, or equality shows nothing about it.
  for name in ("early_stopping", "length_penalty", "sequence_bias", "repetition_penalty"):
    assert shares[name] >= 0.1, shares


def test_answers_equal_transformers():
  check(range(8), rows=8, least=60)  # full batches: each seed compiles a program


@pytest.mark.slow
@pytest.mark.nightly
def test_answers_equal_transformers_on_many_cases():
  check(range(48), least=200)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_scores_of_another_model_exceed_the_bound(kind):
  _, params, config = model(kind)
  inputs_BSD, lengths = prompts(np.random.default_rng(0), 8)
  options = GenerationConfig(max_new_tokens=LENGTH)
  valid_BS = np.arange(PROMPT) >= PROMPT - lengths[:, None]
  config = config.replace(decoder=dataclasses.replace(config.decoder, rope_theta=2e4))
  generate = jax.jit(functools.partial(generate_from, config=config, options=options))
  found = generate(params, inputs_BSD, valid_BS).scores_BR
  _, expected = our_answers(kind, options, inputs_BSD, lengths)
  with exceeds_the_bound():
    assert_within(found, expected, score_bound(kind, options))


def test_batch_and_single_decoding_agree():
  rng = np.random.default_rng(0)
  options = dataclasses.replace(
    reference.random_options(rng, beams=4, vocab=VOCAB, max_new_tokens=LENGTH, prompt=PROMPT - 3),
    repetition_penalty=1.3,
    min_length=PROMPT,
    min_new_tokens=None,
  )
  inputs_BSD, lengths = prompts(rng, 8)
  together, scores = our_answers("qwen2", options, inputs_BSD, lengths)
  for row in range(8):
    # Of the same shape, so that one program serves all; the padding holds other values.
    moved = rng.normal(size=(1, PROMPT, WIDTH)).astype(np.float32)
    moved[0, PROMPT - lengths[row] :] = inputs_BSD[row, PROMPT - lengths[row] :]
    [alone], [score] = our_answers("qwen2", options, moved, lengths[row : row + 1])
    assert alone == together[row]
    assert_within(score, scores[row], score_bound("qwen2", options))


@pytest.mark.parametrize("values", [{"repetition_penalty": 3.0}, {"min_length": 16}], ids=str)
def test_where_transformers_batches_differ_we_match_its_single_runs(values):
  rng = np.random.default_rng(1)
  options = GenerationConfig(
    max_new_tokens=LENGTH,
    eos_token_id=(14, 17, 25),
    num_beams=2,
    **values,
  )
  inputs_BSD, lengths = prompts(rng, 4)
  valid_BS = np.arange(PROMPT) >= PROMPT - lengths[:, None]
  singles = [
    their_answers("qwen2", options, inputs_BSD[row, PROMPT - length :])[0]
    for row, length in enumerate(lengths)
  ]
  batched, _ = reference.answers(
    model("qwen2")[0],
    options,
    torch.tensor(inputs_BSD),
    torch.tensor(valid_BS).long(),
    use_cache=True,
  )
  assert batched != singles
  assert our_answers("qwen2", options, inputs_BSD, lengths)[0] == singles
