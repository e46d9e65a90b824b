"""Fine-tunes that point to a base, and the state of a run."""

import subprocess
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mooer_jax import checkpoint, tree
from mooer_jax.checkpoint import CheckpointError
from tests.checkpoint.checkpoints_of import assert_same, params, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  return save(tmp_path_factory.mktemp("checkpoints") / "model", params())


# A fine-tune holds its own leaves and points to its base.


@pytest.fixture
def tuned(saved, tmp_path):
  base = tmp_path / "base"
  subprocess.run(["cp", "-r", saved, base], check=True)
  trainable, _ = tree.partition(params(1), (".*/lora_a",))
  return save(tmp_path / "tuned", trainable, base=base)


def test_a_fine_tune_joins_its_leaves_with_those_of_its_base(tuned):
  loaded = checkpoint.load(tuned)
  trainable, _ = tree.partition(params(1), (".*/lora_a",))
  _, frozen = tree.partition(params(), (".*/lora_a",))
  assert_same(loaded.params, tree.merge(trainable, frozen))
  assert loaded.base == tuned.parent / "base"
  assert set(loaded.trained) == tree.flatten(trainable).keys()
  assert not (tuned / "weights").exists()
  again = save(tuned.parent / "again", {"scalar": np.float32(7)}, base=tuned)
  assert_same(
    checkpoint.load(again).params, {**tree.merge(trainable, frozen), "scalar": np.float32(7)}
  )


def test_a_base_that_moved_or_changed_is_named(tuned, tmp_path):
  base = tuned.parent / "base"
  base.rename(tmp_path / "moved")
  with pytest.raises(FileNotFoundError, match="fine-tune of .*base.* --base-checkpoint PATH"):
    checkpoint.load(tuned)
  assert checkpoint.load(tuned, base=tmp_path / "moved").params
  save(base, params(5))
  with pytest.raises(CheckpointError, match="is a fine-tune of weights with hash"):
    checkpoint.load(tuned)


# The state of training, of any structure.


class Moments(NamedTuple):
  count: Any
  mu: Any
  empty: tuple = ()


@flax.struct.dataclass
class State:
  step: Any
  trainable: Any
  moments: Any


def state(seed=0):
  trainable, _ = tree.partition(params(seed), (".*/lora_a",))
  key = jax.random.key_data(jax.random.key(seed))
  mu = jax.tree.map(jnp.asarray, trainable)
  return State(jnp.int32(7), mu, (Moments(key, mu), ()))


def test_train_state_comes_back_bit_for_bit_with_the_data_position(tmp_path):
  position = {"shard": 3, "window": [1, 2], "epoch": {"n": 4}}
  folder = save(tmp_path / "c", params(), train_state=state(), data_state=position)
  restored, data_state = checkpoint.load_train_state(folder, jax.eval_shape(state))
  assert jax.tree.structure(restored) == jax.tree.structure(state())
  jax.tree.map(np.testing.assert_array_equal, restored, state())
  assert [a.dtype for a in jax.tree.leaves(restored)] == [a.dtype for a in jax.tree.leaves(state())]
  assert data_state == [position]
  assert_same(checkpoint.load(folder).params, params())


def test_train_state_of_another_run_is_refused_by_path(tmp_path, saved):
  folder = save(tmp_path / "c", params(), train_state=state(), data_state={})
  end = "; the configs differ$"
  with pytest.raises(CheckpointError, match=f"moments/0/count is only in the checkpoint{end}"):
    checkpoint.load_train_state(folder, state().replace(moments=()))
  more = (*state().moments, {"extra": jnp.zeros(2)})
  with pytest.raises(CheckpointError, match=rf"moments/\d+/extra is only in this run{end}"):
    checkpoint.load_train_state(folder, state().replace(moments=more))
  differ = r"step is \[\[\], 'int32'\] in the checkpoint, but \[.*\] in this run"
  with pytest.raises(CheckpointError, match=differ + end):
    checkpoint.load_train_state(folder, state().replace(step=jnp.float32(0)))
  with pytest.raises(CheckpointError, match="holds no train_state"):
    checkpoint.load_train_state(saved, state())
  (folder / "train_state" / "data_0.json").unlink()
  with pytest.raises(CheckpointError, match="lacks the data state of a process"):
    checkpoint.load_train_state(folder, state())


def test_train_state_is_restored_onto_its_shardings(tmp_path):
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  tensor = {"w": jnp.arange(32.0).reshape(8, 4)}
  folder = save(tmp_path / "c", params(), train_state=tensor)
  target = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))}
  restored, data_state = checkpoint.load_train_state(folder, target)
  assert restored["w"].addressable_shards[0].data.shape == (1, 4)
  np.testing.assert_array_equal(restored["w"], tensor["w"])
  assert data_state == [{}]


def test_a_fine_tune_cannot_replace_its_own_base(tmp_path):
  base = save(tmp_path / "base", params())
  with pytest.raises(ValueError, match="would replace its own base"):
    save(base, params(), base=base, overwrite=True)
  assert_same(checkpoint.load(base).params, params())
