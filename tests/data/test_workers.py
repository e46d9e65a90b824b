"""Worker processes end with the process that started them."""

import multiprocessing
import os
import time

import pytest

from mooer_jax.data.dataset import train_batches
from mooer_jax.data.workers import run_in_processes


def _training(folder, config, model_side):
  batches = iter(train_batches(config, *model_side))
  next(batches)
  for child in multiprocessing.active_children():
    (folder / str(child.pid)).touch()
  time.sleep(600)


def _jobs(folder, config, model_side):
  next(run_in_processes(_job, [(folder,)] * 2, processes=2))


def _job(folder):
  (folder / str(os.getpid())).touch()
  time.sleep(600)


def _is_running(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def test_a_killed_worker_is_an_error_of_the_system():
  with pytest.raises(OSError, match=r"one of 2 worker processes was killed.*--processes"):
    [*run_in_processes(os._exit, [(1,)] * 3, processes=2)]


@pytest.mark.parametrize("work", [_training, _jobs])
def test_workers_end_when_their_parent_is_killed(shards, model_side, work, tmp_path):
  shards.add(8)
  (folder := tmp_path / "pids").mkdir()
  config = shards.config(workers=1)
  start = multiprocessing.get_context("spawn").Process
  parent = start(target=work, args=(folder, config, model_side))
  parent.start()
  deadline = time.monotonic() + 120
  while not (files := [*folder.iterdir()]):
    assert parent.is_alive() and time.monotonic() < deadline
    time.sleep(0.1)
  pids = [int(file.name) for file in files]
  parent.kill()
  while any(map(_is_running, pids)):
    assert time.monotonic() < deadline
    time.sleep(0.1)
