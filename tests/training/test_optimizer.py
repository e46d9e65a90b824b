import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mooer_jax import tree
from mooer_jax.training.optimizer import OptimizerConfig, decays, learning_rate, make_optimizer
from tests.numerics import assert_as_accurate, exceeds_the_bound, rounding

FAST = {"warmup_steps": 4, "total_steps": 40, "peak_lr": 1e-2}


def toy(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "layers": {
      "norm": {"scale": rng.normal(size=(2, 3)).astype(np.float32)},
      "up": {
        "kernel": rng.normal(size=(2, 3, 5)).astype(np.float32),
        "bias": rng.normal(size=(2, 5)).astype(np.float32),
        "lora_a": rng.normal(size=(2, 3, 1)).astype(np.float32),
      },
    }
  }


def run_optax(config, params, gradients):
  tx = make_optimizer(config)
  state, update = tx.init(params), jax.jit(tx.update)
  for grads in gradients:
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def run_torch(config, params, gradients, optimizer, dtype=torch.float32):
  params = {path: torch.tensor(leaf, dtype=dtype) for path, leaf in tree.flatten(params).items()}
  lr = learning_rate(config)
  plain = [p for path, p in params.items() if path.endswith(("scale", "bias"))]
  others = [p for path, p in params.items() if not path.endswith(("scale", "bias"))]
  groups = [
    {"params": plain, "weight_decay": 0.0},
    {"params": others, "weight_decay": config.weight_decay},
  ]
  optimizer = optimizer(groups, betas=config.betas, eps=config.eps)
  for step, grads in enumerate(gradients):
    for path, gradient in tree.flatten(grads).items():
      params[path].grad = torch.tensor(gradient, dtype=dtype)
    if config.grad_clip:
      torch.nn.utils.clip_grad_norm_(list(params.values()), config.grad_clip)
    for group in optimizer.param_groups:
      group["lr"] = float(lr(step))
    optimizer.step()
  return params


REFERENCES = {
  "adam": (OptimizerConfig(**FAST), torch.optim.Adam),
  "clip": (OptimizerConfig(**FAST, warmup="linear", grad_clip=0.5), torch.optim.Adam),
  "adamw": (OptimizerConfig(**FAST, weight_decay=0.1), torch.optim.AdamW),
}
GRADIENTS = [toy(seed) for seed in range(1, 11)]


def assert_equals_torch(config, reference, *, ours):
  """Compares params after ten updates; `ours` is the config of our side."""
  found = tree.flatten(run_optax(ours, toy(), GRADIENTS))
  theirs, truth = (
    run_torch(config, toy(), GRADIENTS, reference, dtype)
    for dtype in (torch.float32, torch.float64)
  )
  for path, leaf in found.items():
    # Ten updates are added to params of this size. Each is of size lr and rounds as 1 - beta2^t
    # does, which is near 0: optax computes it in float32, torch in float64.
    scale = np.abs(truth[path].numpy()).max() + config.peak_lr / (1 - config.betas[1])
    floor = rounding(len(GRADIENTS), scale)
    assert_as_accurate(leaf, theirs[path].numpy(), truth[path].numpy(), floor=floor)


@pytest.mark.parametrize("name", REFERENCES)
def test_ten_updates_equal_torch(name):
  config, reference = REFERENCES[name]
  assert_equals_torch(config, reference, ours=config)


@pytest.mark.parametrize(
  ("name", "fault"),
  [
    ("adam", {"betas": (0.9, 0.95)}),
    ("adam", {"betas": (0.89, 0.999)}),
    ("adam", {"eps": 1e-2}),
    ("adam", {"peak_lr": 1.01e-2}),
    ("clip", {"grad_clip": 0}),
    ("clip", {"warmup_steps": 5}),
    ("adamw", {"weight_decay": 0.11}),
  ],
  ids=str,
)
def test_an_update_with_another_setting_does_not_equal_torch(name, fault):
  config, reference = REFERENCES[name]
  with exceeds_the_bound():
    assert_equals_torch(config, reference, ours=dataclasses.replace(config, **fault))


def test_the_first_two_updates_of_mooers_warmup_change_nothing():
  params = run_optax(OptimizerConfig(), toy(), [toy(1), toy(2)])
  jax.tree.map(np.testing.assert_array_equal, params, toy())


def test_weight_decay_leaves_norms_and_biases_alone_in_stacked_layers_too():
  assert tree.flatten(decays(toy())) == {
    "layers/norm/scale": False,
    "layers/up/bias": False,
    "layers/up/kernel": True,
    "layers/up/lora_a": True,
  }


def test_moments_are_float32_and_lie_beside_the_params():
  state = jax.eval_shape(make_optimizer(OptimizerConfig()).init, toy())
  shapes = [leaf.shape for leaf in jax.tree.leaves(toy())]
  assert [leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape] == 2 * shapes
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.shape)


@pytest.mark.parametrize(
  "changes",
  [
    {"betas": (0.9, 1.0)},
    {"eps": -1.0},
    {"grad_clip": -1.0},
    {"decay": "step"},
    {"total_steps": 10},
  ],
  ids=lambda changes: next(iter(changes)),
)
def test_impossible_settings_are_refused_by_name(changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    OptimizerConfig(**changes)
