"""Qwen2 against transformers', LoRA against peft, on the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mooer_jax import tree
from mooer_jax.config import DECODERS
from mooer_jax.decoders.llm import LLM, LLMConfig
from mooer_jax.nn.compute import ExecutionConfig
from tests.parity import torch_models

# The bound of the project: float32 rounding that adds up like a random walk over the layers.
TOLERANCE = 1e-4
LAYERS = 2


def small(name, **changes) -> LLMConfig:
  """The real widths with few layers and few words."""
  return dataclasses.replace(DECODERS[name], layers=LAYERS, vocab_size=1000, **changes)


def tokens_and_mask():
  """Three rows of tokens: whole, padded left, padded right."""
  tokens_BS = np.random.default_rng(1).integers(0, 1000, (3, 14))
  valid_BS = np.ones((3, 14), bool)
  valid_BS[1, :5] = False
  valid_BS[2, -4:] = False
  return tokens_BS, valid_BS


def run_both(theirs, params, config, *, scan=False, lora_scale=None):
  """(our hidden, our logits, their hidden, their logits) at the valid slots."""
  tokens_BS, valid_BS = tokens_and_mask()
  positions_BS = np.maximum(valid_BS.cumsum(1) - 1, 0)
  with torch.no_grad():
    expected = theirs(
      input_ids=torch.tensor(tokens_BS),
      attention_mask=torch.tensor(valid_BS).long(),
      position_ids=torch.tensor(positions_BS),
      output_hidden_states=True,
    )
  model = LLM(config, ExecutionConfig(scan=scan))

  @jax.jit
  def ours(params):
    embedded_BSD = model.apply({"params": params}, tokens_BS, method=LLM.embed_tokens)
    hidden_BSD, _ = model.apply({"params": params}, embedded_BSD, valid_BS, lora_scale=lora_scale)
    return hidden_BSD, model.apply({"params": params}, hidden_BSD, method=LLM.logits)

  params = jax.tree.map(jnp.asarray, params)
  hidden, logits = ours(tree.stack_layers(params) if scan else params)
  return [
    np.asarray(x)[valid_BS] for x in (hidden, logits, expected.hidden_states[-1], expected.logits)
  ]


@pytest.mark.parametrize(
  "name, tied, scan",
  [
    ("qwen2_0.5b", True, False),
    ("qwen2_0.5b", False, True),
    ("qwen2_1.5b", True, True),
    ("qwen2_7b", False, False),
  ],
)
def test_equals_transformers_at_real_widths(name, tied, scan):
  config = small(name, tie_word_embeddings=tied)
  theirs = torch_models.qwen2(config)
  params = torch_models.qwen2_params(theirs, config)
  hidden, logits, expected_hidden, expected_logits = run_both(theirs, params, config, scan=scan)
  errors = [
    torch_models.error(hidden, expected_hidden),
    torch_models.error(logits, expected_logits),
  ]
  print("errors in standard deviations:", *(f"{e:.1e}" for e in errors))
  assert logits.dtype == np.float32
  assert max(errors) <= TOLERANCE * LAYERS**0.5


@pytest.mark.parametrize("targets, scan", [(LLMConfig().lora_targets, True), (("q", "v"), False)])
def test_lora_equals_peft(targets, scan):
  config = small("qwen2_0.5b", lora_rank=64, lora_targets=targets)
  plain = torch_models.qwen2(config)
  before = run_both(plain, torch_models.qwen2_params(plain, config), small("qwen2_0.5b"))[3]
  theirs = torch_models.with_lora(plain, config)
  params = torch_models.qwen2_params(theirs, config)
  assert sum(path.endswith("lora_a") for path in tree.flatten(params)) == LAYERS * len(targets)
  hidden, logits, expected_hidden, expected_logits = run_both(theirs, params, config, scan=scan)
  assert torch_models.error(expected_logits, before) > 0.1  # else LoRA would not show
  errors = [
    torch_models.error(hidden, expected_hidden),
    torch_models.error(logits, expected_logits),
  ]
  print("errors in standard deviations:", *(f"{e:.1e}" for e in errors))
  assert max(errors) <= TOLERANCE * LAYERS**0.5


def test_merged_lora_equals_runtime_lora():
  config = small("qwen2_0.5b", lora_rank=8)
  theirs = torch_models.with_lora(torch_models.qwen2(config), config)
  params = torch_models.qwen2_params(theirs, config)
  merged = theirs.merge_and_unload()
  _, logits, _, expected_logits = run_both(merged, params, config)
  assert torch_models.error(logits, expected_logits) <= TOLERANCE * LAYERS**0.5
