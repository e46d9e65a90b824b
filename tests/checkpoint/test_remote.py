"""Checkpoints at URLs: an S3 server on loopback, and files that break while they are copied."""

import shutil
import threading

import numpy as np
import pytest

from mooer_jax import checkpoint, storage
from mooer_jax.checkpoint.remote import local_folder
from tests.checkpoint.checkpoints_of import assert_same, params, save


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "mooer_jax" / "checkpoints"


@pytest.fixture
def downloads(monkeypatch):
  """The URLs of the files that were downloaded."""
  found, download = [], storage.download

  def counted(url, file):
    found.append(url)
    download(url, file)

  monkeypatch.setattr(storage, "download", counted)
  return found


@pytest.fixture
def url(bucket, request):
  return f"{bucket}/remote/{request.node.name}"


def upload(folder, url):
  for file in folder.rglob("*"):
    if file.is_file():
      storage.upload(file, f"{url}/{file.relative_to(folder)}")
  return url


def test_a_checkpoint_at_a_url_is_copied_once_without_its_train_state(url, tmp_path, downloads):
  state = {"step": np.int32(1)}
  upload(save(tmp_path / "base", params(1), train_state=state), url)
  folder = checkpoint.find(url + "/")
  assert_same(checkpoint.load(url).params, params(1))
  assert checkpoint.find(url) == folder and checkpoint.url_of(folder) == url
  assert len({*downloads}) == len(downloads)
  assert (folder / "checkpoint.json").is_file() and not (folder / "train_state").exists()
  # An edited file is copied again, with the others of that version.
  (tmp_path / "base" / "generation.json").write_text('{"num_beams": 7}')
  storage.upload(tmp_path / "base" / "generation.json", f"{url}/generation.json")
  assert checkpoint.describe(url).generation == {"num_beams": 7}


def test_the_url_of_a_run_is_that_of_its_newest_complete_checkpoint(url, tmp_path):
  for number in (2, 10, 11):
    folder = save(checkpoint.step_folder(tmp_path, number), params(number))
    upload(folder, f"{url}/{folder.name}")
  storage.delete(f"{url}/step_00000011/checkpoint.json")
  assert checkpoint.locate(url) == f"{url}/step_00000010"
  assert_same(checkpoint.load(checkpoint.find(url)).params, params(10))


@pytest.mark.parametrize("found", ["nothing", "another folder"])
def test_a_url_without_a_checkpoint_is_named(url, tmp_path, found):
  if found != "nothing":
    (tmp_path / "a").write_text("a")
    storage.upload(tmp_path / "a", f"{url}/a")
  with pytest.raises(FileNotFoundError, match=f"{url.split('[')[0]}.*: neither a checkpoint"):
    checkpoint.find(url)
  with pytest.raises(FileNotFoundError, match=f"{url.split('[')[0]}.*: no such checkpoint"):
    checkpoint.describe(url)


@pytest.mark.parametrize("scheme", ["", "file", "s3"])
def test_a_file_in_place_of_a_folder_is_named(scheme, tmp_path, request):
  folder = save(tmp_path / "base", params(1))
  place = {"": str(folder), "file": f"file://{folder}"}.get(scheme)
  place = place or upload(folder, request.getfixturevalue("url"))
  with pytest.raises(
    FileNotFoundError, match="checkpoint.json: is a file; name the folder of a ch"
  ):
    checkpoint.find(f"{place}/checkpoint.json")
  if scheme:
    with pytest.raises(FileNotFoundError, match="checkpoint.json: is a file; name the folder"):
      checkpoint.describe(f"{place}/checkpoint.json")


def test_an_interrupted_copy_resumes_with_the_files_that_it_lacks(
  url, tmp_path, downloads, monkeypatch
):
  upload(save(tmp_path / "base", params(1)), url)
  counted = storage.download

  def broken(of, file):
    if of.endswith("config.json"):
      file.write_bytes(b"{")
      raise storage.RemoteError(f"{of}: no connection")
    counted(of, file)

  with monkeypatch.context() as patched:
    patched.setattr(storage, "download", broken)
    with pytest.raises(storage.RemoteError, match="config.json: no connection"):
      checkpoint.find(url)
  [*before] = downloads
  folder = checkpoint.find(url)
  assert downloads[-1] == f"{url}/checkpoint.json"
  assert f"{url}/config.json" not in before and not {*before} & {*downloads[len(before) :]}
  assert_same(checkpoint.load(folder).params, params(1))


def test_a_file_that_changed_at_the_url_is_refused(url, tmp_path):
  folder = save(tmp_path / "base", params(1))
  files = [file for file in (folder / "weights").rglob("*") if file.is_file()]
  weights = max(files, key=lambda file: file.stat().st_size)
  content = bytearray(weights.read_bytes())
  content[len(content) // 2] ^= 1
  weights.write_bytes(content)
  upload(folder, url)
  with pytest.raises(checkpoint.CheckpointError, match=f"{weights.name}: the copy differs"):
    checkpoint.find(url)
  shutil.copytree(save(tmp_path / "good", params(1)), folder, dirs_exist_ok=True)
  upload(folder, url)
  assert_same(checkpoint.load(url).params, params(1))


def test_a_file_that_is_missing_at_the_url_is_named(url, tmp_path, cache):
  upload(save(tmp_path / "base", params(1)), url)
  storage.delete(f"{url}/tokenizer/tokenizer.json")
  with pytest.raises(checkpoint.CheckpointError, match=r"tokenizer/tokenizer.json is missing"):
    checkpoint.find(url)
  assert not [*cache.rglob("checkpoint.json")]


def test_processes_of_a_host_share_a_copy(url, tmp_path, downloads):
  upload(save(tmp_path / "base", params(1)), url)
  found = []
  threads = [threading.Thread(target=lambda: found.append(local_folder(url))) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(found) == 4 and len({*found}) == 1
  assert len({*downloads}) == len(downloads)


def test_a_fine_tune_of_a_url_finds_its_base_from_anywhere(url, tmp_path, cache):
  local = save(tmp_path / "base", params(1))
  base = upload(local, f"{url}/base")
  tuned = save(tmp_path / "tuned", {"frontend": params(2)["frontend"]}, base=base)
  # One with a local base, which are uploaded together.
  beside = save(tmp_path / "run" / "other", {"frontend": params(3)["frontend"]}, base=local)
  upload(beside, f"{url}/run/other")
  shutil.rmtree(cache)
  shutil.rmtree(local)
  assert checkpoint.url_of(checkpoint.describe(tuned).base) == base
  found = checkpoint.load(f"{url}/run/other").params
  assert_same(found, {**params(1), "frontend": params(3)["frontend"]})
  storage.delete(f"{url}/base")
  with pytest.raises(FileNotFoundError, match=f"is a fine-tune of {base}, which does not exist"):
    checkpoint.describe(tuned)
