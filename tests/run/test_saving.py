"""Checkpoints that are saved, and copied to a mirror, while training goes on."""

import concurrent.futures
import contextlib
import errno
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from mooer_jax import checkpoint, hosts, storage
from mooer_jax.checkpoint import SaveError, writing
from mooer_jax.run import monitor
from mooer_jax.run import train as training
from mooer_jax.run.config import Run
from tests.run.programs import train
from tests.run.runs import content, rows


def test_steps_run_while_a_checkpoint_is_written_and_leave_it_as_it_was(config, monkeypatch):
  """No array is written before step 6, when the buffers of step 4 have been donated twice."""
  four = train(config).with_name("step_00000004")
  go, opened, record = threading.Event(), tensorstore.open, monitor.Monitor.record

  def open_later(*args, **options):
    if threading.current_thread() is not threading.main_thread():
      assert go.wait(60)
    return opened(*args, **options)

  def record_and_go(self, metrics, batch):
    record(self, metrics, batch)
    if metrics["step"] == 6:
      assert checkpoint.latest(config.workdir) is None
      go.set()

  monkeypatch.setattr(tensorstore, "open", open_later)
  monkeypatch.setattr(monitor.Monitor, "record", record_and_go)
  plain, config.workdir = config.workdir, config.workdir + "x"
  slow = train(config).with_name("step_00000004")
  assert go.is_set() and rows(plain) == rows(config.workdir)
  (ours, position), (theirs, expected) = content(slow), content(four)
  assert ours.keys() == theirs.keys() and position == expected
  for path, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def full_disk(*_, **__):
  raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_fails_ends_the_run_which_saves_its_last_state(config, monkeypatch):
  """It ends as soon as the save of step 4 has failed, before that of step 8."""
  config.train.steps = 1000
  hashed, record, stop = writing.record, monitor.Monitor.record, threading.Event()

  def fail_once(folder):
    return hashed(folder) if "00000004" not in folder.name else full_disk()

  def record_late(self, metrics, batch):
    record(self, metrics, batch)
    assert metrics["step"] < 5 or stop.wait(60)

  monkeypatch.setattr(writing, "record", fail_once)
  monkeypatch.setattr(monitor.Monitor, "record", record_late)
  monkeypatch.setattr(training, "stop_request", lambda: contextlib.nullcontext(stop))
  with pytest.raises(SaveError, match="step_00000004: the checkpoint was not saved .*No space"):
    train(config)
  newest = checkpoint.latest(config.workdir)
  assert 4 < checkpoint.step_of(newest) == len(rows(config.workdir)) < 8
  assert not list(Path(config.workdir).glob(".tmp-*"))
  stop.clear()
  monkeypatch.setattr(monitor.Monitor, "record", record)
  config.train.steps, config.train.max_to_keep = checkpoint.step_of(newest) + 1, 1
  last = train(config)
  assert checkpoint.all_steps(config.workdir) == [last]
  assert [row["step"] for row in rows(config.workdir)] == [*range(1, config.train.steps + 1)]


def test_the_last_save_of_a_run_may_fail_too(config, monkeypatch):
  config.train.steps = 4
  monkeypatch.setattr(writing, "record", full_disk)
  with pytest.raises(SaveError, match="step_00000004: the checkpoint was not saved .*No space"):
    train(config)
  assert checkpoint.latest(config.workdir) is None


def test_if_the_last_save_fails_after_another_one_the_first_error_is_raised(
  config, monkeypatch, capsys
):
  config.train.steps = 1000
  monkeypatch.setattr(writing, "record", full_disk)
  with pytest.raises(SaveError, match="step_00000004: the checkpoint was not saved"):
    train(config)
  said = "besides the error that ends the run: .*step_0000000[5-8]: the checkpoint was not saved"
  assert re.search(said, capsys.readouterr().err)


def test_the_error_of_a_save_is_printed_if_another_one_ends_the_run(config, monkeypatch, capsys):
  class Broken:
    every = 4

    def lacks(self, step):
      return False

    def __call__(self, step, params):
      raise ZeroDivisionError

  monkeypatch.setattr(writing, "record", full_disk)
  with pytest.raises(ZeroDivisionError):
    training.train(Run.read(config), [lambda *_, **__: Broken()])
  assert "besides the error that ends the run: " in (said := capsys.readouterr().err)
  assert "step_00000004: the checkpoint was not saved" in said


def test_a_copy_that_fails_ends_the_run_and_is_made_when_it_resumes(config, monkeypatch, tmp_path):
  config.train.steps, config.train.mirror = 1000, f"file://{tmp_path}/mirror"
  upload = storage.upload

  def fail(file, url):
    if "step_" in url:
      raise storage.RemoteError(f"{url}: no connection")
    upload(file, url)

  monkeypatch.setattr(storage, "upload", fail)
  with pytest.raises(storage.RemoteError, match="step_00000004/.*no connection"):
    train(config)
  newest = checkpoint.latest(config.workdir)
  assert checkpoint.step_of(newest) == len(rows(config.workdir)) < 1000
  monkeypatch.setattr(storage, "upload", upload)
  config.train.steps = checkpoint.step_of(newest)
  train(config)
  assert storage.is_file(f"{config.train.mirror}/{newest.name}/checkpoint.json")
  config.train.steps += 1
  last = train(config)
  assert storage.is_file(f"{config.train.mirror}/{last.name}/checkpoint.json")


def test_a_mirror_that_cannot_be_written_is_an_error_before_training(config, monkeypatch, bucket):
  config.train.mirror = "s3://absent/run"
  monkeypatch.setattr("mooer_jax.run.train.read_tokenizer", lambda *_: pytest.fail("loaded"))
  with pytest.raises(storage.RemoteError, match="train.mirror cannot be written: s3://absent/run"):
    train(config)


@pytest.mark.parametrize("url", ["s3://", "file:///", "file://runs/one"])
def test_a_mirror_is_no_folder_of_the_current_one(url, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(storage.RemoteError, match=f"train.mirror cannot be written: {url}"):
    checkpoint.check_writing(url)
  with pytest.raises(ValueError, match=url):
    checkpoint.find(url)
  assert not list(tmp_path.iterdir())


def test_waiting_ends_when_another_process_has_failed(monkeypatch):
  monkeypatch.setattr(hosts, "gather", lambda value: [value, [True, "SaveError: disk full"]])
  with pytest.raises(hosts.OtherProcessError, match="process 1 failed: SaveError: disk full"):
    hosts.wait_for(concurrent.futures.Future())


def test_a_save_that_waits_for_a_process_that_failed_does_not_delay_the_end(config, monkeypatch):
  """tests/run/test_processes.py has the same with two processes."""
  hashed, failed, ended = writing.record, threading.Event(), []

  def wait_for_the_other(folder):
    if "00000004" in folder.name:
      failed.wait(20)
      ended.append(folder)
    return hashed(folder)

  def gather(value):
    told = [True, None] if failed.is_set() or value[0] else [True, "SaveError: disk full"]
    return [value, told]

  monkeypatch.setattr(writing, "record", wait_for_the_other)
  monkeypatch.setattr(hosts, "gather", gather)
  with pytest.raises(hosts.OtherProcessError, match="process 1 failed: SaveError: disk full"):
    train(config)
  assert not ended and checkpoint.step_of(checkpoint.latest(config.workdir)) == 8
  failed.set()
