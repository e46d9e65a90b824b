"""Saving either happens or does not."""

import errno
import logging
import resource
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest

from mooer_jax import checkpoint
from mooer_jax.checkpoint import SaveError, arrays
from tests.checkpoint.checkpoints_of import assert_same, params, save

RNG = np.random.default_rng(0)


def test_an_existing_folder_is_only_replaced_on_demand(tmp_path):
  folder = save(tmp_path / "c", params())
  with pytest.raises(FileExistsError, match="overwrite=True"):
    save(folder, params(1))
  assert_same(checkpoint.load(folder).params, params())
  save(folder, params(1), overwrite=True)
  assert_same(checkpoint.load(folder).params, params(1))
  assert [p.name for p in tmp_path.iterdir()] == ["c"]


def full_disk(*_, **__):
  raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
  "where", ["arrays.start_write", "files.write_json", "put_in_place", "tokenizer"]
)
def test_a_failure_while_saving_spares_what_was_there(tmp_path, monkeypatch, where):
  folder = save(tmp_path / "c", params())
  options = {}
  if where == "tokenizer":
    options["tokenizer"] = full_disk
  else:
    monkeypatch.setattr(f"mooer_jax.checkpoint.writing.{where}", full_disk)
  for name in ("c", "new"):
    with pytest.raises(SaveError, match=rf"{name}: the checkpoint was not saved .*No space left"):
      save(tmp_path / name, params(1), overwrite=True, **options)
  assert [p.name for p in tmp_path.iterdir()] == ["c"]
  assert_same(checkpoint.load(folder).params, params())


def test_a_rename_that_fails_brings_the_old_one_back(tmp_path, monkeypatch):
  folder = save(tmp_path / "c", params())
  rename = Path.rename
  monkeypatch.setattr(
    Path, "rename", lambda p, to: full_disk() if p.name == ".tmp-c" else rename(p, to)
  )
  with pytest.raises(SaveError):
    save(folder, params(1), overwrite=True)
  assert [p.name for p in tmp_path.iterdir()] == ["c"]
  assert_same(checkpoint.load(folder).params, params())


def test_a_checkpoint_without_a_tokenizer_is_not_saved(tmp_path):
  """It could not be opened."""
  with pytest.raises(SaveError):
    save(tmp_path / "c", params(), tokenizer=None)
  assert not list(tmp_path.iterdir())


def test_what_a_save_hides_is_shown_again_after_it(tmp_path, monkeypatch):
  """After a failure it stays hidden, since threads may outlive it, but each filter only once."""
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  states = []

  def changed():
    states.append((sys.unraisablehook, [list(logger.filters) for logger in loggers]))
    return states[-1] != states[0]

  def interrupt(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(arrays, "_save_failed", False)  # as before any other test
  for logger in loggers:
    monkeypatch.setattr(logger, "filters", [])
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
  changed()
  save(tmp_path / "c", params())
  assert not changed()
  monkeypatch.setattr("orbax.checkpoint.AsyncCheckpointer.save", interrupt)
  with pytest.raises(KeyboardInterrupt):
    save(tmp_path / "d", params())
  assert not changed()
  monkeypatch.setattr("orbax.checkpoint.AsyncCheckpointer.save", full_disk)
  for _ in range(2):
    with pytest.raises(SaveError), warnings.catch_warnings():
      save(tmp_path / "d", params())
    assert changed()
  assert states[-1] == states[-2]


def test_only_tracebacks_of_orbax_are_hidden():
  def record(name, pathname):
    try:
      raise OSError("weights.orbax-checkpoint-tmp: No space left on device")
    except OSError:
      return logging.LogRecord(name, logging.ERROR, pathname, 1, "failed", (), sys.exc_info())

  assert arrays._is_not_of_orbax(record("absl", "/home/user/train.py"))
  assert arrays._is_not_of_orbax(record("asyncio", "/python/asyncio/base_events.py"))
  assert not arrays._is_not_of_orbax(record("absl", "/site-packages/orbax/checkpoint/future.py"))


def test_files_that_the_system_refuses_to_write(tmp_path):
  # A limit on file sizes stops the array writer itself (C++), as a full disk would.
  folder = save(tmp_path / "c", params())
  big = {"w": RNG.normal(size=(512, 512)).astype(np.float32)}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
  try:
    with pytest.raises(SaveError):
      save(folder, big, overwrite=True)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert [p.name for p in tmp_path.iterdir()] == ["c"]
  assert_same(checkpoint.load(folder).params, params())


def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(tmp_path, plain_env):
  save(checkpoint.step_folder(tmp_path, 1), params())
  program = textwrap.dedent("""
    import os, signal, sys
    import numpy as np
    from mooer_jax import checkpoint

    checkpoint.save(
      checkpoint.step_folder(sys.argv[1], 2), params={"w": np.zeros(3)}, config_json={},
      tokenizer=lambda _: os.kill(os.getpid(), signal.SIGKILL), generation={},
    )
  """)
  killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=plain_env)
  assert killed.returncode == -signal.SIGKILL
  assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-step_00000002", "step_00000001"]
  newest = checkpoint.latest(tmp_path)
  assert newest == checkpoint.step_folder(tmp_path, 1)
  assert_same(checkpoint.load(newest).params, params())
  save(checkpoint.step_folder(tmp_path, 2), params(2))  # the same step again, over the remains
  assert_same(checkpoint.load(checkpoint.latest(tmp_path)).params, params(2))


@pytest.mark.parametrize("kind", ["arrays", "lazy"])
def test_a_full_disk_is_one_error_without_the_tracebacks_of_threads(tmp_path, plain_env, kind):
  """Many leaves, so that further writes fail and end after the first one has failed."""
  program = textwrap.dedent("""
    import resource, sys
    import jax.numpy as jnp
    from mooer_jax import checkpoint
    from mooer_jax.checkpoint.leaves import as_lazy

    leaf = jnp.arange(90_000.0).reshape(300, 300)
    leaf = as_lazy(leaf) if sys.argv[2] == "lazy" else leaf
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
      checkpoint.save(
        sys.argv[1], params={f"w{n}": leaf for n in range(40)}, config_json={},
        tokenizer=lambda _: None, generation={},
      )
    except OSError as error:
      sys.exit(str(error))
  """)
  command = [sys.executable, "-c", program, str(tmp_path / "model"), kind]
  run = subprocess.run(command, env=plain_env, capture_output=True, text=True)
  (line,) = (said for said in run.stderr.splitlines() if "TypeHandlerRegistry" not in said)
  assert line.startswith(f"{tmp_path}/model: the checkpoint was not saved")
  assert "tensorstore_spec" not in line
  assert run.returncode == 1 and list(tmp_path.iterdir()) == []


def test_a_failed_save_hides_the_errors_of_its_own_writes_only(tmp_path, plain_env):
  """A write of TensorStore whose future is freed later; the disk above seldom shows one."""
  program = textwrap.dedent("""
    import asyncio, gc, resource, sys
    import jax.numpy as jnp
    from mooer_jax import checkpoint

    def forget(text):
      loop = asyncio.new_event_loop()
      loop.create_future().set_exception(ValueError(text))
      gc.collect()
      loop.close()

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
      checkpoint.save(
        sys.argv[1], params={"w": jnp.arange(9000.0)}, config_json={},
        tokenizer=lambda _: None, generation={},
      )
    except OSError:
      forget("cannot write m/weights.orbax-checkpoint-tmp/w: disk full")
      forget("an error of the caller's")
  """)
  command = [sys.executable, "-c", program, str(tmp_path / "model")]
  run = subprocess.run(command, env=plain_env, capture_output=True, text=True, check=True)
  assert "never retrieved" in run.stderr and "an error of the caller's" in run.stderr
  assert "disk full" not in run.stderr
