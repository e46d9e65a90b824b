"""Batches are on the devices ahead of their steps; positions, errors and stops keep their turn."""

import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mooer_jax.data.batches import HostBatch
from mooer_jax.data.readers.entries import SkippedUtterance
from mooer_jax.data.utterances import BadDataError
from mooer_jax.run.config import TrainConfig
from mooer_jax.run.feed import AHEAD, Feed
from mooer_jax.run.monitor import Monitor, SkippedLog
from mooer_jax.sharding import make_mesh
from mooer_jax.speech_llm import Batch


def _batch(number):
  tokens_BS = np.full((1, 2), number, np.int32)
  features = (np.zeros((1, 3, 2), np.float32),)
  return Batch(features, (np.ones(1, np.int32),), tokens_BS, tokens_BS, tokens_BS)


class _Numbers:
  """Batches 1, 2, …; its state, which it changes in place, is the number of the last one."""

  def __init__(self, *, fails_at=None, seconds=0.0):
    self._state, self._fails_at, self._seconds = {"at": 0}, fails_at, seconds

  def __next__(self):
    time.sleep(self._seconds)
    self._state["at"] += 1
    if self._state["at"] == self._fails_at:
      raise BadDataError("bad")
    return HostBatch(_batch(self._state["at"]), ("a",), ("",), ("",), (1.0,), ())

  def get_state(self):
    return self._state


@pytest.fixture
def open_feed():
  stop = threading.Event()

  def open_feed(numbers):
    dataset = SimpleNamespace(shapes=[_batch(0)])
    return Feed(dataset, numbers, make_mesh(devices=jax.devices()[:1]), stop), stop

  return open_feed


def _on_devices():
  """Numbers of the batches that are on the devices."""
  return {int(x[0, 0]) for x in jax.live_arrays() if x.shape == (1, 2)}


def test_the_next_batches_are_on_the_devices_while_a_step_runs(open_feed):
  feed, _ = open_feed(_Numbers())
  before = _on_devices()
  for step in range(1, 6):
    summary, batch, stopping = feed.take()
    feed.refill()  # the step of `batch` is queued, and none of those behind it
    assert batch.labels_BS.tolist() == [[step, step]] and not stopping
    assert _on_devices() - before >= {*range(step, step + 1 + AHEAD)} - before
    assert feed.state() == {"at": step}  # of the batch that was taken, not of those behind it
    assert summary.audio_s == 1.0
  assert AHEAD >= 2


def test_an_error_is_raised_in_its_turn(open_feed):
  feed, _ = open_feed(_Numbers(fails_at=4))
  for _ in range(3):
    feed.take()
    feed.refill()
  assert feed.state() == {"at": 3}
  with pytest.raises(BadDataError, match="bad"):
    feed.take()


def test_a_stop_ends_with_the_step_that_is_taken_next(open_feed):
  feed, stop = open_feed(_Numbers())
  assert not feed.take()[2]
  stop.set()
  feed.refill()
  assert feed.take()[2]


def test_the_time_that_the_loop_waits_is_counted_once(open_feed):
  start = time.perf_counter()
  feed, _ = open_feed(_Numbers(seconds=0.02))
  waited = []
  for _ in range(3):
    waited.append(feed.take()[0].waited_s)
    feed.refill()
  assert 0.02 * (1 + AHEAD) <= waited[0] and all(0.02 <= s for s in waited[1:])
  assert sum(waited) <= time.perf_counter() - start


def test_the_share_of_waiting_is_that_of_one_interval(open_feed, tmp_path):
  """Of short steps, of which one waits for data: its wait is longer than the others' time."""
  numbers = _Numbers()
  feed, _ = open_feed(numbers)
  shares = []
  with Monitor(tmp_path, TrainConfig(steps=8, log_every=1), first=0) as monitor:
    monitor._tensorboard.add_scalar = lambda name, value, step: (
      shares.append(value) if name == "train/data_wait_share" else None
    )
    pending = None
    for step in range(1, 9):
      numbers._seconds = 0.2 if step == 4 else 0.0
      summary, _, _ = feed.take()
      feed.refill()
      if pending:  # a step late, as in training
        monitor.record(*pending)
      metrics = dict(step=step, loss=1.0, accuracy=0.5, lr=1e-3, bad_steps=0)
      pending = ({name: np.asarray(value) for name, value in metrics.items()}, summary)
    monitor.record(*pending)
  assert len(shares) == 8 and all(0 <= share <= 1 for share in shares)
  assert max(shares[1:]) == shares[4]  # of step 5, whose batch was taken after the wait


def test_a_pause_is_part_of_no_interval(open_feed):
  feed, _ = open_feed(_Numbers())
  feed.take()
  with feed.paused():
    time.sleep(0.1)
  assert feed.take()[0].interval_s < 0.1


def test_skipped_utterances_are_listed_in_the_same_order_whichever_process_reads_them(tmp_path):
  skipped = [
    SkippedUtterance(cause, key, shard)
    for shard in ("b.tar", "a.tar") for key in "zx" for cause in ("too long", "no audio")
  ]  # fmt: skip
  texts = set()
  for number, order in enumerate((skipped, skipped[::-1], skipped[3:] + skipped[:3])):
    (tmp_path / str(number)).mkdir()
    log = SkippedLog(tmp_path / str(number), first=0)
    log.add(1, order)
    texts.add(log.path.read_text())
  [text] = texts
  assert text.count("\n") == len(skipped)
