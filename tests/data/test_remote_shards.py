"""Shards at URLs: the same utterances as of local ones, and an error if the connection is lost."""

import dataclasses

import numpy as np
import pytest

from mooer_jax import storage
from mooer_jax.data.dataset import eval_batches
from mooer_jax.data.prepare import prepare
from mooer_jax.data.readers import read, shard_names
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance
from mooer_jax.data.stats import data_stats
from tests.data.conftest import Shards, take_batches
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
  "content, error, message",
  [
    (b"gone.tar", FileNotFoundError, "1 of 1 shards do not exist, first breaking://speech/gone"),
    (b'{"key": "a"}', ValueError, "is JSON; a URL must be that of a list of tars"),
    (None, FileNotFoundError, "no such list of shards; a URL must be that of a data.list"),
  ],
)
def test_a_bad_list_is_refused(breaking, content, error, message):
  if content is None:
    del BreakingFileSystem.store["speech/data.list"]
  else:
    BreakingFileSystem.store["speech/data.list"] = content
  with pytest.raises(error, match=message):
    shard_names(breaking)


def test_prepare_refuses_urls(breaking, tmp_path):
  with pytest.raises(ValueError, match="is a URL"):
    prepare("s3://b/data.list", tmp_path / "out")
  url = next(name for name in BreakingFileSystem.store if name.endswith(".tar"))
  (tmp_path / "data.list").write_text(f"breaking://{url}\n")
  with pytest.raises(ValueError, match=f"breaking://{url}: is a URL"):
    prepare(tmp_path / "data.list", tmp_path / "out")
