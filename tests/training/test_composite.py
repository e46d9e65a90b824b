"""The train step with the real model, tiny: sharding, accumulation and remat change nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from mooer_jax import speech_llm, tree
from mooer_jax.sharding import make_mesh, param_shardings
from mooer_jax.training import step as state_lib
from mooer_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from mooer_jax.training.step import jit_train_step, make_train_step
from tests import tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

STEPS = 5
OPTIMIZER = OptimizerConfig(peak_lr=3e-3, warmup_steps=2, total_steps=100)
# Both halves are then spread over the mesh: the LLM and CMVN frozen, the rest trained.
TRAINED = ("encoders/.*", "connector/.*", "decoder/.*/lora_[ab]")
SIZES = dataclasses.replace(tiny.LLM_CONFIG, vocab_size=64)  # the mesh splits the vocabulary
ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


def start(config):
  """Small NumPy params. `tiny.init` adds noise that makes gradients so steep that one rounding of
  the weights moves them by 2e-4 (here 1e-6), and compiling a real init takes seconds."""
  rng = np.random.default_rng(0)
  flat = {}
  for path, leaf in tree.flatten(
    jax.eval_shape(lambda: speech_llm.init(jax.random.key(0), config))
  ).items():
    if path.endswith(("bias", "shift", "scale")):
      value = np.full(leaf.shape, float(path.endswith("scale")))
    else:
      value = 0.3 * rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2])
    flat[path] = value.astype(leaf.dtype)
  return tree.unflatten(flat)


def batches(config):
  rows = [
    [tiny.row(10 * step + n, frames=12 + n, answer=1 + n, config=config) for n in range(8)]
    for step in range(STEPS)
  ]
  return [tiny.batch(r, frames=20, answer=8) for r in rows]


def losses(mesh_sizes, *, params=None, accumulation=1, remat="none", peak_lr=OPTIMIZER.peak_lr):
  """Curves of five updates, [loss, grad_norm and accuracy], and the params after them."""
  config = tiny.model_config(llm=SIZES, scan=True, remat=remat)
  trainable, frozen = tree.partition(params or start(config), TRAINED)
  optimizer = dataclasses.replace(OPTIMIZER, peak_lr=peak_lr)
  tx = make_optimizer(optimizer)
  state = state_lib.create(trainable, tx, jax.random.key(0))

  def loss_fn(trainable, frozen, batch, key):
    return speech_llm.loss(tree.merge(trainable, frozen), batch, config, dropout_key=key)

  step = make_train_step(loss_fn, tx, schedule=learning_rate(optimizer), accumulation=accumulation)
  size = int(np.prod(list(mesh_sizes.values())))
  mesh = make_mesh(**mesh_sizes, devices=jax.devices()[:size])
  place = lambda params: param_shardings(mesh, params, fsdp_min_size=0)  # noqa: E731
  shardings = state_lib.state_shardings(state, tx, place(trainable))
  train_step = jit_train_step(step, mesh, (shardings, place(frozen)))
  state, frozen = jax.device_put((state, frozen), (shardings, place(frozen)))
  seen = []
  for batch in batches(config):
    state, metrics = train_step(state, frozen, batch)
    seen.append([float(metrics[name]) for name in ("loss", "grad_norm", "accuracy")])
  return np.array(seen).T, jax.device_get(state.trainable)


@pytest.mark.slow
def test_mesh_accumulation_and_remat_change_nothing():
  params = start(tiny.model_config(llm=SIZES, scan=True))
  expected, trained = losses(ONE_DEVICE)
  curves = condition(
    lambda params: dict(enumerate(losses(ONE_DEVICE, params=params)[0][:2])), params
  )
  # The longest sums, over the MLP or a frame's features, in each of five layers, in each step.
  bound = rounding(56 * 5 * STEPS, curves)
  spread = {"data": 2, "fsdp": 2, "tensor": 2}
  got, _ = losses(spread, accumulation=2, remat="full")
  assert_within(dict(enumerate(got[:2])), dict(enumerate(expected[:2])), bound)
  np.testing.assert_array_equal(got[2], expected[2])
  # A learning rate that is 1 % too high is no rounding.
  faulty, _ = losses(ONE_DEVICE, peak_lr=1.01 * OPTIMIZER.peak_lr)
  with exceeds_the_bound():
    assert_within(dict(enumerate(faulty[:2])), dict(enumerate(expected[:2])), bound)

  # The comparison would hold for a step that does nothing, too.
  before, _ = tree.partition(start(tiny.model_config(llm=SIZES, scan=True)), TRAINED)
  for path, leaf in tree.flatten(trained).items():
    assert np.any(leaf != tree.flatten(before)[path]), path
