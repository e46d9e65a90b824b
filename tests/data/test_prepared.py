"""Prepared datasets: read in any order, damage costs what it hits, other datasets are refused."""

import contextlib
import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from mooer_jax.data.dataset import eval_batches, train_batches
from mooer_jax.data.prepare import prepare
from mooer_jax.data.readers import prepared, read, shard_names, utterance_names
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance
from mooer_jax.data.stats import data_stats
from mooer_jax.data.utterances import EpochReader
from tests.data.conftest import assert_resumes, take_with_states


@pytest.fixture
def dataset(tmp_path, shards):
  """Makes a dataset of shards of so many utterances."""

  def make(*counts):
    for count in counts:
      shards.add(count)
    prepare(shards.list, tmp_path / "out", processes=1, progress=False)
    return tmp_path / "out"

  return make


def keys_of(reader, start=(0, 0, 0)):
  readings = [reading.entry for reading in reader.read_from(*start)]
  return [entry.key for entry in readings if entry is not None]


def test_a_part_is_a_block_of_utterances_across_files(dataset, shards):
  folder = str(dataset(50, 0, 80))
  assert shard_names(folder) == [f"{folder}#0-64", f"{folder}#64-128", f"{folder}#128-130"]
  assert shard_names(folder + "/") == shard_names(folder)
  assert [e.key for name in shard_names(folder) for e in read(name)] == shards.keys


def test_names_of_utterances_take_no_memory():
  names = prepared.Utterances("d", range(10**9))
  assert len(names) == 10**9 and names[5] == "d#5-6" and names[-1] == "d#999999999-1000000000"
  assert names[3::8][::2] == prepared.Utterances("d", range(3, 10**9, 16))
  assert names[3::8][1] == "d#11-12" and len(pickle.dumps(names)) < 200
  order = EpochReader(names, epoch=3, seed=1, task_weights={}).order
  first = [order[place] for place in range(1000)]
  assert len({*first}) == 1000 and max(first) > 0.9e9 and min(first) < 0.1e9


def test_each_epoch_reads_all_utterances_once_in_an_order_of_its_own(dataset, shards):
  names = utterance_names(str(dataset(20, 21)))
  epochs = [EpochReader(names, epoch, 0, {}) for epoch in range(3)]
  orders = [keys_of(epoch) for epoch in epochs]
  assert all(sorted(order) == shards.keys for order in orders)
  assert len({*map(tuple, orders)}) == 3
  assert keys_of(EpochReader(names, 0, 1, {})) != orders[0]
  for place in (0, 1, 17, 40, 41):
    assert keys_of(epochs[0], (place, 0, 0)) == orders[0][place:]
  assert keys_of(epochs[0], (17, 1, 0)) == orders[0][18:]


def test_the_order_is_that_of_the_whole_dataset(dataset):
  """Not of blocks: neighbours in the files are seldom neighbours in the order."""
  names = utterance_names(str(dataset(*[100] * 4)))
  order = [int(key[3:]) for key in keys_of(EpochReader(names, 0, 0, {}))]
  distances = np.abs(np.diff(order))
  assert abs(np.mean(distances) - 400 / 3) < 15  # that of independent uniform places
  assert np.mean(distances < 4) < 0.05


def test_streams_do_not_read_neighbours_at_the_same_time():
  names = prepared.Utterances("d", range(1200))
  places = [EpochReader(names[stream::3], 0, 0, {}).order for stream in range(3)]
  together = [[3 * order[i] + stream for i in range(400)] for stream, order in enumerate(places)]
  assert sorted(np.ravel(together)) == [*range(1200)]
  first, second, _ = np.asarray(together)
  assert abs(np.mean(np.abs(first - second)) - 400) < 50 and np.mean(second - first == 1) < 0.02


def test_an_iterator_that_is_left_ends_its_threads(dataset):
  names = utterance_names(str(dataset(200)))
  with contextlib.closing(EpochReader(names, 0, 0, {}).read_from(0, 0, 0)) as readings:
    assert isinstance(next(readings).entry, RawUtterance)


@pytest.mark.parametrize(
  "changes", [{}, {"streams": 2}, pytest.param({"workers": 2}, marks=pytest.mark.slow)]
)
def test_training_resumes_exactly_at_an_index(dataset, shards, model_side, wav, changes):
  shards.add_members(
    [("bad.txt", b"A"), ("bad.wav", b"no audio"), ("no.txt", b"?"), ("no.wav", wav(0.3))]
  )
  folder = str(dataset(9, 12, 14))
  config = shards.config(shards=folder, batch_size=4, shuffle_buffer_size=8, **changes)
  batches = train_batches(config, *model_side)
  states, hosts = take_with_states(batches, 22)
  seen = [key for host in hosts for key in host.keys]
  assert {*seen[:44]} >= {*shards.keys} and max(map(seen.count, seen)) <= 3
  assert {s.key for host in hosts for s in host.skipped} == {"bad", "no"}
  assert_resumes(batches, states, hosts, at=(13, 5), count=5)


def test_one_part_is_enough_for_several_streams(dataset, shards, model_side):
  folder = str(dataset(12))
  config = shards.config(shards=folder, streams=4)
  with contextlib.closing(iter(train_batches(config, *model_side))) as iterator:
    assert {key for _ in range(3) for key in next(iterator).keys} == {*shards.keys}
  with pytest.raises(ValueError, match="12 shards for 4 streams with data.workers=4"):
    train_batches(dataclasses.replace(config, workers=4), *model_side)


def test_the_saved_position_of_another_dataset_is_refused(dataset, shards, model_side):
  folder = dataset(12)
  config = shards.config(shards=str(folder))
  state = iter(train_batches(config, *model_side)).get_state()
  shards.add(1)
  prepare(shards.list, folder.parent / "more" / folder.name, processes=1, progress=False)
  other = dataclasses.replace(config, shards=str(folder.parent / "more" / folder.name))
  with pytest.raises(ValueError, match="the saved data position belongs to other settings"):
    iter(train_batches(other, *model_side)).set_state(state)


def test_evaluation_reads_in_order(dataset, shards, model_side):
  folder = str(dataset(5, 6))
  hosts = [*eval_batches(shards.config(shards=folder), *model_side)]
  assert [key for host in hosts for key in host.keys] == shards.keys


def test_filters_select_by_the_fields_of_the_source(dataset, shards, model_side, wav):
  for number in range(8):
    fields = {"text": f"N{number}", "language": "zh" if number % 2 else "en"}
    members = [(f"{number}.json", json.dumps(fields).encode()), (f"{number}.wav", wav(0.3))]
    shards.add_members(members)
  folder = str(dataset())
  condition = "language == 'zh'"
  stats = data_stats(folder, condition=condition, processes=1)
  assert stats.utterances == stats.left_out == 4 and {*stats.lengths_by["language"]} == {"zh"}
  config = shards.config(shards=folder, filter=condition, batch_size=2, shuffle_buffer_size=2)
  with contextlib.closing(iter(train_batches(config, *model_side))) as iterator:
    assert {key for _ in range(2) for key in next(iterator).keys} == {"1", "3", "5", "7"}


def test_a_damaged_utterance_costs_itself(dataset, shards):
  folder = dataset(6)
  [file] = map(Path, prepared.audio_files(str(folder)))
  content = bytearray(file.read_bytes())
  at = len(content) // 8
  content[at : at + 8] = bytes(byte ^ 0xFF for byte in content[at : at + 8])
  file.write_bytes(content)
  [name] = shard_names(str(folder))
  found = [*read(name)]
  [skipped] = [entry for entry in found if isinstance(entry, SkippedUtterance)]
  assert len(found) == 6 and skipped.cause == "no audio"
  assert skipped.key == f"out#{found.index(skipped)}" and "Corrupted" in skipped.detail


@pytest.mark.parametrize("size", [0, 1000, 1 << 16, -1])
def test_a_truncated_file_is_refused_at_the_start(dataset, size):
  folder = dataset(20)
  [file] = map(Path, prepared.audio_files(str(folder)))
  file.write_bytes(file.read_bytes()[:size])
  with pytest.raises(ValueError, match="00000-of-00001: must hold 20 utterances, but has .*; copy"):
    shard_names(str(folder))


def test_a_missing_file_is_refused_at_the_start(dataset):
  folder = dataset(1, 1)
  Path(prepared.audio_files(str(folder))[1]).unlink()
  with pytest.raises(ValueError, match="00001-of-00002: must hold 1 utterances, but has open"):
    shard_names(str(folder))


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_damaged_description_is_refused(dataset, name):
  folder = dataset(1)
  (folder / name).write_text("{")
  with pytest.raises(ValueError, match=f"{name}: not JSON"):
    shard_names(str(folder))


@pytest.mark.parametrize("change", ["features", "split"])
def test_another_tfds_dataset_is_refused(dataset, change):
  folder = dataset(1)
  if change == "split":
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"].append({**info["splits"][0], "name": "test"})
    (folder / "dataset_info.json").write_text(json.dumps(info))
  else:
    features = json.loads((folder / "features.json").read_text())
    del features["featuresDict"]["features"]["more"]
    (folder / "features.json").write_text(json.dumps(features))
  with pytest.raises(ValueError, match="only those of `mooer-jax data prepare` are read"):
    shard_names(str(folder))
