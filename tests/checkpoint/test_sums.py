"""A damaged checkpoint is found, by name: nothing else than the saved values is ever loaded."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest

from mooer_jax import checkpoint, cli, files, tree
from mooer_jax.checkpoint import CheckpointError, sums
from mooer_jax.checkpoint.leaves import as_lazy
from tests.checkpoint.checkpoints_of import params, save


def damage(path, how):
  content = bytearray(path.read_bytes())
  if how == "missing":
    path.unlink()
    return
  if how == "truncated":
    content = content[: len(content) // 2]
  elif how == "empty":
    content = bytearray()
  elif content:
    content[len(content) // 2] ^= 8
  path.write_bytes(bytes(content))


DAMAGES = ("missing", "truncated", "empty", "flipped")


def forget_sums(folder):
  """Makes a checkpoint as they were saved before sums were recorded."""
  file = folder / "checkpoint.json"
  about = json.loads(file.read_text())
  del about["files"]
  file.write_text(json.dumps(about))


@pytest.fixture(scope="module", params=["arrays", "lazy"])
def saved(request, tmp_path_factory):
  """A checkpoint in one file for all leaves (arrays), or in files for each leaf (lazy)."""
  folder = tmp_path_factory.mktemp("checkpoints") / "model"
  tensors = params() if request.param == "arrays" else jax.tree.map(as_lazy, params())
  state = {"moments": np.arange(5.0)}
  return save(folder, tensors, train_state=state, data_state={"shard": 3})


def files_of(folder):
  return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def test_every_file_but_the_list_itself_is_recorded(saved):
  recorded = json.loads((saved / "checkpoint.json").read_text())["files"]
  assert {*recorded, "checkpoint.json"} == {path.as_posix() for path in files_of(saved)}
  assert checkpoint.find_damage(saved) == []


@pytest.mark.parametrize("how", DAMAGES)
def test_each_damaged_file_is_found(saved, tmp_path, how):
  folder = tmp_path / "c"
  for name in files_of(saved):
    if not (saved / name).stat().st_size:
      continue
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    damage(folder / name, how)
    if str(name) in ("config.json", "generation.json", "checkpoint.json") and how == "missing":
      with pytest.raises(CheckpointError, match=f"no {name}"):
        checkpoint.find_damage(folder)
      continue
    if name.name == "checkpoint.json":
      continue  # the next test
    (line,) = checkpoint.find_damage(folder)
    assert line.startswith(f"{folder / name} ") and "\n" not in line


def test_git_lfs_pointers_are_named(saved, tmp_path):
  for name in files_of(saved):
    folder = tmp_path / "c"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    (folder / name).write_bytes(files.LFS_POINTER + b"v1\noid sha256:0\n")
    if name.name != "checkpoint.json":
      assert f"{folder / name}: {files.LFS_REMEDY}" in checkpoint.find_damage(folder)[0]
    if name.parts[0] == "train_state":
      continue
    with pytest.raises(CheckpointError) as caught:
      checkpoint.load(folder)
    assert str(caught.value).startswith(f"{folder / name}: {files.LFS_REMEDY}")


@pytest.mark.parametrize("recorded", [True, False], ids=["sums", "no-sums"])
@pytest.mark.parametrize("how", DAMAGES)
def test_loading_gives_the_saved_values_or_a_line(saved, tmp_path, how, recorded):
  folder, expected = tmp_path / "c", tree.flatten(params())
  refused = 0
  for name in files_of(saved):
    if name.parts[0] == "train_state":
      continue
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    if not recorded:
      forget_sums(folder)
    damage(folder / name, how)
    try:
      with warnings.catch_warnings(action="ignore"):  # config.json was edited
        loaded = tree.flatten(checkpoint.load(folder).params)
    except CheckpointError as error:
      refused += 1
      assert str(folder) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
      continue
    assert loaded.keys() == expected.keys(), name
    for path, leaf in expected.items():
      np.testing.assert_array_equal(np.asarray(loaded[path]), leaf, err_msg=f"{name}: {path}")
  assert refused


def test_a_changed_list_is_found(saved, tmp_path):
  folder = tmp_path / "c"
  shutil.copytree(saved, folder)
  about = json.loads((folder / "checkpoint.json").read_text())
  about["hash"] = "0" * 64
  (folder / "checkpoint.json").write_text(json.dumps(about))
  (line,) = checkpoint.find_damage(folder)
  assert "checkpoint.json has changed" in line
  del about["leaves"]
  (folder / "checkpoint.json").write_text(json.dumps(about))
  with pytest.raises(CheckpointError, match="lacks leaves"):
    checkpoint.load(folder)


def test_damage_of_the_base_is_found_from_a_fine_tune(saved, tmp_path):
  base = tmp_path / "base"
  shutil.copytree(saved, base)
  tuned = save(tmp_path / "tuned", {"scalar": np.float32(7)}, base=base)
  assert checkpoint.load(tuned).params
  damage(next(path for path in (base / "weights").rglob("*/*") if path.is_file()), "missing")
  with pytest.raises(CheckpointError, match="base/weights/.* is missing"):
    checkpoint.load(tuned)


def test_a_damaged_train_state_stops_a_resume_but_not_a_load(saved, tmp_path):
  folder = tmp_path / "c"
  shutil.copytree(saved, folder)
  target = {"moments": np.zeros(5)}
  restored, _ = checkpoint.load_train_state(folder, target)
  np.testing.assert_array_equal(restored["moments"], np.arange(5.0))
  damage(folder / "train_state/data_0.json", "flipped")
  assert checkpoint.load(folder).params
  with pytest.raises(CheckpointError, match="data_0.json has changed"):
    checkpoint.load_train_state(folder, target)
  shutil.rmtree(folder / "train_state")  # to save space: it cannot be resumed, but loaded
  assert checkpoint.load(folder).params
  with pytest.raises(CheckpointError, match="train_state/ lacks the data state of a process"):
    checkpoint.load_train_state(folder, target)


def test_reading_one_leaf_of_many_checks_its_own_files(tmp_path):
  folder = save(tmp_path / "c", jax.tree.map(as_lazy, params()))
  about = checkpoint.describe(folder)
  good, bad = "decoder/layers_0/codes", "decoder/layers_1/codes"
  for file in (folder / "weights" / bad.replace("/", ".")).iterdir():
    damage(file, "flipped")
  found = checkpoint.read_leaves(about, [good])[good]
  np.testing.assert_array_equal(found, tree.flatten(params())[good])
  with pytest.raises(CheckpointError, match="decoder.layers_1.codes/.* has changed"):
    checkpoint.read_leaves(about, [bad])


def test_edited_settings_load_with_a_warning(saved, tmp_path):
  folder = tmp_path / "c"
  shutil.copytree(saved, folder)
  (folder / "generation.json").write_text('{"num_beams": 2}')
  with pytest.warns(UserWarning, match="generation.json was edited after it was saved"):
    assert checkpoint.load(folder).generation == {"num_beams": 2}


def test_a_file_is_read_again_only_if_it_was_written(saved, monkeypatch):
  checkpoint.load(saved)
  monkeypatch.setattr(sums, "hash_file", lambda path: pytest.fail(f"read {path} again"))
  checkpoint.load(saved)
  with pytest.raises(pytest.fail.Exception, match="again"):  # the name is looked up at each call
    checkpoint.find_damage(saved)


@pytest.mark.parametrize("stamped", [False, True])
def test_checkpoints_without_sums_are_verified_by_their_hash(saved, tmp_path, stamped):
  """At first the hash was over all files, those with the time of writing too."""
  folder = tmp_path / "c"
  shutil.copytree(saved, folder)
  forget_sums(folder)
  about = json.loads((folder / "checkpoint.json").read_text())
  about["hash"] = sums.weights_hash(sums.record(folder), "weights", "", stamped=stamped)
  (folder / "checkpoint.json").write_text(json.dumps(about))
  assert checkpoint.find_damage(folder) == []
  assert checkpoint.load(folder).files is None
  damage(next(path for path in (folder / "weights").rglob("*/*") if path.is_file()), "flipped")
  assert checkpoint.find_damage(folder) == [
    f"{folder / 'weights'}: files were added, removed or changed since they were saved"
  ]


# `mooer-jax checkpoint verify`.


def verify(capsys, *arguments):
  status = cli.main(["checkpoint", "verify", *map(str, arguments)])
  said = capsys.readouterr()
  return status, said.out.splitlines(), said.err


def test_the_command_verifies_a_run_and_the_bases(saved, tmp_path, capsys):
  base = tmp_path / "base"
  shutil.copytree(saved, base)
  run = tmp_path / "run"
  for step in (1, 2):
    save(checkpoint.step_folder(run, step), {"scalar": np.float32(step)}, base=base)
  status, lines, _ = verify(capsys, run)
  assert status == 0 and len(lines) == 3 and all(": ok, " in line for line in lines)

  damage(checkpoint.step_folder(run, 1) / "config.json", "truncated")
  damage(base / "tokenizer/tokenizer.json", "flipped")
  status, lines, end = verify(capsys, run)
  assert status == 1 and "2 of 3 checkpoints are damaged" in end
  assert [line.split(": ok")[0] for line in lines if ": ok" in line] == [str(run / "step_00000002")]
  assert any("step_00000001/config.json has" in line for line in lines)
  assert any("base/tokenizer/tokenizer.json has changed" in line for line in lines)

  base.rename(tmp_path / "moved")
  status, lines, _ = verify(capsys, run / "step_00000002")
  assert status == 1 and len(lines) == 1 and "does not exist" in lines[0]


def test_the_command_says_when_no_sums_were_recorded(saved, tmp_path, capsys):
  shutil.copytree(saved, tmp_path / "c")
  forget_sums(tmp_path / "c")
  status, (line,), _ = verify(capsys, tmp_path / "c")
  assert status == 0 and "no sums recorded" in line


def test_the_command_refuses_what_is_no_checkpoint(tmp_path, capsys):
  status, lines, error = verify(capsys, tmp_path / "nowhere")
  assert status == 2 and not lines and "nowhere: no such checkpoint folder" in error
