"""Positions in a stream, in this version's form and in earlier ones, and readings of utterances."""

import contextlib
import dataclasses
import itertools
import json

import pytest

from mooer_jax.data.config import SourceConfig
from mooer_jax.data.examples import Example
from mooer_jax.data.utterances import Position, UtteranceStream, reading_id
from tests.data.conftest import take_batches


def test_readings_are_numbered_as_before_and_never_alike():
  places = list(itertools.product(range(3), (0, 1, 999, 1000, 1001, 2000, 5000)))
  names = [str(reading_id(*place)) for place in places]
  assert len(set(names)) == len(places)
  assert [reading_id(0, 7), reading_id(2, 999)] == [7, 2999]  # what saved runs continue with


def test_a_position_of_an_early_version_is_read():
  early = {"epoch": 2, "shard": 1, "entry": 3, "read": 40, "usable": 5}
  saved = {**early, "skipped": {"too short": 2}, "damaged": [1]}
  position = Position.from_json(saved)
  assert position == Position(**early, skipped={"too short": 2}, damaged=(1,))
  assert Position.from_json(json.loads(json.dumps(dataclasses.asdict(position)))) == position


@pytest.mark.parametrize("endless", [True, False])
def test_a_stream_continues_from_every_position(shards, wav, endless):
  for number in range(3):
    shards.add(5)
    shards.add_members([(f"lone{number}.wav", wav(0.3)), ("twice.wav", b""), ("twice.txt", b"")])

  def make(raw, reading):
    return Example(raw.key, f"{raw.shard} {reading}", (), raw.task, None, None, None, 1.0)

  def stream():
    config = shards.config(task="", task_weights={"": 1.6}, max_bad_share=1.0)
    paths = sorted(map(str, shards.folder.glob("*.tar")))
    return UtteranceStream(paths, make, config, share=None if endless else (0, 1))

  original, found = stream(), []
  with contextlib.suppress(StopIteration):
    while len(found) < 40:
      found.append((original.position, original.take()))
  assert len(found) == (40 if endless else 16)
  assert len({(example.key, example.text) for _, example in found}) == len(found)
  for start in range(len(found)):
    other = stream()
    other.seek(Position.from_json(json.loads(json.dumps(dataclasses.asdict(found[start][0])))))
    for position, example in found[start : start + 9]:
      assert other.position == position
      assert other.take() == example


def test_a_batch_of_more_than_an_epoch_is_named_once(shards, model_side, capsys):
  shards.add(4)
  assert len(take_batches(shards.config(batch_size=4), model_side, 3)) == 3
  assert capsys.readouterr().err == ""
  take_batches(shards.config(batch_size=10, shuffle_buffer_size=20), model_side, 3)
  line = f"{shards.list}: one batch takes 2.5 epochs: its 10 rows are more than the usable"
  said = capsys.readouterr().err
  assert said.count(line) == said.count("\n") == 1
  assert "utterances, 4 in 1 of its shards; lower data.batch_size" in said
  sets = {name: SourceConfig(str(shards.list), weight=w) for name, w in (("a", 3.0), ("b", 1.0))}
  mixture = shards.config(shards="", mixture=sets, batch_size=8, shuffle_buffer_size=16)
  take_batches(mixture, model_side, 3)
  [said] = capsys.readouterr().err.splitlines()  # of one of the two
  assert "one batch takes 1.5 epochs: its 6 rows" in said
