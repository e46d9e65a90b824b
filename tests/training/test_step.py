import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mooer_jax import tree
from mooer_jax.sharding import batch_sharding, make_mesh, param_shardings
from mooer_jax.training import step as state_lib
from mooer_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from mooer_jax.training.step import (
  BadStepError,
  check_step,
  jit_train_step,
  make_train_step,
)
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

CONFIG = OptimizerConfig(peak_lr=1e-2, warmup_steps=3, total_steps=50)
D, M, ROWS, STEPS = 512, 256, 8, 6


def toy_params(seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return (rng.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float32)

  return {
    "connector": {"linear1": {"kernel": normal(D, M), "bias": np.zeros(M, np.float32)}},
    "decoder": {"head": {"kernel": normal(M, D)}},
  }


def toy_batch(seed, rows=ROWS):
  rng = np.random.default_rng(seed)
  answers = rng.integers(0, D, size=(rows, 5)).astype(np.int32)
  answers[np.arange(5) > rng.integers(0, 5, size=(rows, 1))] = -1  # rows of uneven length
  return {"x_BD": rng.normal(size=(rows, D)).astype(np.float32), "labels_BS": answers}


def toy_loss(trainable, frozen, batch, key, dropout=0.0):
  params = tree.merge(trainable, frozen)
  linear1 = params["connector"]["linear1"]
  hidden_BM = jnp.tanh(batch["x_BD"] @ linear1["kernel"] + linear1["bias"])
  if dropout:
    hidden_BM *= jax.random.bernoulli(key, 1 - dropout, hidden_BM.shape)
  logp_BV = jax.nn.log_softmax(hidden_BM @ params["decoder"]["head"]["kernel"])
  labels_BS = batch["labels_BS"]
  valid_BS = labels_BS >= 0
  logp_BS = jnp.take_along_axis(logp_BV, jnp.maximum(labels_BS, 0), axis=1)
  loss_sum = -jnp.sum(logp_BS * valid_BS)
  tokens = jnp.sum(valid_BS)
  correct = jnp.sum((jnp.argmax(logp_BV, -1)[:, None] == labels_BS) & valid_BS)
  return loss_sum / tokens, {
    "loss_sum": loss_sum,
    "tokens": tokens,
    "correct": correct,
    "rows": jnp.int32(valid_BS.shape[0]),
  }


def build(accumulation=1, loss_fn=toy_loss, patterns=("connector/.*",), **options):
  tx = make_optimizer(CONFIG)
  trainable, frozen = tree.partition(toy_params(), patterns)
  state = state_lib.create(jax.tree.map(jnp.asarray, trainable), tx, jax.random.key(0))
  schedule = learning_rate(CONFIG)
  step = make_train_step(loss_fn, tx, schedule=schedule, accumulation=accumulation, **options)
  return state, frozen, step, tx


def run(step, state, frozen, batches):
  step, seen = jax.jit(step), []
  for batch in batches:
    state, metrics = step(state, frozen, batch)
    seen.append(jax.device_get(metrics))
  return state, seen


def outcome(step, state, frozen, batches):
  """The curves of a run and the params after it."""
  state, metrics = run(step, state, frozen, batches)
  curves = {name: np.array([m[name] for m in metrics]) for name in ("loss", "grad_norm")}
  return {**curves, "trainable": jax.device_get(state.trainable)}


def outcome_bound(step, state, frozen, batches):
  """Bound on what rounding changes of `outcome`.

  Adam divides by the gradient's size, so that rounding moves an element whose gradient is near 0
  by a share of the learning rate: `condition` has this in it. The longest sum has D terms.
  """

  def moved(trainable, frozen, batches):
    return outcome(step, dataclasses.replace(state, trainable=trainable), frozen, batches)

  return rounding(D * len(batches), condition(moved, state.trainable, frozen, batches))


def mean_loss(trainable, frozen, batch, key):
  """A faulty loss: micro-batches with few tokens count as much as those with many."""
  mean, sums = toy_loss(trainable, frozen, batch, key)
  return mean, {**sums, "loss_sum": mean, "tokens": jnp.int32(1)}


def test_accumulation_equals_one_big_batch():
  batches = [toy_batch(seed) for seed in range(STEPS)]
  state, frozen, step, _ = build()
  whole = outcome(step, state, frozen, batches)
  bound = outcome_bound(step, state, frozen, batches)
  _, whole_metrics = run(step, state, frozen, batches)
  for accumulation in (2, 4):
    state, frozen, step, _ = build(accumulation)
    assert_within(outcome(step, state, frozen, batches), whole, bound)
    _, metrics = run(step, state, frozen, batches)
    for one, other in zip(whole_metrics, metrics, strict=True):
      assert other["tokens"] == one["tokens"]
      assert other["accuracy"] == one["accuracy"]
      assert other["rows"] == ROWS
  _, _, faulty, _ = build(2, loss_fn=mean_loss)
  found = outcome(faulty, state, frozen, batches)
  for name in whole:
    with exceeds_the_bound():
      assert_within(found[name], whole[name], bound[name])


def test_metrics_are_those_of_the_loss_per_token():
  state, frozen, step, _ = build()
  batches = [toy_batch(seed) for seed in range(3)]
  loss, sums = toy_loss(state.trainable, frozen, batches[0], None)
  gradient = jax.grad(lambda t: toy_loss(t, frozen, batches[0], None)[0])(state.trainable)
  _, metrics = run(step, state, frozen, batches)
  bound = outcome_bound(step, state, frozen, batches[:1])
  assert_within(metrics[0]["loss"], loss, bound["loss"])
  assert metrics[0]["accuracy"] == np.float32(sums["correct"]) / np.float32(sums["tokens"])
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
  assert_within(metrics[0]["grad_norm"], norm, bound["grad_norm"])
  with exceeds_the_bound():
    assert_within(metrics[0]["loss"], 1.001 * loss, bound["loss"])
  with exceeds_the_bound():
    assert_within(metrics[0]["grad_norm"], 1.001 * norm, bound["grad_norm"])
  assert [int(m["step"]) for m in metrics] == [1, 2, 3]
  rates = [float(learning_rate(CONFIG)(n)) for n in range(3)]
  assert_within([m["lr"] for m in metrics], rates, rounding(4, CONFIG.peak_lr))


def test_the_loss_falls_and_frozen_params_take_no_gradient():
  state, frozen, step, tx = build()
  assert tree.flatten(frozen).keys() == {"decoder/head/kernel"}
  moments = [leaf for leaf in jax.tree.leaves(tx.init(state.trainable)) if leaf.ndim]
  assert len(moments) == 2 * len(jax.tree.leaves(state.trainable))
  _, metrics = run(step, state, frozen, [toy_batch(0)] * 20)
  assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]


def test_sharding_changes_nothing():
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  batches = [toy_batch(seed) for seed in range(5)]
  patterns = ("connector/.*", "decoder/.*")
  state, frozen, step, tx = build(2, patterns=patterns)
  one = outcome(step, state, frozen, batches)["loss"]
  bound = outcome_bound(step, state, frozen, batches)["loss"]

  shardings = state_lib.state_shardings(state, tx, param_shardings(mesh, state.trainable))
  state = jax.device_put(state, shardings)
  # linear1 lies over tensor, the head over fsdp and tensor, and Adam's moments lie like them.
  parts = {
    jax.tree_util.keystr(path): leaf.size // leaf.addressable_shards[0].data.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if leaf.ndim == 2
  }
  assert all(count == (2 if "linear1" in name else 4) for name, count in parts.items())
  assert len(parts) == 4
  sharded = jit_train_step(step, mesh, (shardings, param_shardings(mesh, frozen)))
  for batch, expected in zip(batches, one, strict=True):
    state, metrics = sharded(state, frozen, jax.device_put(batch, batch_sharding(mesh)))
    assert_within(metrics["loss"], expected, bound)
  assert state.trainable["connector"]["linear1"]["kernel"].sharding.spec == P(None, "tensor")


def test_the_state_that_goes_in_is_given_up():
  mesh = make_mesh(devices=jax.devices()[:1])
  state, frozen, step, tx = build()
  shardings = state_lib.state_shardings(state, tx, param_shardings(mesh, state.trainable))
  state = jax.device_put(state, shardings)
  jit_train_step(step, mesh, (shardings, param_shardings(mesh, frozen)))(
    state, frozen, toy_batch(0)
  )
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))


def test_dropout_differs_by_step_and_micro_batch_and_repeats_on_resume():
  dropped = functools.partial(toy_loss, dropout=0.5)
  same = [toy_batch(3)] * 3  # lr is 0 in the first two updates, so only the key differs
  state, frozen, step, _ = build(loss_fn=dropped)
  final, metrics = run(step, state, frozen, same)
  assert metrics[0]["loss"] != metrics[1]["loss"]

  middle, _ = run(step, state, frozen, same[:1])
  resumed, again = run(step, middle, frozen, same[1:])
  assert [m["loss"] for m in again] == [m["loss"] for m in metrics[1:]]
  jax.tree.map(np.testing.assert_array_equal, resumed, final)

  def keys(trainable, frozen, batch, key):
    return 0.0, {
      "loss_sum": 0.0 * jnp.sum(trainable["connector"]["linear1"]["bias"]),
      "tokens": jnp.int32(1),
      "correct": jnp.int32(0),
      "draw": jax.random.uniform(key),
    }

  draws = []
  for accumulation in (1, 2):
    state, frozen, step, _ = build(accumulation, loss_fn=keys)
    draws.append(run(step, state, frozen, same[:1])[1][0]["draw"])
  assert abs(draws[1] - 2 * draws[0]) > 1e-6  # the second micro-batch draws anew


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_spares_the_state(bad):
  state, frozen, step, _ = build()
  good, metrics = run(step, state, frozen, [toy_batch(0)] * 4)
  check_step(metrics[-1], 0)
  broken = toy_batch(1)
  broken["x_BD"][0, 0] = bad
  after, metrics = run(step, good, frozen, [broken])
  with pytest.raises(BadStepError, match="step 5: loss .* gradient norm nan") as error:
    check_step(metrics[0], 0)
  assert error.value.step == 5
  assert_same_weights(after, good)


def assert_same_weights(one, other):
  for name in ("trainable", "opt_state"):
    jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(other, name))


def nan_batch(seed):
  return toy_batch(seed) | {"x_BD": np.full((ROWS, D), np.nan, np.float32)}


def test_a_skipped_step_counts_but_changes_neither_params_nor_optimizer_nor_learning_rate():
  state, frozen, step, _ = build()
  good = [toy_batch(seed) for seed in range(4)]
  without, _ = run(step, state, frozen, good)
  after, metrics = run(step, state, frozen, [*good[:2], nan_batch(7), nan_batch(8), *good[2:]])
  assert_same_weights(after, without)
  assert [int(m["step"]) for m in metrics] == [1, 2, 3, 4, 5, 6]
  assert [int(m["bad_steps"]) for m in metrics] == [0, 0, 1, 2, 0, 0]
  assert int(after.step) == 6 and int(after.bad.total) == 2
  rates = [m["lr"] for m in metrics]
  assert rates == [learning_rate(CONFIG)(step) for step in (0, 1, 2, 2, 2, 3)]
  check_step(metrics[3], 2)
  with pytest.raises(BadStepError, match="step 4: .*, 2 bad steps in a row with train.max_bad_ste"):
    check_step(metrics[3], 1)


def scaled_loss(trainable, frozen, batch, key):
  """The toy loss, times a factor of the batch."""
  mean, sums = toy_loss(trainable, frozen, batch, key)
  return mean, {**sums, "loss_sum": sums["loss_sum"] * batch["factor_B"][0]}


@pytest.mark.parametrize("ratio, is_bad", [(2.0, True), (8.0, False), (0.0, False)])
def test_a_loss_above_the_limit_is_skipped(ratio, is_bad):
  """The toy loss changes little in four steps, so a factor of 4 is above 2 and below 8."""
  state, frozen, step, _ = build(loss_fn=scaled_loss, max_loss_ratio=ratio)
  factors = np.ones((4, ROWS), np.float32)
  factors[2] = 4
  batches = [toy_batch(seed) | {"factor_B": row} for seed, row in enumerate(factors)]
  after, metrics = run(step, state, frozen, batches)
  assert [int(m["bad_steps"]) for m in metrics] == [0, 0, int(is_bad), 0]
  losses = [m["loss"] for m, row in zip(metrics, factors) if row[0] == 1 or not is_bad]
  mean = losses[0]
  for loss in losses[1:]:
    mean = mean + (loss - mean) * np.float32(0.01)
  # The mean is a sum of few terms of one sign, in another order than XLA's.
  np.testing.assert_allclose(after.bad.mean_loss, mean, rtol=16 * np.finfo(np.float32).eps)
  if is_bad:
    with pytest.raises(BadStepError, match="step 3: loss .* exceeds train.max_loss_ratio times"):
      check_step(metrics[2], 0)


def test_the_first_loss_has_no_limit():
  state, frozen, step, _ = build(max_loss_ratio=1.5)
  _, metrics = run(step, state, frozen, [nan_batch(0), toy_batch(1)])
  assert [int(m["bad_steps"]) for m in metrics] == [1, 0]


def test_rows_that_do_not_divide_are_refused():
  state, frozen, step, _ = build(accumulation=3)
  with pytest.raises(ValueError, match="8 rows .* accumulation=3"):
    jax.eval_shape(step, state, frozen, toy_batch(0))
  with pytest.raises(ValueError, match="accumulation=0"):
    build(accumulation=0)
