"""Data at URLs: the same utterances as of local ones, and an error if the connection is lost."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from mooer_jax import storage
from mooer_jax.data.dataset import eval_batches
from mooer_jax.data.labels import LabelFile, describe
from mooer_jax.data.prepare import prepare
from mooer_jax.data.readers import audio_files, read, shard_names
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance
from mooer_jax.data.recordings import Recordings
from mooer_jax.data.stats import data_stats
from mooer_jax.run.fill_feature_cache import dataset_name
from tests.data.conftest import Shards, take_batches
from tests.data.test_readers import CLIPS, FORMATS, read_all
from tests.object_store import BreakingFileSystem


@pytest.fixture(scope="module")
def stored(bucket, tmp_path_factory):
  """(local shards, URL of their data.list in an object store)."""
  shards = Shards(tmp_path_factory.mktemp("shards"))
  for _ in range(3):
    shards.add(4)
  for file in shards.folder.iterdir():
    storage.upload(file, f"{bucket}/train/{file.name}")
  return shards, f"{bucket}/train/data.list"


@pytest.fixture
def breaking(shards, monkeypatch):
  """The URL of a data.list whose requests raise the next of `BreakingFileSystem.errors`."""
  shards.add(4)
  store = {f"speech/{file.name}": file.read_bytes() for file in shards.folder.iterdir()}
  monkeypatch.setattr(storage, "WAITS_S", (0,))
  monkeypatch.setattr(storage, "_BUFFER_BYTES", 1000)  # several requests
  monkeypatch.setattr(BreakingFileSystem, "store", store)
  monkeypatch.setattr(BreakingFileSystem, "errors", [])
  return "breaking://speech/data.list"


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_batches_are_those_of_local_shards(stored, model_side, workers):
  shards, url = stored
  config = shards.config(workers=workers)
  local = take_batches(config, model_side, 4)
  remote = take_batches(dataclasses.replace(config, shards=url), model_side, 4)
  for one, other in zip(local, remote, strict=True):
    assert one.keys == other.keys
    np.testing.assert_array_equal(one.batch.features[0], other.batch.features[0])


def test_a_local_list_may_name_urls(stored, tmp_path):
  shards, url = stored
  here = tmp_path / "data.list"
  here.write_text(f"{storage.join(storage.parent(url), 'shards_000000001.tar')}\n")
  [name] = shard_names(str(here))
  assert [raw.key for raw in read(name)] == shards.keys[4:8]


def test_labels_beside_a_tar_are_read(bucket, tmp_path, stored):
  """Emilia, as OpenDataLab publishes it."""
  shards, _ = stored
  labels = tmp_path / "labels"
  labels.write_text('{"id": "utt0001", "text": "zwei"}\n')
  storage.upload(labels, f"{bucket}/emilia/a.jsonl")
  storage.upload(shards.folder / "shards_000000000.tar", f"{bucket}/emilia/a.tar")
  found = [raw for raw in read(f"{bucket}/emilia/a.tar") if isinstance(raw, RawUtterance)]
  assert [(raw.key, raw.text) for raw in found] == [("utt0001", b"zwei")]


def test_stats_and_evaluation_read_urls(stored, model_side):
  shards, url = stored
  assert data_stats(url, processes=1, progress=False).utterances == len(shards.keys)
  config = shards.config(shards=url)
  batches = eval_batches(config, *model_side)
  assert sorted(key for host in batches for key in host.keys) == sorted(shards.keys)


def test_a_lost_connection_ends_the_run_and_skips_nothing(breaking, shards):
  [name] = shard_names(breaking)
  assert [raw.key for raw in read(name)] == shards.keys
  BreakingFileSystem.errors[:] = [None] * 6 + [ConnectionError("down")] * 2
  with pytest.raises(storage.RemoteError, match="shards_000000000.tar: no connection"):
    list(read(name))
  BreakingFileSystem.errors[:] = [None] * 6 + [ConnectionError("down")]
  assert [raw.key for raw in read(name)] == shards.keys


def test_a_truncated_object_is_a_damaged_shard(breaking, shards):
  """As it is on a disk: the store has no more of it."""
  [name] = shard_names(breaking)
  place = name.removeprefix("breaking://")
  BreakingFileSystem.store[place] = BreakingFileSystem.store[place][:-20_000]
  *good, bad = read(name)
  assert isinstance(bad, SkippedUtterance) and bad.cause == "bad shard"
  assert [raw.key for raw in good] == shards.keys[: len(good)]


@pytest.mark.parametrize(
  "content, message",
  [
    (b"gone.tar", "1 of 1 shards do not exist, first breaking://speech/gone"),
    (None, "breaking://speech/data.list: no such list of shards"),
  ],
)
def test_a_bad_list_is_refused(breaking, content, message):
  if content is None:
    del BreakingFileSystem.store["speech/data.list"]
  else:
    BreakingFileSystem.store["speech/data.list"] = content
  with pytest.raises(FileNotFoundError, match=message):
    shard_names(breaking)


@pytest.fixture(params=[kind for kind in FORMATS if kind != "prepared"])
def both(request, bucket, tmp_path):
  """(local data set of a format, its URL)."""
  (tmp_path / "data").mkdir()
  source = FORMATS[request.param](tmp_path / "data")
  folder = f"{bucket}/formats/{request.param.replace(' ', '_')}"
  for file in (tmp_path / "data").rglob("*"):
    if file.is_file():
      storage.upload(file, f"{folder}/{file.relative_to(tmp_path / 'data')}")
  name = source.relative_to(tmp_path / "data")
  return str(source), folder if name == Path() else f"{folder}/{name}"


def test_each_format_is_read_at_a_url_as_locally(both):
  local, url = both
  here, there = read_all(local), read_all(url)
  assert all(isinstance(entry, RawUtterance) for entry in there)
  assert [(e.key, e.audio, e.text) for e in there] == [(e.key, e.audio, e.text) for e in here]
  assert all(storage.is_file(file) and storage.is_url(file) for file in audio_files(url))


def test_each_format_at_a_url_can_be_prepared_and_counted(both, tmp_path):
  local, url = both
  prepare(url, tmp_path / "out", processes=1, progress=False)
  prepared = {(e.key, e.audio) for e in read_all(str(tmp_path / "out"))}
  assert prepared == {(e.key, e.audio) for e in read_all(local)}
  assert data_stats(url, processes=1) == data_stats(local, processes=1)


def test_a_local_list_names_audio_at_urls(bucket, tmp_path):
  (tmp_path / "a.wav").write_bytes(CLIPS[0])
  storage.upload(tmp_path / "a.wav", f"{bucket}/clips/a.wav")
  lines = [{"key": name, "wav": f"{bucket}/clips/{name}.wav", "txt": "N"} for name in "ab"]
  (tmp_path / "data.list").write_text("".join(json.dumps(line) + "\n" for line in lines))
  found, absent = read_all(str(tmp_path / "data.list"))
  assert found.audio == CLIPS[0]
  assert absent.cause == "no audio" and f"{bucket}/clips/b.wav: no such file" in absent.detail


@pytest.mark.parametrize("kind", ["raw list", "raw list of segments", "annotation", "emilia-pipe"])
def test_a_lost_connection_to_a_clip_skips_nothing(kind, tmp_path, monkeypatch):
  source = FORMATS[kind](tmp_path)
  files = [file for file in tmp_path.rglob("*") if file.is_file()]
  store = {f"a/{file.relative_to(tmp_path)}": file.read_bytes() for file in files}
  monkeypatch.setattr(storage, "WAITS_S", (0,))
  monkeypatch.setattr(BreakingFileSystem, "store", store)
  monkeypatch.setattr(BreakingFileSystem, "errors", [])
  url = f"breaking://a/{source.relative_to(tmp_path)}"
  if kind == "emilia-pipe":
    [name, _] = (url for url in store if url.endswith(".json"))
    names = [f"breaking://{name}"]
  else:
    names = shard_names(url)
  read_bytes = storage.read_bytes

  def break_at_audio(path):
    if path.endswith((".wav", ".flac")):
      BreakingFileSystem.errors[:] = [ConnectionError("down")] * 2
    return read_bytes(path)

  monkeypatch.setattr(storage, "read_bytes", break_at_audio)
  [first, *_] = read(names[0])
  with pytest.raises(storage.RemoteError, match=r"\.(wav|flac): no connection"):
    first.load()


def test_a_lost_connection_to_the_labels_of_a_recording_is_not_a_damaged_file(monkeypatch):
  monkeypatch.setattr(storage, "WAITS_S", ())
  monkeypatch.setattr(BreakingFileSystem, "store", {"a/x/x.json": b"[]"})
  monkeypatch.setattr(BreakingFileSystem, "errors", [ConnectionError("down")])
  with pytest.raises(storage.RemoteError, match=r"x/x\.json: no connection"):
    list(read("breaking://a/x/x.json"))


def test_a_label_file_at_a_url(bucket, tmp_path):
  (tmp_path / "labels").write_text("a one\nb two\n")
  storage.upload(tmp_path / "labels", f"{bucket}/labels/text")
  labels = LabelFile(f"{bucket}/labels/text")
  assert pickle.loads(pickle.dumps(labels)).find("b") == [(2, b"two\n")]
  assert describe(labels.path, "replace", "\n") == "text (12 bytes), replace"
  assert not labels.find("c")
  with pytest.raises(FileNotFoundError, match="labels/none: no such label file"):
    LabelFile(f"{bucket}/labels/none")
  (tmp_path / "labels").write_text("{}")
  storage.upload(tmp_path / "labels", f"{bucket}/labels/json")
  with pytest.raises(ValueError, match=f"{bucket}/labels/json: is JSON"):
    LabelFile(f"{bucket}/labels/json")


def test_recordings_at_a_url(bucket, tmp_path):
  for number in range(2):
    (tmp_path / f"{number}.wav").write_bytes(CLIPS[number])
    storage.upload(tmp_path / f"{number}.wav", f"{bucket}/noise/{number}.wav")
  options = {"option": "data.augment.noise", "sample_rate_hz": 16000}
  local, remote = (Recordings(source, **options) for source in (str(tmp_path), f"{bucket}/noise"))
  assert remote.description() == local.description()
  np.testing.assert_array_equal(remote[1], local[1])


def test_a_cache_is_not_complete_for_data_that_changed_at_their_url(bucket, tmp_path, shards):
  clip, source = tmp_path / "a.wav", f"{bucket}/changed/data.list"
  (tmp_path / "data.list").write_text('{"key": "a", "wav": "a.wav", "txt": "N"}\n')
  storage.upload(tmp_path / "data.list", source)
  names = []
  for content in (CLIPS[0], CLIPS[0][:-1] + b"x"):
    clip.write_bytes(content)
    storage.upload(clip, f"{bucket}/changed/a.wav")
    names.append(dataset_name(shards.config(shards=source)))
  assert names[0] != names[1] and names[1] == dataset_name(shards.config(shards=source))
  storage.delete(f"{bucket}/changed/a.wav")
  assert dataset_name(shards.config(shards=source)) not in names
