"""A clip of every odd kind is used whole or skipped and counted, wherever clips are read."""

import json
from collections import Counter

import pytest

from mooer_jax.data.dataset import eval_batches, train_batches
from mooer_jax.data.pack import pack
from mooer_jax.data.readers.entries import CAUSES, RawUtterance
from mooer_jax.data.readers.shards import read_list, read_shard
from mooer_jax.run.fill_feature_cache import cache_misses
from tests.audio.made import odd_clips

ODD = odd_clips()
REFUSED = {name: clip.cause for name, clip in ODD.items() if clip.cause}
USED = {*ODD} - {*REFUSED}


@pytest.fixture
def config(shards):
  """Data of all odd clips under their names, with some good ones."""
  shards.add_members(
    member
    for name, clip in ODD.items()
    for member in ((f"{name}.txt", b"A"), (f"{name}.wav", clip.data))
  )
  shards.add(4)
  return shards.config(max_s=3.0, buckets=(60,), max_bad_share=1.0)


def _collect(hosts):
  keys = {key for host in hosts for key in host.keys}
  return keys, {skip.key: skip.cause for host in hosts for skip in host.skipped}


def test_training_skips_and_counts_them(config, model_side, shards):
  iterator = iter(train_batches(config, *model_side))
  hosts = [next(iterator) for _ in range(2 * len(ODD) // config.batch_size + 4)]
  iterator.close()
  keys, skipped = _collect(hosts)
  assert keys == USED | {*shards.keys}
  assert skipped == REFUSED


def test_evaluation_skips_and_counts_them(config, model_side, shards):
  keys, skipped = _collect(list(eval_batches(config, *model_side)))
  assert keys == USED | {*shards.keys}
  assert skipped == REFUSED


def test_the_feature_cache_skips_and_counts_them(config, model_side, shards):
  skipped = Counter()
  batches = cache_misses(config, model_side[1], known=set(), skipped=skipped)
  assert sum(len(digests) for _, digests, _ in batches) == len(USED) + len(shards.keys)
  assert skipped == Counter(REFUSED.values())


def test_clips_of_an_annotation_are_skipped_and_counted(model_side, shards, tmp_path):
  for name, clip in ODD.items():
    (tmp_path / name).write_bytes(clip.data)
  entries = [{"path": name, "text": "A"} for name in ODD]
  (tmp_path / "all.json").write_text(json.dumps({"annotation": entries}))
  config = shards.config(
    shards=str(tmp_path / "all.json"), max_s=3.0, buckets=(60,), max_bad_share=1.0
  )
  keys, skipped = _collect(list(eval_batches(config, *model_side)))
  assert len(keys) == len(USED)
  assert sorted(skipped.values()) == sorted(REFUSED.values())


@pytest.mark.parametrize("segmented", [False, True])
def test_packing_leaves_them_out_and_counts_them(tmp_path, segmented):
  for name, clip in ODD.items():
    (tmp_path / name).write_bytes(clip.data)
  (tmp_path / "wav.scp").write_text("".join(f"{name} {tmp_path}/{name}\n" for name in ODD))
  (tmp_path / "text").write_text("".join(f"{name} a\n" for name in ODD))
  (tmp_path / "segments").write_text("".join(f"{name} {name} 0.1 0.7\n" for name in ODD))
  report = pack(
    tmp_path / "wav.scp",
    tmp_path / "text",
    tmp_path / "out",
    segments=tmp_path / "segments" if segmented else None,
    processes=1,
    progress=False,
  )
  # All channels are packed; which of them are used is the model's.
  expected = {name: cause for name, cause in REFUSED.items() if cause != "channels cancel"}
  assert {left.key: left.cause for left in report.left_out} == expected
  assert all(left.key in left.detail for left in report.left_out)
  [shard] = read_list(report.data_list)
  raw = list(read_shard(shard))
  assert all(isinstance(entry, RawUtterance) for entry in raw)
  assert {entry.key for entry in raw} == {*ODD} - {*expected}
  if not segmented:
    assert all(entry.audio == ODD[entry.key].data for entry in raw)


def test_every_cause_can_be_counted():
  assert {*REFUSED.values()} <= {*CAUSES}
  assert len({*CAUSES}) == len(CAUSES)
