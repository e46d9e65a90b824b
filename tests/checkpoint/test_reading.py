import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mooer_jax import checkpoint, tree
from mooer_jax.checkpoint import CheckpointError
from mooer_jax.cli import main
from tests.checkpoint.checkpoints_of import CONFIG, GENERATION, assert_same, params, save

RNG = np.random.default_rng(0)


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
  assert not checkpoint.find_damage(saved)


def test_parts_without_weights_are_left_out(tmp_path):
  """As `speech_llm.init` has them: a Whisper has no CMVN."""
  loaded = checkpoint.load(save(tmp_path / "model", {**params(), "frontend": {}}))
  assert loaded.params.keys() == params().keys() - {"frontend"}


def test_what_is_converted_twice_has_one_hash(tmp_path):
  leaves = jax.tree.map(checkpoint.reading.arrays.as_lazy, params())
  first, again = (save(tmp_path / name, leaves) for name in ("first", "again"))
  stamps = [(folder / "weights/_CHECKPOINT_METADATA").read_text() for folder in (first, again)]
  assert stamps[0] != stamps[1]
  assert checkpoint.describe(first).hash == checkpoint.describe(again).hash
  leaves["scalar"] = checkpoint.reading.arrays.as_lazy(np.float32(7))
  assert checkpoint.describe(save(tmp_path / "o", leaves)).hash != checkpoint.describe(first).hash


def test_a_folder_holds_the_documented_files_and_no_more(saved):
  assert sorted(p.name for p in saved.iterdir()) == [
    "checkpoint.json",
    "config.json",
    "generation.json",
    "tokenizer",
    "weights",
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
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def place(spec):
    return NamedSharding(mesh, spec)

  by_rows = jax.device_put(
    params()["decoder"]["layers_0"]["q"]["kernel"], place(P("fsdp", "tensor"))
  )
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


def test_a_checkpoint_json_that_cannot_be_read_is_said(saved, tmp_path):
  folder = tmp_path / "c"
  subprocess.run(["cp", "-r", saved, folder], check=True)
  (folder / "checkpoint.json").write_text("{")
  with pytest.raises(CheckpointError, match="not JSON"):
    checkpoint.load(folder)
  (folder / "checkpoint.json").write_text(json.dumps({"format": 99}))
  with pytest.raises(CheckpointError, match="format 99"):
    checkpoint.load(folder)


def test_weights_of_another_model_than_config_json_says_are_named(saved):
  about = checkpoint.describe(saved)
  flat = tree.flatten(about.params)
  checkpoint.check_leaves(about, about.params)
  kernel = "decoder/layers_1/q/kernel"
  more = {**flat, "decoder/layers_2/codes": flat["decoder/layers_1/codes"]}
  fewer = {path: leaf for path, leaf in flat.items() if path != kernel}
  wider = {**flat, kernel: jax.ShapeDtypeStruct((8, 24), jnp.float32)}
  for expected, message in (
    (more, "decoder/layers_2/codes is missing from the weights"),
    (fewer, f"{kernel} is not a parameter of that model"),
    (wider, rf"{kernel} is \[8, 16\] in the weights, but \[8, 24\] by config.json"),
  ):
    with pytest.raises(CheckpointError, match=message + ".*; restore the config.json"):
      checkpoint.check_leaves(about, tree.unflatten(expected))


@pytest.mark.parametrize("files", [{}, None])
def test_a_hash_of_other_weights_is_named(tmp_path, files):
  path = save(tmp_path / "model", params()) / "checkpoint.json"
  about = json.loads(path.read_text())
  if files is not None:  # without the sums of the weights
    about["files"] = {k: v for k, v in about["files"].items() if not k.startswith("weights/")}
  else:
    about["hash"] = "0" * 64
  path.write_text(json.dumps(about))
  with pytest.raises(CheckpointError, match="sums of other weights than its hash"):
    checkpoint.load(path.parent)


def test_weights_that_are_said_to_be_integers_are_named(saved):
  path = saved / "checkpoint.json"
  about = json.loads(path.read_text())
  expected = checkpoint.describe(saved).params
  about["leaves"]["decoder/layers_1/q/kernel"][1] = "int8"
  path.write_text(json.dumps(about))
  with pytest.raises(CheckpointError, match=r"q/kernel is \[8, 16\] of integers in the weights"):
    checkpoint.check_leaves(checkpoint.describe(saved), expected)


def test_importing_the_module_does_not_import_orbax(plain_env):
  program = "import sys, mooer_jax.checkpoint; sys.exit('orbax.checkpoint' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", program], env=plain_env).returncode == 0


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *(("leaves", value) for value in (None, 5, [], {"a": 5}, {"a": ["x", "float32"]})),
    ("base", "x"),
    ("base", {}),
    ("hash", None),
    ("train_state", []),
    ("files", {"a": 5}),
    ("files", {}),
    ("files", {"config.json": [1, ""], "generation.json": [1, ""], "../x": [1, ""]}),
  ],
)
def test_an_edited_checkpoint_json_is_named(tmp_path, name, value, capsys):
  path = save(tmp_path / "model", params()) / "checkpoint.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
  with pytest.raises(CheckpointError, match=f"{path.parent}: .*checkpoint.json"):
    checkpoint.describe(path.parent)
  assert main(["checkpoint", "verify", str(path.parent)]) == 1
  assert f"{path.parent}: " in capsys.readouterr().out


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *(("encoders", value) for value in (None, 5, [1])),
    *(("connector", value) for value in (None, "x")),
    ("frontends", [1]),
    *(("prompts", value) for value in (None, ["a"])),
  ],
)
def test_an_edited_config_json_is_named(tmp_path, name, value):
  folder = save(tmp_path / "model", params(), config_json={name: value})
  with pytest.raises(CheckpointError, match=f"{folder}: config.json has {name}="):
    checkpoint.describe(folder)


def test_of_several_faults_of_config_json_the_first_is_named(tmp_path):
  names = ("encoders", "frontends", "prompts", "decoder", "connector")
  folder = save(tmp_path / "model", params(), config_json=dict.fromkeys(names, 5))
  with pytest.raises(CheckpointError, match="has connector=5, which must be an object"):
    checkpoint.describe(folder)


def test_a_folder_in_place_of_config_json_is_named(tmp_path):
  folder = save(tmp_path / "model", params())
  (folder / "config.json").unlink()
  (folder / "config.json").mkdir()
  with pytest.raises(CheckpointError, match="config.json: is a folder"):
    checkpoint.describe(folder)
