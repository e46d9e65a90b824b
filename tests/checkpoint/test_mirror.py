"""Copies of checkpoints in an object store."""

import shutil

import numpy as np
import pytest

from mooer_jax import checkpoint, storage
from mooer_jax.checkpoint.mirror import copies
from tests.checkpoint.checkpoints_of import assert_same, params, save
from tests.object_store import BreakingFileSystem


@pytest.fixture
def url(bucket, request):
  return f"{bucket}/{request.node.name}"


def step(workdir, number):
  return save(
    checkpoint.step_folder(workdir, number),
    params(number),
    train_state={"step": np.int32(number)},
  )


def mirrored(url, workdir, *numbers, count=2):
  with checkpoint.mirror(url, workdir, count=count) as mirror:
    for number in numbers:
      folder = step(workdir, number)
      mirror.wait()
      checkpoint.keep_last(workdir, count)
      mirror.start(folder)


def test_an_empty_workdir_is_restored_from_the_newest_copy(url, tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  records = {name: f"of {name}\n" for name in ("metrics.jsonl", "skipped.jsonl", "perplexity.json")}
  for name, text in records.items():
    (workdir / name).write_text(text)
  mirrored(url, workdir, 1, 2, 3)
  assert copies(url) == ["step_00000002", "step_00000003"]
  assert checkpoint.restore(url, workdir) is None
  shutil.rmtree(workdir)
  folder = checkpoint.restore(url + "/", workdir)
  assert folder == checkpoint.step_folder(workdir, 3) and checkpoint.find_damage(folder) == []
  assert_same(checkpoint.load(folder).params, params(3))
  assert {name: (workdir / name).read_text() for name in records} == records
  # It goes on; older copies stay until there are enough newer ones.
  mirrored(url, workdir, 4)
  assert copies(url) == ["step_00000003", "step_00000004"]


def test_an_incomplete_copy_is_neither_restored_nor_kept(url, tmp_path):
  workdir = tmp_path / "run"
  mirrored(url, workdir, 1, 2)
  storage.delete(f"{url}/step_00000002/checkpoint.json")
  shutil.rmtree(workdir)
  assert checkpoint.restore(url, workdir).name == "step_00000001"
  mirrored(url, workdir, 3)
  assert storage.listing(f"{url}/step_00000002") == []
  assert copies(url) == ["step_00000001", "step_00000003"]


def test_a_run_that_lacks_its_newest_copy_makes_it_first(url, tmp_path):
  step(tmp_path, 1)
  mirrored(url, tmp_path)
  assert copies(url) == ["step_00000001"]


def test_a_copy_that_is_later_or_of_another_run_is_refused(url, tmp_path):
  mirrored(url, tmp_path / "run", 1, 2)
  step(tmp_path / "other", 1)
  with pytest.raises(ValueError, match="step_00000002 is later than .*other/step_00000001"):
    checkpoint.restore(url, tmp_path / "other")
  save(checkpoint.step_folder(tmp_path / "other", 2), params(7))
  with pytest.raises(ValueError, match="step_00000002 is of another run than .*other/step_0000"):
    checkpoint.restore(url, tmp_path / "other")


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "checkpoint.json"])
def test_a_copy_that_lost_a_file_leaves_no_checkpoint(url, tmp_path, name):
  mirrored(url, tmp_path / "run", 1)
  storage.delete(f"{url}/step_00000001/{name}")
  if name == "checkpoint.json":
    assert checkpoint.restore(url, tmp_path / "new") is None
  else:
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
      checkpoint.restore(url, tmp_path / "new")
  assert checkpoint.latest(tmp_path / "new") is None


def test_the_error_of_a_copy_is_raised_by_the_next_one_or_at_the_end(tmp_path, monkeypatch, capsys):
  def fail(file, url):
    raise storage.RemoteError(f"{url}: no connection")

  monkeypatch.setattr(storage, "upload", fail)
  monkeypatch.setattr(BreakingFileSystem, "store", {})
  with pytest.raises(storage.RemoteError, match="step_00000001/.*no connection"):
    mirrored("breaking://run", tmp_path, 1, 2)
  shutil.rmtree(tmp_path / "step_00000002")
  with pytest.raises(storage.RemoteError, match="step_00000001/.*no connection"):
    mirrored("breaking://run", tmp_path)
  with pytest.raises(ZeroDivisionError):
    with checkpoint.mirror("breaking://run", tmp_path, count=1):
      raise ZeroDivisionError
  assert (
    "the last checkpoint was not copied: breaking://run/step_00000001" in capsys.readouterr().err
  )
