"""Loss, gradients and Adam updates against funasr + torch + peft on the same batch."""

import contextlib
import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch

from mooer_jax import speech_llm, tree
from mooer_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests import tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding
from tests.parity import torch_models

LLM = dataclasses.replace(tiny.LLM_CONFIG, hidden_size=40, lora_rank=8, lora_alpha=16.0)
CONFIG = tiny.model_config(llm=LLM, scan=True, remat="full")
TRAINABLE = ("connector/.*", "decoder/.*/lora_[ab]")
ROWS = [
  tiny.row(0, frames=21, after=6, answer=5),
  tiny.row(1, frames=8, after=4, answer=9),
  tiny.row(2, frames=14, after=6, answer=2),
]
BATCH = tiny.batch(ROWS, frames=24, after=9, answer=11)  # padded beyond every row
OPTIMIZER = OptimizerConfig(peak_lr=1e-4, warmup_steps=0, decay="constant")
ADAM = make_optimizer(OPTIMIZER)
STEPS = 10
LAYERS = 3 + 2 + 2  # of the encoder, the connector and the LLM, each of which rounds


class TorchSpeechLLM(torch.nn.Module):
  """MooER as plain PyTorch, one row at a time: no padding to get wrong."""

  def __init__(self, zero_b):
    super().__init__()
    sanm, linear = CONFIG.encoders[0], CONFIG.connector
    self.encoder = torch_models.sanm(sanm).requires_grad_(False)
    torch.manual_seed(1)
    self.adapter = torch.nn.Sequential(
      torch.nn.Linear(linear.stack * sanm.hidden_size, linear.hidden_size),
      torch.nn.ReLU(),
      torch.nn.Linear(linear.hidden_size, LLM.hidden_size),
    )
    self.llm = torch_models.with_lora(torch_models.llm(LLM), LLM, zero_b=zero_b)

  def row_loss(self, features, before, after, answer, dtype):
    """Summed cross-entropy of one row's answer."""
    assert not len(before)
    frames, *_ = self.encoder(
      torch.tensor(features, dtype=dtype)[None], torch.tensor([len(features)])
    )
    even = len(features) // 2 * 2
    speech = self.adapter(frames[:, :even].reshape(1, even // 2, -1))
    tokens = torch.tensor(np.concatenate([after, answer]))[None]
    embedded = torch.cat([speech, self.llm.get_input_embeddings()(tokens)], dim=1)
    logits = self.llm(inputs_embeds=embedded).logits[0, -len(answer) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")

  def loss(self, dtype):
    return sum(self.row_loss(*row, dtype) for row in ROWS) / sum(len(row[3]) for row in ROWS)

  def params(self, value=lambda parameter: parameter) -> dict:
    """Our tree of the parameters, or of what `value` makes of them."""
    named = lambda module: {n: value(p) for n, p in module.named_parameters()}  # noqa: E731
    zeros = np.zeros(CONFIG.encoders[0].input_width, np.float32)
    nested = {
      "frontend": {"sanm": {"shift": zeros, "scale": zeros + 1}},
      "encoders": {"sanm": torch_models.params(named(self.encoder), torch_models.SANM_NAMES)},
      "connector": torch_models.params(named(self.adapter), torch_models.ADAPTER_NAMES),
      "decoder": torch_models.params(named(self.llm), torch_models.QWEN2_NAMES),
    }
    return tree.partition(tree.stack_layers(nested), TRAINABLE)


def zero_if_none(parameter):
  return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def torch_outcome(zero_b, dtype):
  """(start, outcome) of ten updates in PyTorch: see `outcome`; `start` is (trainable, frozen)."""
  theirs = TorchSpeechLLM(zero_b)
  start = theirs.params()
  theirs.to(dtype)
  adam = torch.optim.Adam(
    [p for p in theirs.parameters() if p.requires_grad],
    lr=OPTIMIZER.peak_lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps,
  )  # fmt: skip
  losses, gradients = [], []
  with torch_models.Float64() if dtype == torch.float64 else contextlib.nullcontext():
    for _ in range(STEPS):
      adam.zero_grad()
      loss = theirs.loss(dtype)
      loss.backward()
      losses.append(loss.item())
      gradients.append(theirs.params(zero_if_none)[0])
      adam.step()
  return start, (np.array(losses), gradients[0], gradients[-1], theirs.params()[0])


@jax.jit
def step(trainable, frozen, state):
  def loss(trainable):
    return speech_llm.loss(tree.merge(trainable, frozen), BATCH, CONFIG)[0]

  value, grads = jax.value_and_grad(loss)(trainable)
  updates, state = ADAM.update(grads, state, trainable)
  return value, grads, optax.apply_updates(trainable, updates), state


def outcome(trainable, frozen):
  """Ten losses, the gradients of the first and the last step, and the parameters after it."""
  losses, gradients, state = [], [], ADAM.init(trainable)
  for _ in range(STEPS):
    loss, grads, trainable, state = step(trainable, frozen, state)
    losses.append(loss)
    gradients.append(grads)
  return np.array(losses), gradients[0], gradients[-1], trainable


@pytest.fixture(scope="module", params=[True, False], ids=["fresh LoRA", "LoRA in use"])
def sides(request):
  """The parameters at the start, torch's outcome in float64, and the bound on our error."""
  start, theirs = torch_outcome(request.param, torch.float32)
  _, truth = torch_outcome(request.param, torch.float64)
  # Adam divides by the gradient's size, so that rounding moves an element whose gradient is near 0
  # by a share of the learning rate: `condition` has this in it.
  scale = condition(outcome, *start)
  bound = jax.tree.map(
    lambda their, exact, scale: 2 * np.abs(their - exact).max() + rounding(STEPS * LAYERS, scale),
    theirs, truth, scale,
  )  # fmt: skip
  return start, truth, bound


def test_ten_adam_updates_equal_torch_and_peft(sides):
  start, truth, bound = sides
  assert_within(outcome(*start), truth, bound)


@pytest.mark.parametrize("fault", ["connector", "encoders"])
def test_a_fault_exceeds_the_bound(sides, fault):
  """Learned or frozen values that are 0.1 % too large."""
  start, truth, bound = sides
  larger = lambda x: x * np.float32(1.001)  # noqa: E731
  start = [
    {**part, fault: jax.tree.map(larger, part[fault])} if fault in part else part for part in start
  ]
  with exceeds_the_bound():
    assert_within(outcome(*start)[:3], truth[:3], bound[:3])
