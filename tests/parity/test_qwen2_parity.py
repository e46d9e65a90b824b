"""Qwen2 against transformers', LoRA against peft, on the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mooer_jax import tree
from mooer_jax.decoders.llm import LLM, LLMConfig
from mooer_jax.nn.compute import ExecutionConfig
from tests.numerics import exceeds_the_bound
from tests.parity import torch_models

LAYERS = 2


def small(name, **changes) -> LLMConfig:
  """The real widths with few layers and few tokens."""
  changes = {"layers": LAYERS, "vocab_size": 1000, **changes}
  return dataclasses.replace(LLMConfig.SIZES[name], **changes)


def tokens_and_mask():
  """Three rows of tokens: whole, padded left, padded right."""
  tokens_BS = np.random.default_rng(1).integers(0, 1000, (3, 14))
  valid_BS = np.ones((3, 14), bool)
  valid_BS[1, :5] = False
  valid_BS[2, -4:] = False
  return tokens_BS, valid_BS


def check(theirs, params, config, *, scan=False, lora_scale=None):
  """Raises unless our hidden states and logits of the valid tokens are those of transformers."""
  tokens_BS, valid_BS = tokens_and_mask()
  positions_BS = np.maximum(valid_BS.cumsum(1) - 1, 0)

  def run(module, dtype):
    found = module(
      input_ids=torch.tensor(tokens_BS),
      attention_mask=torch.tensor(valid_BS).long(),
      position_ids=torch.tensor(positions_BS),
      output_hidden_states=True,
    )
    return found.hidden_states[-1][valid_BS], found.logits[valid_BS]

  model = LLM(config, ExecutionConfig(scan=scan))

  @jax.jit
  def ours(params):
    embedded_BSD = model.apply({"params": params}, tokens_BS, method=LLM.embed_tokens)
    hidden_BSD, _ = model.apply({"params": params}, embedded_BSD, valid_BS, lora_scale=lora_scale)
    return hidden_BSD, model.apply({"params": params}, hidden_BSD, method=LLM.logits)

  found = ours(jax.tree.map(jnp.asarray, tree.stack_layers(params) if scan else params))
  found = [np.asarray(x)[valid_BS] for x in found]
  torch_models.assert_parity(found, run, theirs, layers=config.layers)


@pytest.mark.parametrize(
  "name, scan, changes",
  [
    ("qwen2_0.5b", False, {"tie_word_embeddings": True}),
    ("qwen2_0.5b", True, {"tie_word_embeddings": False}),
    # The widths of their attention; the MLPs are narrower, so that the test stays small.
    ("qwen2_1.5b", True, {"tie_word_embeddings": True, "intermediate_size": 2048}),
    ("qwen2_7b", False, {"intermediate_size": 2048, "layers": 1}),
    pytest.param("qwen2_1.5b", True, {"tie_word_embeddings": True}, marks=pytest.mark.nightly),
    pytest.param("qwen2_7b", False, {}, marks=pytest.mark.nightly),
  ],
)
def test_equals_transformers_at_real_widths(name, scan, changes):
  config = small(name, **changes)
  theirs = torch_models.llm(config)
  check(theirs, torch_models.qwen2_params(theirs, config), config, scan=scan)


@pytest.mark.parametrize("targets, scan", [(LLMConfig().lora_targets, True), (("q", "v"), False)])
def test_lora_equals_peft(targets, scan):
  config = small("qwen2_0.5b", lora_rank=64, lora_targets=targets)
  theirs = torch_models.with_lora(torch_models.llm(config), config)
  params = torch_models.qwen2_params(theirs, config)
  assert sum(path.endswith("lora_a") for path in tree.flatten(params)) == LAYERS * len(targets)
  check(theirs, params, config, scan=scan)
  with exceeds_the_bound():  # also without LoRA: it shows
    check(theirs, params, config, scan=scan, lora_scale=config.lora_scale * 1.001)


def test_merged_lora_equals_runtime_lora():
  config = small("qwen2_0.5b", lora_rank=8)
  theirs = torch_models.with_lora(torch_models.llm(config), config)
  params = torch_models.qwen2_params(theirs, config)
  check(theirs.merge_and_unload(), params, config)


@pytest.mark.parametrize(
  "fault", [{"norm_eps": 2e-6}, {"rope_theta": 1.001e6}], ids=lambda fault: next(iter(fault))
)
def test_a_fault_exceeds_the_bound(fault):
  config = small("qwen2_0.5b")
  theirs = torch_models.llm(config)
  params = torch_models.qwen2_params(theirs, config)
  with exceeds_the_bound():
    check(theirs, params, dataclasses.replace(config, **fault))
