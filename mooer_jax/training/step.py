"""The train step: gradients of the trainable params over micro-batches, then the optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mooer_jax.sharding import batch_sharding

MEAN_LOSS_DECAY = 0.99  # of the running mean of the loss: about the last 100 good steps


@flax.struct.dataclass
class BadSteps:
  """The steps that were skipped, since their loss or gradient was bad."""

  in_a_row: Any  # int32 [], up to the last step; 0 after a good one
  total: Any  # int32 []
  mean_loss: Any  # float32 [], running mean of the good losses, 0 before the first


@flax.struct.dataclass
class TrainState:
  """State that a step changes; frozen weights are separate."""

  step: Any  # int32 [], completed steps, with the skipped ones
  trainable: Any  # nested dict of float32 params
  opt_state: Any  # of the optax transformation
  rng: Any  # uint32, data of the run's key, which is constant; each step folds in its number
  bad: BadSteps


def create(trainable, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
  """The initial state; also runs under `jit` and `eval_shape`."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trainable=trainable,
    opt_state=tx.init(trainable),
    rng=jax.random.key_data(key),
    bad=BadSteps(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)),
  )


def state_shardings(
  state: TrainState, tx: optax.GradientTransformation, trainable_shardings
) -> TrainState:
  """Shardings of a state: moments are sharded like their params, the rest is replicated.

  `state` has arrays or `ShapeDtypeStruct`s, and tx is its optimizer.
  """
  whole = NamedSharding(jax.tree.leaves(trainable_shardings)[0].mesh, P())
  opt_state = optax.tree_map_params(
    tx,
    lambda _, sharding: sharding,
    state.opt_state,
    trainable_shardings,
    transform_non_params=lambda _: whole,
  )
  return TrainState(
    step=whole,
    trainable=trainable_shardings,
    opt_state=opt_state,
    rng=whole,
    bad=BadSteps(whole, whole, whole),
  )


class BadStepError(FloatingPointError):
  """More steps in a row are bad than may be skipped; `.step` is the number of the last."""

  def __init__(self, metrics, max_bad_steps: int):
    self.step, in_a_row = int(metrics["step"]), int(metrics["bad_steps"])
    row = f", {in_a_row} bad steps in a row with train.max_bad_steps={max_bad_steps}"
    hint = "" if max_bad_steps else "; train.max_bad_steps skips such steps"
    super().__init__(
      f"step {self.step}: {describe_bad_step(metrics)}{row if in_a_row > 1 else ''}; the state was"
      " not saved. Lower optimizer.peak_lr, set optimizer.max_grad_norm or check the data, and"
      f" resume from the newest checkpoint{hint}"
    )


def describe_bad_step(metrics) -> str:
  """Why a step is bad, from its metrics."""
  loss = float(metrics["loss"])
  if metrics["finite"]:
    mean = float(metrics["mean_loss"])
    return f"loss {loss:.4f} exceeds train.max_loss_ratio times its running mean of {mean:.4f}"
  return f"loss {loss} and gradient norm {float(metrics['grad_norm'])} are not both finite"


def make_train_step(
  loss_fn: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
  tx: optax.GradientTransformation,
  *,
  schedule: optax.Schedule,
  accumulation: int = 1,
  max_loss_ratio: float = 0.0,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
  """Make the pure function `train_step(state, frozen, batch) -> (state, metrics)`.

  The gradient is that of the loss summed over all rows, divided by the number of their tokens, so
  it does not depend on the accumulation.

  A step is bad if its loss or gradient norm is not finite, or if its loss exceeds the limit. It
  counts as a step, but the params and the optimizer state, with its learning rate schedule, stay
  as they were. Whether to go on is for `check_step` to decide.

  Args:
    loss_fn: (trainable, frozen, batch, key) -> (loss, metrics); the loss is ignored, metrics are
      sums over rows: loss_sum (float32, differentiated), tokens, correct, and any further ones;
      those in a dict "per_token" are divided by the tokens.
    schedule: learning rate of tx, for the metrics.
    accumulation: micro-batches per batch; must divide its rows. Micro-batch a has the rows a,
      a + accumulation, …, so that each device keeps its rows.
    max_loss_ratio: a loss above this multiple of the running mean of the good losses is bad; 0: no
      limit.

  Returns:
    The function. Its metrics are scalars: loss (per token), accuracy (of tokens), tokens,
    grad_norm (before clipping), lr, finite (of loss and grad_norm), bad_steps (in a row, with this
    one; 0: it is good), step (from 1), the further sums, and with a limit mean_loss, the running
    mean before the step.
  """
  if accumulation < 1:
    raise ValueError(f"accumulation={accumulation} must be at least 1")

  def summed_loss(trainable, frozen, batch, key):
    _, sums = loss_fn(trainable, frozen, batch, key)
    return sums["loss_sum"].astype(jnp.float32), sums

  gradient = jax.grad(summed_loss, has_aux=True)

  def accumulate(trainable, frozen, batch, key):
    if accumulation == 1:
      return gradient(trainable, frozen, batch, jax.random.fold_in(key, 0))
    micro_batches = jax.tree.map(lambda x: _split(x, accumulation), batch)

    def add(total, inputs):
      n, micro_batch = inputs
      new = gradient(trainable, frozen, micro_batch, jax.random.fold_in(key, n))
      return jax.tree.map(jnp.add, total, new), None

    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(gradient, trainable, frozen, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulation), micro_batches))
    return total

  def train_step(state: TrainState, frozen, batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    grads, sums = accumulate(state.trainable, frozen, batch, key)
    sums = dict(sums)
    tokens = jnp.maximum(sums["tokens"], 1).astype(jnp.float32)
    grads = jax.tree.map(lambda g: g / tokens.astype(g.dtype), grads)
    loss = sums.pop("loss_sum").astype(jnp.float32) / tokens
    means = {name: value / tokens for name, value in sums.pop("per_token", {}).items()}
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    bad = _judge(state.bad, state.step, loss, finite, max_loss_ratio)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    new = optax.apply_updates(state.trainable, updates), opt_state
    trainable, opt_state = jax.tree.map(
      lambda new, old: jnp.where(bad.in_a_row > 0, old, new),
      new,
      (state.trainable, state.opt_state),
    )
    metrics = {
      "loss": loss,
      "accuracy": sums.pop("correct").astype(jnp.float32) / tokens,
      "grad_norm": grad_norm,
      "lr": jnp.asarray(schedule(state.step - state.bad.total), jnp.float32),
      "finite": finite,
      "bad_steps": bad.in_a_row,
      "step": state.step + 1,
      **sums,
      **means,
    }
    if max_loss_ratio:
      metrics["mean_loss"] = state.bad.mean_loss
    new_state = dataclasses.replace(
      state, step=state.step + 1, trainable=trainable, opt_state=opt_state, bad=bad
    )
    return new_state, metrics

  return train_step


def _judge(bad: BadSteps, step, loss, finite, max_loss_ratio: float) -> BadSteps:
  """The record after a step of this loss; `step` is the number of completed ones."""
  started = step > bad.total  # a good step has set the mean
  is_bad = ~finite
  if max_loss_ratio:
    is_bad |= started & (loss > max_loss_ratio * bad.mean_loss)
  mean = jnp.where(
    started, optax.incremental_update(loss, bad.mean_loss, 1 - MEAN_LOSS_DECAY), loss
  )
  return BadSteps(
    in_a_row=jnp.where(is_bad, bad.in_a_row + 1, 0),
    total=bad.total + is_bad,
    mean_loss=jnp.where(is_bad, bad.mean_loss, mean),
  )


def jit_train_step(train_step, mesh: jax.sharding.Mesh, shardings: tuple[TrainState, dict]):
  """Jit a train step for a mesh; the memory of the input state is reused.

  `shardings` are those of the state and of the frozen params. The first axis of all leaves of the
  batch must be the rows, and rows per micro-batch must be divisible by data x fsdp.
  """
  return jax.jit(
    train_step,
    in_shardings=(*shardings, batch_sharding(mesh)),
    out_shardings=(shardings[0], NamedSharding(mesh, P())),
    donate_argnums=0,
  )


def check_step(metrics, max_bad_steps: int) -> None:
  """Raise BadStepError if more than `max_bad_steps` in a row are bad; waits for the device."""
  if metrics["bad_steps"] > max_bad_steps:
    raise BadStepError(metrics, max_bad_steps)


def _split(x: jax.Array, parts: int) -> jax.Array:
  """[rows, ...] -> [parts, rows / parts, ...], part p with the rows p, p + parts, …"""
  if x.shape[0] % parts:
    raise ValueError(
      f"a batch of {x.shape[0]} rows is not divisible into accumulation={parts} micro-batches"
    )
  return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
