import errno
import json
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mooer_jax import checkpoint, tree
from mooer_jax.checkpoint import CheckpointError, SaveError

RNG = np.random.default_rng(0)
CONFIG = {"decoder": {"width": 8}, "text": "转写"}
GENERATION = {"prompt": "Transcribe speech to text. ", "beams": 4}


def params(seed=0):
  rng = np.random.default_rng(seed)

  def block():
    return {
      "q": {"kernel": rng.normal(size=(8, 16)).astype(ml_dtypes.bfloat16),
            "lora_a": rng.normal(size=(8, 2)).astype(np.float32)},
      "codes": rng.integers(-128, 127, size=(4, 4)).astype(np.int8),
    }

  return {
    "frontend": {"sanm": {"shift": rng.normal(size=6).astype(np.float32)}},
    "decoder": {"layers_0": block(), "layers_1": block()},
    "scalar": np.float32(rng.normal()),
  }


def write_tokenizer(folder):
  (folder / "tokenizer.json").write_text("{}")


def save(folder, tensors, **options):
  defaults = {"config_json": CONFIG, "tokenizer": write_tokenizer, "generation": GENERATION}
  return checkpoint.save(folder, params=tensors, **{**defaults, **options})


def assert_same(a, b):
  a, b = tree.flatten(a), tree.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    assert a[path].dtype == b[path].dtype, path
    np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  return save(tmp_path_factory.mktemp("checkpoints") / "model", params())


def test_load_gives_back_what_was_saved(saved):
  loaded = checkpoint.load(saved)
  assert_same(loaded.params, params())
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params))
  assert loaded.config == CONFIG
  assert loaded.generation == GENERATION
  assert (loaded.tokenizer / "tokenizer.json").read_text() == "{}"
  assert loaded.base is None
  checkpoint.verify(saved)


def test_a_folder_holds_the_documented_files_and_no_more(saved):
  assert sorted(p.name for p in saved.iterdir()) == [
    "checkpoint.json", "config.json", "generation.json", "tokenizer", "weights",
  ]
  assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_moved_folder_still_loads(saved, tmp_path):
  moved = tmp_path / "elsewhere"
  subprocess.run(["cp", "-r", saved, moved], check=True)
  assert_same(checkpoint.load(moved).params, params())


def test_describe_reads_no_weights(saved, monkeypatch):
  monkeypatch.setattr(checkpoint.reading.arrays, "read", lambda *_: pytest.fail("read weights"))
  described = tree.flatten(checkpoint.describe(saved).params)
  for path, leaf in tree.flatten(params()).items():
    assert (described[path].shape, described[path].dtype) == (leaf.shape, leaf.dtype), path


def test_dtype_casts_floats_but_neither_integers_nor_cmvn(saved):
  loaded = tree.flatten(checkpoint.load(saved, dtype=jnp.float32).params)
  for path, leaf in tree.flatten(params()).items():
    expected = leaf.astype(np.float32) if leaf.dtype == jnp.bfloat16 else leaf
    np.testing.assert_array_equal(loaded[path], expected)
    assert loaded[path].dtype == expected.dtype
  loaded = tree.flatten(checkpoint.load(saved, dtype="bfloat16").params)
  assert loaded["decoder/layers_0/q/lora_a"].dtype == jnp.bfloat16
  assert loaded["decoder/layers_0/codes"].dtype == jnp.int8
  assert loaded["frontend/sanm/shift"].dtype == jnp.float32


def test_sharded_save_and_restore(tmp_path):
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def place(spec):
    return NamedSharding(mesh, spec)

  by_rows = jax.device_put(params()["decoder"]["layers_0"]["q"]["kernel"],
                           place(P("fsdp", "tensor")))
  tensors = params()
  tensors["decoder"]["layers_0"]["q"]["kernel"] = by_rows
  folder = save(tmp_path / "sharded", tensors)

  described = checkpoint.describe(folder).params
  specs = tree.first_match(
    ((".*/kernel", P("tensor", "fsdp")), (".*/lora_a", P("fsdp")), (".*", P())), described
  )
  shardings = jax.tree.map(place, specs, is_leaf=lambda x: isinstance(x, P))
  loaded = checkpoint.load(folder, shardings=shardings).params
  assert_same(loaded, params())
  kernel = loaded["decoder"]["layers_0"]["q"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (4, 4)
  for path, leaf in tree.flatten(loaded).items():
    assert leaf.sharding == tree.flatten(shardings)[path]

  del shardings["scalar"]
  with pytest.raises(CheckpointError, match="no sharding for scalar"):
    checkpoint.load(folder, shardings=shardings)


def test_stacked_params_are_refused(tmp_path):
  with pytest.raises(ValueError, match="layers/q/kernel is stacked"):
    save(tmp_path / "x", {"layers": {"q": {"kernel": np.zeros((2, 3))}}})
  assert not list(tmp_path.iterdir())


# What a user may point at instead of a checkpoint.


def test_wrong_folders_are_named(saved, tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere: no such checkpoint folder"):
    checkpoint.load(tmp_path / "nowhere")
  with pytest.raises(CheckpointError, match="not a mooer_jax checkpoint: no config.json"):
    checkpoint.load(tmp_path)
  (tmp_path / "model.safetensors").touch()
  with pytest.raises(CheckpointError, match="must be converted first"):
    checkpoint.load(tmp_path)
  subprocess.run(["cp", "-r", saved, tmp_path / "step_00000003"], check=True)
  with pytest.raises(CheckpointError, match="newest checkpoint is .*step_00000003"):
    checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation.json", "tokenizer", "weights"])
def test_a_missing_part_is_named(saved, tmp_path, name):
  subprocess.run(["cp", "-r", saved, tmp_path / "c"], check=True)
  subprocess.run(["rm", "-r", tmp_path / "c" / name], check=True)
  with pytest.raises(CheckpointError, match=f"no {name}"):
    checkpoint.load(tmp_path / "c")


def test_damage_is_an_error_and_verify_finds_it(saved, tmp_path):
  folder = tmp_path / "c"
  subprocess.run(["cp", "-r", saved, folder], check=True)
  for file in (folder / "weights").rglob("d/*"):
    content = bytearray(file.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    file.write_bytes(bytes(content))
  with pytest.raises(CheckpointError, match="weights: the files have changed"):
    checkpoint.verify(folder)
  with pytest.raises(CheckpointError, match="cannot be read"):
    checkpoint.load(folder)
  (folder / "checkpoint.json").write_text("{")
  with pytest.raises(CheckpointError, match="not readable as JSON"):
    checkpoint.load(folder)
  (folder / "checkpoint.json").write_text(json.dumps({"format": 99}))
  with pytest.raises(CheckpointError, match="format 99"):
    checkpoint.load(folder)


# Saving either happens or does not.


def test_an_existing_folder_is_only_replaced_on_demand(tmp_path):
  folder = save(tmp_path / "c", params())
  with pytest.raises(FileExistsError, match="overwrite=True"):
    save(folder, params(1))
  assert_same(checkpoint.load(folder).params, params())
  save(folder, params(1), overwrite=True)
  assert_same(checkpoint.load(folder).params, params(1))
  assert [p.name for p in tmp_path.iterdir()] == ["c"]


def full_disk(*_, **__):
  raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["arrays.write", "_write_json", "_put_in_place", "tokenizer"])
def test_a_failure_while_saving_spares_what_was_there(tmp_path, monkeypatch, where):
  folder = save(tmp_path / "c", params())
  options = {}
  if where == "tokenizer":
    options["tokenizer"] = full_disk
  else:
    target = checkpoint.writing.arrays if "." in where else checkpoint.writing
    monkeypatch.setattr(target, where.rsplit(".")[-1], full_disk)
  for name in ("c", "new"):
    with pytest.raises(SaveError, match=rf"{name}: the checkpoint was not saved .*No space left"):
      save(tmp_path / name, params(1), overwrite=True, **options)
  assert [p.name for p in tmp_path.iterdir()] == ["c"]
  assert_same(checkpoint.load(folder).params, params())


def test_a_rename_that_fails_brings_the_old_one_back(tmp_path, monkeypatch):
  folder = save(tmp_path / "c", params())
  rename = Path.rename
  monkeypatch.setattr(
    Path, "rename", lambda p, to: full_disk() if p.name == ".tmp-c" else rename(p, to)
  )
  with pytest.raises(SaveError):
    save(folder, params(1), overwrite=True)
  assert [p.name for p in tmp_path.iterdir()] == ["c"]
  assert_same(checkpoint.load(folder).params, params())


def test_files_that_the_system_refuses_to_write(tmp_path):
  # A limit on file sizes stops the array writer itself (C++), as a full disk would.
  folder = save(tmp_path / "c", params())
  big = {"w": RNG.normal(size=(512, 512)).astype(np.float32)}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
  try:
    with pytest.raises(SaveError):
      save(folder, big, overwrite=True)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert [p.name for p in tmp_path.iterdir()] == ["c"]
  assert_same(checkpoint.load(folder).params, params())


def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(tmp_path, plain_env):
  save(checkpoint.step_folder(tmp_path, 1), params())
  program = textwrap.dedent("""
    import os, signal, sys
    import numpy as np
    from mooer_jax import checkpoint

    checkpoint.save(
      checkpoint.step_folder(sys.argv[1], 2), params={"w": np.zeros(3)}, config_json={},
      tokenizer=lambda _: os.kill(os.getpid(), signal.SIGKILL), generation={},
    )
  """)
  killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=plain_env)
  assert killed.returncode == -signal.SIGKILL
  assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-step_00000002", "step_00000001"]
  newest = checkpoint.latest(tmp_path)
  assert newest == checkpoint.step_folder(tmp_path, 1)
  assert_same(checkpoint.load(newest).params, params())
  save(checkpoint.step_folder(tmp_path, 2), params(2))  # the same step again, over the remains
  assert_same(checkpoint.load(checkpoint.latest(tmp_path)).params, params(2))


def test_latest_and_keep_last(tmp_path):
  assert checkpoint.latest(tmp_path) is None
  assert checkpoint.latest(tmp_path / "nowhere") is None
  for step in (2, 10, 9):
    save(checkpoint.step_folder(tmp_path, step), params())
  (tmp_path / "step_00000011").mkdir()  # not complete
  (tmp_path / ".tmp-step_00000012").mkdir()
  (tmp_path / "plots").mkdir()
  assert checkpoint.latest(tmp_path).name == "step_00000010"
  removed = checkpoint.keep_last(tmp_path, 2)
  assert [p.name for p in removed] == ["step_00000002"]
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "plots", "step_00000009", "step_00000010", "step_00000011",
  ]
  with pytest.raises(ValueError, match="count=0"):
    checkpoint.keep_last(tmp_path, 0)


def test_find_takes_a_checkpoint_or_the_folder_of_a_run(saved, tmp_path):
  assert checkpoint.find(saved) == saved
  with pytest.raises(FileNotFoundError, match="neither a checkpoint .* nor a run's folder"):
    checkpoint.find(tmp_path)
  with pytest.raises(FileNotFoundError, match="nowhere"):
    checkpoint.find(tmp_path / "nowhere")
  step = save(checkpoint.step_folder(tmp_path, 3), params())
  assert checkpoint.find(tmp_path) == step


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
  assert_same(checkpoint.load(again).params,
              {**tree.merge(trainable, frozen), "scalar": np.float32(7)})


def test_a_base_that_moved_or_changed_is_named(tuned, tmp_path):
  base = tuned.parent / "base"
  base.rename(tmp_path / "moved")
  with pytest.raises(FileNotFoundError, match="fine-tune of .*base.* pass base=FOLDER"):
    checkpoint.load(tuned)
  assert checkpoint.load(tuned, base=tmp_path / "moved").params
  save(base, params(5))
  with pytest.raises(CheckpointError, match="trained on other weights"):
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
  assert [a.dtype for a in jax.tree.leaves(restored)] == [
    a.dtype for a in jax.tree.leaves(state())
  ]
  assert data_state == position
  assert_same(checkpoint.load(folder).params, params())


def test_train_state_of_another_run_is_refused_by_path(tmp_path, saved):
  folder = save(tmp_path / "c", params(), train_state=state(), data_state={})
  with pytest.raises(CheckpointError, match="moments/0/count is only in the checkpoint"):
    checkpoint.load_train_state(folder, state().replace(moments=()))
  with pytest.raises(CheckpointError, match=r"step is saved as \[\[\], 'int32'\], this run has"):
    checkpoint.load_train_state(folder, state().replace(step=jnp.float32(0)))
  with pytest.raises(CheckpointError, match="holds no train_state"):
    checkpoint.load_train_state(saved, state())
  (folder / "train_state" / "data_0.json").unlink()
  with pytest.raises(CheckpointError, match="another number of processes"):
    checkpoint.load_train_state(folder, state())


def test_train_state_is_restored_onto_its_shardings(tmp_path):
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  tensor = {"w": jnp.arange(32.0).reshape(8, 4)}
  folder = save(tmp_path / "c", params(), train_state=tensor)
  target = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32,
                                      sharding=NamedSharding(mesh, P("fsdp")))}
  restored, data_state = checkpoint.load_train_state(folder, target)
  assert restored["w"].addressable_shards[0].data.shape == (1, 4)
  np.testing.assert_array_equal(restored["w"], tensor["w"])
  assert data_state == {}


def test_importing_the_module_does_not_import_orbax(plain_env):
  program = "import sys, mooer_jax.checkpoint; sys.exit('orbax.checkpoint' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", program], env=plain_env).returncode == 0
