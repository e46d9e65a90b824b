"""Loss, gradients and Adam updates against funasr + torch + peft on the same batch."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch

from mooer_jax import speech_llm, tree
from mooer_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests import tiny
from tests.parity import torch_models

LLM = dataclasses.replace(tiny.LLM_CONFIG, hidden_size=40, lora_rank=8, lora_alpha=16.0)
CONFIG = tiny.model_config(llm=LLM, scan=True, remat="full")
TRAINABLE = ("connector/.*", "decoder/.*/lora_[ab]")
ROWS = [
  tiny.row(0, frames=21, after=6, answer=5),
  tiny.row(1, frames=8, after=4, answer=9),
  tiny.row(2, frames=14, after=6, answer=2),
]
# Relative to the size of a tensor; float32 sums in another order differ by about 1e-6.
TOLERANCE = 1e-4
STEPS = 10


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
    self.llm = torch_models.with_lora(torch_models.qwen2(LLM), LLM, zero_b=zero_b)

  def row_loss(self, features, before, after, answer):
    """Summed cross-entropy of one row's answer."""
    assert not len(before)
    frames, *_ = self.encoder(torch.tensor(features)[None], torch.tensor([len(features)]))
    even = len(features) // 2 * 2
    speech = self.adapter(frames[:, :even].reshape(1, even // 2, -1))
    tokens = torch.tensor(np.concatenate([after, answer]))[None]
    embedded = torch.cat([speech, self.llm.get_input_embeddings()(tokens)], dim=1)
    logits = self.llm(inputs_embeds=embedded).logits[0, -len(answer) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")

  def loss(self):
    return sum(self.row_loss(*row) for row in ROWS) / sum(len(row[3]) for row in ROWS)

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


def assert_close(ours, theirs, what):
  """Compares each tensor by its norm."""
  ours, theirs = tree.flatten(ours), tree.flatten(theirs)
  assert ours.keys() == theirs.keys()
  errors = {}
  for path, expected in theirs.items():
    size = np.linalg.norm(expected) or 1.0  # at B = 0 the gradient of A is zero
    errors[path] = np.linalg.norm(ours[path] - expected) / size
  worst = max(errors, key=errors.get)
  print(f"{what}: worst relative error {errors[worst]:.1e}, {worst}")
  assert errors[worst] <= TOLERANCE, (what, worst, errors[worst])


@pytest.mark.parametrize("zero_b", [True, False], ids=["fresh LoRA", "LoRA in use"])
def test_ten_adam_updates_equal_torch_and_peft(zero_b):
  theirs = TorchSpeechLLM(zero_b)
  trainable, frozen = theirs.params()
  start = tree.flatten(trainable)
  adam = torch.optim.Adam(
    [p for p in theirs.parameters() if p.requires_grad], lr=1e-4, betas=(0.9, 0.999)
  )
  config = OptimizerConfig(peak_lr=1e-4, warmup_steps=0, decay="constant")
  optimizer = make_optimizer(config)
  state = optimizer.init(trainable)
  batch = tiny.batch(ROWS, frames=24, after=9, answer=11)  # padded beyond every row

  @jax.jit
  def step(trainable, state):
    def value(trainable):
      return speech_llm.loss(tree.merge(trainable, frozen), batch, CONFIG)[0]

    loss, grads = jax.value_and_grad(value)(trainable)
    updates, state = optimizer.update(grads, state, trainable)
    return loss, grads, optax.apply_updates(trainable, updates), state

  for n in range(STEPS):
    loss, grads, trainable, state = step(trainable, state)
    adam.zero_grad()
    expected = theirs.loss()
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=TOLERANCE)
    if n in (0, STEPS - 1):
      print(f"step {n}: loss {loss:.6f}, torch {expected.item():.6f}")
      assert_close(grads, theirs.params(zero_if_none)[0], f"gradients of step {n}")
    adam.step()
  after, _ = theirs.params()
  assert_close(trainable, after, f"parameters after {STEPS} updates")
  moved = [
    tree.unflatten({k: v - start[k] for k, v in tree.flatten(x).items()})
    for x in (trainable, after)
  ]
  assert_close(*moved, f"the sum of {STEPS} updates")
