"""The state of a training run: what a step takes, changes and hands on."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mooer_jax.training.sharding import replicated


@flax.struct.dataclass
class TrainState:
  """Everything that changes in a step. The frozen weights are not in it.

  Attributes:
    step: int32 [], updates done.
    trainable: nested dict of float32 params.
    opt_state: state of the optax transformation.
    rng: uint32, data of the run's key; never changes, a step folds its number in.
  """

  step: Any
  trainable: Any
  opt_state: Any
  rng: Any


def create(trainable, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
  """A state before the first update; runs under `jit` and `eval_shape` too."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trainable=trainable,
    opt_state=tx.init(trainable),
    rng=jax.random.key_data(key),
  )


def state_shardings(
  state: TrainState, tx: optax.GradientTransformation, trainable_shardings
) -> TrainState:
  """Shards a state: moments lie as their params do, the rest is replicated.

  Args:
    state: arrays or `ShapeDtypeStruct`s (from `jax.eval_shape(create, ...)`).
    tx: the transformation that made `state.opt_state`.
    trainable_shardings: `NamedSharding`s of `state.trainable`.
  """
  whole = replicated(jax.tree.leaves(trainable_shardings)[0].mesh)
  opt_state = optax.tree_map_params(
    tx,
    lambda _, sharding: sharding,
    state.opt_state,
    trainable_shardings,
    transform_non_params=lambda _: whole,
  )
  return TrainState(step=whole, trainable=trainable_shardings, opt_state=opt_state, rng=whole)
