"""Truncated clips are reported."""

import dataclasses
import json

import numpy as np
import pytest

from mooer_jax.data.readers.entries import SkippedUtterance
from mooer_jax.run.config import TrainConfig
from mooer_jax.run.feed import BatchSummary
from mooer_jax.run.monitor import Monitor, SkippedLog


def _run(workdir, truncated, first=0):
  with Monitor(workdir, TrainConfig(steps=first + 1, log_every=1), first=first) as monitor:
    metrics = dict(step=first + 1, loss=1.0, accuracy=0.5, lr=1e-3, bad_steps=0)
    batch = BatchSummary(30.0, truncated, ())
    monitor.record({name: np.asarray(value) for name, value in metrics.items()}, batch)


def test_truncated_clips_are_counted_over_a_runs_parts(tmp_path, capsys):
  _run(tmp_path, truncated=2)
  metrics = tmp_path / "metrics.jsonl"
  row = json.loads(metrics.read_text())
  assert row.pop("truncated") == 2
  metrics.write_text(json.dumps({**row, "cut": 2}) + "\n")  # its name in version 0.1
  _run(tmp_path, truncated=1, first=1)
  said = capsys.readouterr().err
  assert "  truncated 2" in said and "  truncated 1" in said
  assert "clips truncated to data.max_s, but not their transcripts: 2" in said
  assert "clips truncated to data.max_s, but not their transcripts: 3" in said
  _run(tmp_path / "none", truncated=0)
  said = capsys.readouterr().err
  assert "clips truncated" not in said and "  truncated" not in said


def test_speeds_are_those_of_the_steps_not_of_their_records(tmp_path):
  """The last two steps of a run are recorded at once."""
  speeds = []
  with Monitor(tmp_path, TrainConfig(steps=2, log_every=1), first=0) as monitor:
    monitor._tensorboard.add_scalar = lambda name, value, step: (
      speeds.append(value) if name.endswith("_per_s") else None
    )
    for step in (1, 2):
      metrics = dict(step=step, loss=1.0, accuracy=0.5, lr=1e-3, bad_steps=0)
      batch = BatchSummary(30.0, 0, (), interval_s=0.5)
      monitor.record({name: np.asarray(value) for name, value in metrics.items()}, batch)
  assert speeds == [2.0, 60.0] * 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "skipped.jsonl"])
@pytest.mark.parametrize("line", ["garbage", '{"a": 1}', "[1]", '{"step": "x"}'])
def test_a_damaged_line_of_an_earlier_part_is_named(tmp_path, name, line):
  (tmp_path / name).write_text(f"{line}\n")
  with pytest.raises(ValueError, match=f"{name}:1: damaged .*restore the file, or move it away"):
    _run(tmp_path, truncated=0, first=1)


def test_any_text_of_a_skipped_utterance_is_recorded_and_read_again(tmp_path):
  """Line separators of Unicode, and lone surrogates as of a file name that is not UTF-8."""
  skipped = SkippedUtterance("too long", "k", "s\udcff.tar", "d\ud800", "a\u2028b\x85c\u2029d", "t")
  SkippedLog(tmp_path, first=0).add(1, [skipped])
  path = tmp_path / "skipped.jsonl"
  before = path.read_bytes()
  resumed = SkippedLog(tmp_path, first=1)
  assert resumed.names == {("s\udcff.tar", "k", "too long")} and path.read_bytes() == before
  row = {"step": 1, **dataclasses.asdict(skipped)}
  assert [json.loads(line) for line in before.decode().split("\n")[:-1]] == [row]
