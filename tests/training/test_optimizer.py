import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mooer_jax import tree
from mooer_jax.training.optimizer import (
  OptimizerConfig,
  decays,
  learning_rate,
  make_optimizer,
  make_schedule,
)

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


def schedule(**changes):
  defaults = {"peak_lr": 1e-4, "warmup_steps": 1000, "total_steps": 1_000_000}
  return make_schedule(**{**defaults, **changes})


def test_mooers_published_learning_rate():
  # The training log of the release: five digits.
  assert f"{float(schedule()(600)):.4e}" == "9.2605e-05"


def test_log_warmup_starts_at_zero_and_follows_the_logarithm():
  lr = schedule()
  assert float(lr(0)) == 0.0
  assert float(lr(1)) == 0.0
  for step in (2, 10, 999):
    # float32 logarithm: a few units in the last place
    assert float(lr(step)) == pytest.approx(1e-4 * math.log(step) / math.log(1000), rel=1e-6)


def test_linear_decay_is_continuous_and_ends_at_zero():
  lr = schedule()
  assert float(lr(1000)) == pytest.approx(1e-4, rel=1e-6)
  assert float(lr(500_500)) == pytest.approx(0.5e-4, rel=1e-5)
  assert float(lr(1_000_000)) == 0.0
  assert float(lr(2_000_000)) == 0.0


@pytest.mark.parametrize(
  ("decay", "half", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_linear_warmup_with_each_decay(decay, half, end):
  lr = schedule(peak_lr=2.0, warmup="linear", warmup_steps=10, total_steps=110, decay=decay)
  values = [float(lr(step)) / 2 for step in (0, 5, 10, 60, 110)]
  assert values == pytest.approx([0, 0.5, 1, half, end], abs=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 1, 2])
@pytest.mark.parametrize("warmup", ["log", "linear"])
def test_tiny_warmups_reach_the_peak(warmup, warmup_steps):
  lr = schedule(warmup=warmup, warmup_steps=warmup_steps, decay="constant")
  assert float(lr(warmup_steps)) == pytest.approx(1e-4, rel=1e-6)


def test_a_traced_step_gives_the_same_rate():
  assert float(jax.jit(schedule())(600)) == pytest.approx(float(schedule()(600)), rel=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"warmup": "cubic"}, "warmup='cubic'"),
    ({"decay": "step"}, "decay='step'"),
    ({"warmup_steps": -1}, "warmup_steps=-1"),
    ({"total_steps": 1000}, "total_steps=1000 leaves no room"),
  ],
)
def test_impossible_schedules_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    schedule(**changes)


def test_salmonns_schedule():
  """Its scheduler: linear from 1e-6 to 3e-5, then a cosine to 1e-5 that counts from step 0."""
  schedule = make_schedule(
    peak_lr=3e-5, warmup_steps=3000, total_steps=90_000, warmup="linear",
    decay="cosine_from_start", start_lr=1e-6, end_lr=1e-5,
  )  # fmt: skip
  for step in (0, 1, 1500, 2999):
    np.testing.assert_allclose(schedule(step), 1e-6 + (3e-5 - 1e-6) * step / 3000, rtol=1e-5)
  for step in (3000, 3001, 45_000, 89_999, 90_000):
    cosine = 0.5 * (1 + math.cos(math.pi * step / 90_000))
    np.testing.assert_allclose(schedule(step), 1e-5 + (3e-5 - 1e-5) * cosine, rtol=1e-5)
  with pytest.raises(ValueError, match="end_lr=0.001 must lie"):
    make_schedule(peak_lr=1e-4, warmup_steps=1, total_steps=9, end_lr=1e-3)
