"""Streams of the data, which the processes of a run share."""

import jax
import numpy as np
import pytest

from mooer_jax.data.batches import lengths_of, widen
from mooer_jax.data.dataset import eval_batches, merge_states, train_batches


def test_the_streams_of_all_processes_make_the_batches_of_one(shards, model_side):
  """Rows, shapes and positions; one process goes on where two have stopped."""
  for _ in range(4):
    shards.add(5)
  config = shards.config(streams=4, shuffle_buffer_size=16)

  def begin(process):
    return iter(train_batches(config, *model_side, process=process))

  whole, *parts = begin((0, 1)), begin((0, 2)), begin((1, 2))
  for _ in range(9):
    of_all, of_each = next(whole), [next(part) for part in parts]
    assert of_all.keys == (*of_each[0].keys, *of_each[1].keys) and len(of_all.keys) == 4
    longest = [max(n) for n in zip(*(lengths_of(host.batch) for host in of_each))]
    assert lengths_of(of_all.batch) == tuple(longest)
    rows = [widen(host.batch, longest) for host in of_each]
    jax.tree.map(
      lambda x, *of: np.testing.assert_array_equal(x, np.concatenate(of)), of_all.batch, *rows
    )
  state = merge_states([part.get_state() for part in parts])
  assert state == whole.get_state()
  expected = [next(whole).keys for _ in range(4)]
  again = begin((0, 1))
  again.set_state(state)
  assert [next(again).keys for _ in range(4)] == expected
  for iterator in (whole, again, *parts):
    iterator.close()


@pytest.mark.parametrize(
  ("changes", "processes", "message"),
  [
    ({"streams": 3}, 2, "data.streams=3 is not divisible by the 2 processes"),
    ({"streams": 3}, 1, "data.batch_size=4 is not divisible by the 3 streams"),
    ({"streams": 4, "shuffle_buffer_size": 4}, 1, "2 shards for 4 streams"),
    ({}, 4, "2 shards for 4 streams with data.workers=0"),
  ],
)
def test_streams_that_cannot_be_shared_are_refused(shards, model_side, changes, processes, message):
  shards.add(4)
  shards.add(4)
  with pytest.raises(ValueError, match=message):
    train_batches(shards.config(**changes), *model_side, process=(0, processes))


def test_a_position_of_an_earlier_version_is_of_one_stream_without_a_filter(shards, model_side):
  shards.add(8)
  shards.add(8)
  state = iter(train_batches(shards.config(), *model_side)).get_state()
  early = {"of": {k: v for k, v in state["of"].items() if k not in ("data.streams", "data.filter")}}
  early["reader"] = state["streams"]["0"]
  iter(train_batches(shards.config(), *model_side)).set_state(early)
  for changes, message in (
    ({"streams": 2, "shuffle_buffer_size": 12}, "data.streams was 1 and is 2"),
    ({"filter": "a == 1"}, "data.filter was '' and is 'a == 1'"),
  ):
    with pytest.raises(ValueError, match=message):
      iter(train_batches(shards.config(**changes), *model_side)).set_state(early)


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_processes_share_a_single_pass_in_its_order(shards, model_side, processes):
  """Each utterance, usable or not, is in one process; the places give the order."""
  shards.add(5)
  shards.add_members([("bad.txt", b"N"), ("bad.wav", b"no audio")])
  shards.add(2)
  whole = list(eval_batches(shards.config(), *model_side))
  parts = [
    [*eval_batches(shards.config(), *model_side, process=(i, processes))] for i in range(processes)
  ]
  found = sorted(
    (place, key) for part in parts for host in part for place, key in zip(host.places, host.keys)
  )
  assert [key for _, key in found] == [key for host in whole for key in host.keys]

  def skipped(batches):
    return sorted((s.key, s.cause) for host in batches for s in host.skipped)

  assert skipped(host for part in parts for host in part) == skipped(whole)
  most = sum(-(-number // processes) for number in (5, 1, 2))
  assert {part[-1].entries for part in parts} == {whole[-1].entries} == {8}
  assert max(sum(len(host.keys) for host in part) for part in parts) <= most
