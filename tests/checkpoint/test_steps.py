"""Which checkpoints of a run are deleted: never the base of a fine-tune."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mooer_jax import checkpoint
from mooer_jax.checkpoint import CheckpointError
from tests.checkpoint.checkpoints_of import params, save


def names(workdir) -> list[str]:
  return sorted(path.name for path in workdir.iterdir())


def step(workdir, number, **options):
  return save(checkpoint.step_folder(workdir, number), {"w": np.float32(number)}, **options)


@pytest.fixture
def run(tmp_path):
  """The folder of a run with steps 1, 2 and 3."""
  for number in (1, 2, 3):
    step(tmp_path / "run", number)
  return tmp_path / "run"


def test_latest_and_keep_last(tmp_path):
  assert checkpoint.latest(tmp_path) is None
  assert checkpoint.latest(tmp_path / "nowhere") is None
  for number in (2, 10, 9):
    save(checkpoint.step_folder(tmp_path, number), params())
  (tmp_path / "step_00000011").mkdir()  # not complete
  (tmp_path / ".tmp-step_00000012").mkdir()
  (tmp_path / "plots").mkdir()
  assert checkpoint.latest(tmp_path).name == "step_00000010"
  checkpoint.keep_last(tmp_path, 2)
  assert names(tmp_path) == ["plots", "step_00000009", "step_00000010", "step_00000011"]
  with pytest.raises(ValueError, match="count=0"):
    checkpoint.keep_last(tmp_path, 0)


def test_a_run_that_cannot_be_listed_is_an_error(run, monkeypatch):
  """Else it would look like a new one."""

  def refuse(path="."):
    raise PermissionError(errno.EACCES, "Permission denied", path)

  for name in ("listdir", "scandir"):
    monkeypatch.setattr(os, name, refuse)
  with pytest.raises(PermissionError, match="run"):
    checkpoint.latest(run)


def test_find_takes_a_checkpoint_or_the_folder_of_a_run(run, tmp_path):
  newest = checkpoint.step_folder(run, 3)
  assert checkpoint.find(newest) == checkpoint.find(run) == newest
  with pytest.raises(FileNotFoundError, match="neither a checkpoint .* nor a run's folder"):
    checkpoint.find(tmp_path)
  with pytest.raises(FileNotFoundError, match="nowhere"):
    checkpoint.find(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match="config.json: is a file; name the folder of a"):
    checkpoint.find(newest / "config.json")
  with pytest.raises(ValueError, match="~/run: starts with ~"):
    checkpoint.find("~/run")


def test_a_step_that_lost_a_file_is_not_passed_over(run):
  """Else a run would resume from an earlier step without a word."""
  newest = checkpoint.step_folder(run, 3)
  (newest / "config.json").unlink()
  assert checkpoint.latest(run) == newest
  advice = "if you remove step_00000003, training resumes from step_00000002"
  with pytest.raises(CheckpointError, match=f"no config.json; restore .*; {advice}"):
    checkpoint.describe(newest)


def test_the_base_of_a_fine_tune_is_kept(run, tmp_path):
  base = checkpoint.step_folder(run, 1)
  tuned = save(tmp_path / "tuned", {"w": np.float32(7)}, base=base)
  checkpoint.keep_last(run, 1)
  assert names(run) == ["step_00000001", "step_00000003"]
  assert checkpoint.load(tuned).base == base
  assert not checkpoint.find_damage(base)
  shutil.rmtree(base / "kept_by")  # as documented
  checkpoint.keep_last(run, 1)
  assert names(run) == ["step_00000003"]


def test_a_base_is_kept_from_the_start_of_a_fine_tune(run, tmp_path):
  base = checkpoint.step_folder(run, 1)
  checkpoint.keep_for(base, tmp_path / "tuned")
  checkpoint.keep_for(base, checkpoint.step_folder(tmp_path / "tuned", 4))  # the same run
  checkpoint.keep_last(run, 1)
  (mark,) = (base / "kept_by").iterdir()
  assert mark.read_text() == f"{tmp_path / 'tuned'}\n"


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_a_fine_tune_that_starts_while_its_base_is_deleted(run, tmp_path, monkeypatch, moment):
  """Either the base stays, or the fine-tune is told that it is gone."""
  base = checkpoint.step_folder(run, 1)
  refused = []
  rename = Path.rename

  def start():
    try:
      checkpoint.keep_for(base, tmp_path / "tuned")
    except FileNotFoundError as error:
      refused.append(str(error))

  def meanwhile(path, target):
    if path == base and moment == "before the rename":
      start()
    result = rename(path, target)
    if path == base and moment == "after the rename":
      start()
    return result

  monkeypatch.setattr(Path, "rename", meanwhile)
  checkpoint.keep_last(run, 1)
  monkeypatch.undo()
  assert base.exists() == (moment == "before the rename") == (not refused)
  assert all(str(base) in line and "was deleted" in line for line in refused)
  assert names(run) == ["step_00000001"] * base.exists() + ["step_00000003"]
  if base.exists():
    assert not checkpoint.find_damage(base)


def test_an_interrupted_deletion_is_finished(run, monkeypatch):
  def killed(folder):
    (folder / "config.json").unlink()
    raise KeyboardInterrupt

  monkeypatch.setattr(shutil, "rmtree", killed)
  with pytest.raises(KeyboardInterrupt):
    checkpoint.keep_last(run, 1)
  monkeypatch.undo()
  assert [path.name for path in checkpoint.all_steps(run)] == ["step_00000003"]
  checkpoint.keep_last(run, 2)
  assert names(run) == ["step_00000003"]


def test_a_base_that_cannot_be_marked_is_said_if_a_run_may_delete_it(run, tmp_path, monkeypatch):
  def read_only(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")

  whole = save(tmp_path / "whole", params())
  monkeypatch.setattr(Path, "write_text", read_only)
  checkpoint.keep_for(whole, tmp_path / "tuned")  # nothing deletes it
  with pytest.warns(UserWarning, match="step_00000001 cannot be marked .*Read-only.* copy it"):
    checkpoint.keep_for(checkpoint.step_folder(run, 1), tmp_path / "tuned")


def test_a_base_that_is_converted_again_stays_marked(tmp_path):
  base = save(tmp_path / "base", params())
  save(tmp_path / "tuned", {"scalar": np.float32(7)}, base=base)
  marks = [path.name for path in (base / "kept_by").iterdir()]
  save(base, params(), overwrite=True)
  assert [path.name for path in (base / "kept_by").iterdir()] == marks
