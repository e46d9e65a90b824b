import dataclasses
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
)
from tests.numerics import assert_as_accurate, assert_within, exceeds_the_bound, rounding

# A rate is a handful of float32 operations, with a logarithm or cosine that is good to 2 ulp.
OPERATIONS = 8
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
    if config.max_grad_norm:
      torch.nn.utils.clip_grad_norm_(list(params.values()), config.max_grad_norm)
    for group in optimizer.param_groups:
      group["lr"] = float(lr(step))
    optimizer.step()
  return params


REFERENCES = {
  "adam": (OptimizerConfig(**FAST), torch.optim.Adam),
  "clip": (OptimizerConfig(**FAST, warmup="linear", max_grad_norm=0.5), torch.optim.Adam),
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
    ("clip", {"max_grad_norm": 0}),
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
    {"max_grad_norm": -1.0},
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
  return learning_rate(OptimizerConfig(**{**defaults, **changes}))


def test_mooers_published_learning_rate():
  # The training log of the release: five digits.
  assert f"{float(schedule()(600)):.4e}" == "9.2605e-05"


def test_log_warmup_starts_at_zero_and_follows_the_logarithm():
  lr = schedule()
  assert float(lr(0)) == 0.0
  assert float(lr(1)) == 0.0
  for step in (2, 10, 999):
    expected = 1e-4 * math.log(step) / math.log(1000)
    assert_within(lr(step), expected, rounding(OPERATIONS, expected))
    with exceeds_the_bound():
      assert_within(lr(step + 1), expected, rounding(OPERATIONS, expected))


def test_linear_decay_is_continuous_and_ends_at_zero():
  lr = schedule()
  bound = rounding(OPERATIONS, 1e-4)
  assert_within(lr(1000), 1e-4, bound)
  assert_within(lr(500_500), 0.5e-4, bound)
  with exceeds_the_bound():
    assert_within(lr(500_600), 0.5e-4, bound)
  assert float(lr(1_000_000)) == 0.0
  assert float(lr(2_000_000)) == 0.0


@pytest.mark.parametrize(
  ("decay", "half", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_linear_warmup_with_each_decay(decay, half, end):
  lr = schedule(peak_lr=2.0, warmup="linear", warmup_steps=10, total_steps=110, decay=decay)
  values = [float(lr(step)) / 2 for step in (0, 5, 10, 60, 110)]
  assert_within(values, [0, 0.5, 1, half, end], rounding(OPERATIONS))


def test_exponential_decay_falls_by_equal_shares_to_its_end():
  lr = schedule(
    peak_lr=2.0, end_lr=0.5, warmup="linear", warmup_steps=10, total_steps=110, decay="exponential"
  )
  values = [float(lr(step)) for step in (5, 10, 60, 110, 200)]
  assert_within(values, [1, 2, 1, 0.5, 0.5], rounding(OPERATIONS, 2))


@pytest.mark.parametrize("warmup_steps", [0, 1, 2])
@pytest.mark.parametrize("warmup", ["log", "linear"])
def test_tiny_warmups_reach_the_peak(warmup, warmup_steps):
  lr = schedule(warmup=warmup, warmup_steps=warmup_steps, decay="constant")
  assert_within(lr(warmup_steps), 1e-4, rounding(OPERATIONS, 1e-4))


def test_a_traced_step_gives_the_same_rate():
  assert_within(jax.jit(schedule())(600), schedule()(600), rounding(OPERATIONS, 1e-4))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"warmup": "cubic"}, "warmup='cubic'"),
    ({"decay": "step"}, "decay='step'"),
    ({"decay": "exponential"}, "end_lr=0 is never reached .* set optimizer.end_lr above 0"),
    ({"warmup_steps": -1}, "warmup_steps=-1"),
    ({"total_steps": 1000}, "total_steps=1000 leaves no room"),
  ],
)
def test_impossible_schedules_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    schedule(**changes)


def test_salmonns_schedule():
  """Its scheduler: linear from 1e-6 to 3e-5, then a cosine to 1e-5 that counts from step 0."""
  rate = schedule(
    peak_lr=3e-5, warmup_steps=3000, total_steps=90_000, warmup="linear",
    decay="cosine_from_start", start_lr=1e-6, end_lr=1e-5,
  )  # fmt: skip
  bound = rounding(OPERATIONS, 3e-5)
  for step in (0, 1, 1500, 2999):
    assert_within(rate(step), 1e-6 + (3e-5 - 1e-6) * step / 3000, bound)
  for step in (3000, 3001, 45_000, 89_999, 90_000):
    cosine = 0.5 * (1 + math.cos(math.pi * step / 90_000))
    assert_within(rate(step), 1e-5 + (3e-5 - 1e-5) * cosine, bound)
  with exceeds_the_bound():  # one that counts from the end of the warmup
    assert_within(rate(45_000), 1e-5 + 1e-5 * (1 + math.cos(math.pi * 42 / 87)), bound)
  with pytest.raises(ValueError, match="end_lr=0.001 must be between 0 and peak_lr=0.0001"):
    schedule(end_lr=1e-3)
