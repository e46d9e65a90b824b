import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mooer_jax import tree
from mooer_jax.training.optimizer import OptimizerConfig, decays, learning_rate, make_optimizer

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


def run_torch(config, params, gradients, optimizer):
  params = {path: torch.tensor(leaf) for path, leaf in tree.flatten(params).items()}
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
      params[path].grad = torch.tensor(gradient)
    if config.grad_clip:
      torch.nn.utils.clip_grad_norm_(list(params.values()), config.grad_clip)
    for group in optimizer.param_groups:
      group["lr"] = float(lr(step))
    optimizer.step()
  return params


@pytest.mark.parametrize(
  ("config", "reference"),
  [
    (OptimizerConfig(**FAST), torch.optim.Adam),
    (OptimizerConfig(**FAST, warmup="linear", grad_clip=0.5), torch.optim.Adam),
    (OptimizerConfig(**FAST, weight_decay=0.1), torch.optim.AdamW),
  ],
  ids=["adam", "clip", "adamw"],
)
def test_ten_updates_equal_torch(config, reference):
  gradients = [toy(seed) for seed in range(1, 11)]
  ours = tree.flatten(run_optax(config, toy(), gradients))
  theirs = run_torch(config, toy(), gradients, reference)
  for path, leaf in ours.items():
    # float32 params of size 1; optax corrects the moments' start in float32, torch in float64
    np.testing.assert_allclose(leaf, theirs[path], rtol=1e-6, atol=1e-6, err_msg=path)
    moved = np.abs(theirs[path].numpy() - tree.flatten(toy())[path]).max()
    assert moved > 1e-2  # else the comparison would hold for an optimizer that does nothing


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
