"""Copies of checkpoints in an object store."""

import json
import shutil

import numpy as np
import pytest

from mooer_jax import checkpoint, storage
from mooer_jax.checkpoint.mirror import copies
from tests.checkpoint.checkpoints_of import assert_same, params, save


@pytest.fixture(params=["s3", "file"])
def url(request, tmp_path):
  if request.param == "file":
    return f"file://{tmp_path}/mirror"
  return f"{request.getfixturevalue('bucket')}/{request.node.name}"


def step(workdir, number):
  return save(
    checkpoint.step_folder(workdir, number),
    params(number),
    train_state={"step": np.int32(number)},
  )


def mirrored(url, workdir, *numbers, count=2):
  mirror = checkpoint.Mirror(url, workdir, count=count)
  mirror.complete()
  for number in numbers:
    folder = step(workdir, number)
    checkpoint.keep_last(workdir, count)
    mirror.copy(folder)


def test_an_empty_workdir_is_restored_from_the_newest_copy(url, tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  names = ("metrics.jsonl", "skipped.jsonl", "perplexity.json", "activation.json")
  records = {name: f"of {name}\n" for name in names}
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


@pytest.mark.parametrize(
  "content",
  [b"", b"{", b"[1]", b"\xff", b"{}", b'{"format": 1}', "no files", "../../outside"],
  ids=str,
)
def test_a_manifest_that_is_damaged_is_named_and_nothing_is_downloaded(tmp_path, content):
  folder = step(tmp_path / "copies", 1)
  if isinstance(content, str):
    about = json.loads((folder / "checkpoint.json").read_text())
    about["files"] = None if content == "no files" else {**about["files"], content: [0, ""]}
    content = json.dumps(about).encode()
  (folder / "checkpoint.json").write_bytes(content)
  with pytest.raises(
    ValueError, match="train.mirror: file:.*/step_00000001/checkpoint.json .*dele"
  ):
    checkpoint.restore(f"file://{tmp_path}/copies", tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_a_record_that_grows_during_its_upload_is_copied_as_it_was(url, tmp_path, monkeypatch):
  workdir, sizes, upload = tmp_path / "run", [], storage.upload
  workdir.mkdir()
  (workdir / "metrics.jsonl").write_text("1\n" * 3_000_000)  # 6 MB, which stores take in parts

  def upload_slowly(file, to):
    if to.endswith("metrics.jsonl"):
      sizes.append(file.stat().st_size)
      with (workdir / "metrics.jsonl").open("a") as metrics:
        metrics.write("2\n")
      sizes.append(file.stat().st_size)
    upload(file, to)

  monkeypatch.setattr(storage, "upload", upload_slowly)
  mirrored(url, workdir, 1)
  assert sizes == [6_000_000] * 2
  assert storage.read_bytes(f"{url}/metrics.jsonl") == b"1\n" * 3_000_000


def test_writing_is_tried_and_leaves_nothing(url, bucket, tmp_path):
  checkpoint.check_writing(url)
  assert storage.listing(url) == []
  (tmp_path / "file").touch()
  for bad in ("s3://absent/run", f"file://{tmp_path}/file/run"):
    with pytest.raises(storage.RemoteError, match=f"train.mirror cannot be written: {bad}/.trial"):
      checkpoint.check_writing(bad)
