"""Files are replaced whole or not at all, and a folder has one writer."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap

import pytest

from mooer_jax import files


def test_a_file_cannot_be_locked_as_a_folder(tmp_path):
  (tmp_path / "file").touch()
  with (
    pytest.raises(ValueError, match="file: is not a folder"),
    files.lock_folder(tmp_path / "file"),
  ):
    pass


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
  path = tmp_path / "new" / "a.json"
  for content in ("first", "second"):
    with files.replace_file(path) as beside:
      beside.write_text(content)
      assert not path.exists() or path.read_text() == "first"
    assert path.read_text() == content
  assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
  path = tmp_path / "a.txt"
  path.write_text("old")
  with pytest.raises(type(error)), files.replace_file(path) as beside:
    beside.write_text("half of")
    raise error
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_or_of_like_names_do_not_meet(tmp_path):
  """`a.json` and `a.txt` once shared `a.tmp`."""
  with (
    files.replace_file(tmp_path / "a.json") as one,
    files.replace_file(tmp_path / "a.json") as again,
    files.replace_file(tmp_path / "a.txt") as other,
  ):
    assert len({one, again, other}) == 3
    for path in (one, again, other):
      path.write_text("x")


def test_the_mode_follows_the_umask(tmp_path):
  before = os.umask(0o027)
  try:
    with files.replace_file(tmp_path / "a") as beside:
      beside.write_text("x")
  finally:
    os.umask(before)
  assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_json_holds_the_name_of_a_file_that_is_not_utf_8(tmp_path):
  value = {"path": os.fsdecode(b"clip-\xff.wav"), "text": "转写"}
  files.write_json(tmp_path / "a.json", value)
  assert json.loads((tmp_path / "a.json").read_text("utf-8")) == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_json_object_is_read(tmp_path, encoding):
  path = tmp_path / "a.json"
  path.write_text(json.dumps({"text": "转写"}, ensure_ascii=False), encoding=encoding)
  assert files.read_json_object(path) == {"text": "转写"}


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "not JSON"),
    (b'{"a": ', "not JSON"),
    (b"\xff\xfe{\0}\0", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "must hold a JSON object, got list"),
    (files.LFS_POINTER + b"v1\noid sha256:00\nsize 1\n", "run git lfs pull"),
  ],
)
def test_what_is_not_a_json_object_is_one_line_with_the_path(tmp_path, content, message):
  path = tmp_path / "a.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    files.read_json_object(path)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_in_place_of_a_json_file(tmp_path):
  with pytest.raises(ValueError, match="is a folder; must be a JSON file"):
    files.read_json_object(tmp_path)
  os.mkfifo(tmp_path / "pipe.json")
  with pytest.raises(ValueError, match="is a pipe or device; must be a JSON file"):
    files.read_json_object(tmp_path / "pipe.json")


HOLD = textwrap.dedent("""
  import sys, time
  from mooer_jax.files import lock_folder

  with lock_folder(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
""")


def hold(folder, seconds, env):
  """A process that holds the lock of a folder."""
  command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
  process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "locked\n"
  return process


def test_a_folder_that_another_process_writes_to_is_refused_by_name(tmp_path, plain_env):
  with hold(tmp_path / "run", 600, plain_env) as process:
    try:
      with pytest.raises(
        ValueError, match=rf"run is in use by process {process.pid} on .* since 20"
      ):
        with files.lock_folder(tmp_path / "run"):
          pytest.fail("entered a locked folder")
    finally:
      process.kill()


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path, plain_env, capsys):
  with hold(tmp_path, 600, plain_env) as process:
    process.send_signal(signal.SIGKILL)
  with files.lock_folder(tmp_path):
    pass
  (line,) = capsys.readouterr().out.splitlines()
  assert f"process {process.pid}" in line and "taken over" in line
  with files.lock_folder(tmp_path):  # released properly: no message
    pass
  assert not capsys.readouterr().out


def test_a_lock_is_released_when_the_block_fails(tmp_path, capsys):
  with pytest.raises(ZeroDivisionError), files.lock_folder(tmp_path):
    raise ZeroDivisionError
  with files.lock_folder(tmp_path):
    assert not capsys.readouterr().out


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
  import fcntl

  def refuse(*_):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(fcntl, "flock", refuse)
  entered = False
  with files.lock_folder(tmp_path):
    entered = True
  assert entered and "cannot be locked" in capsys.readouterr().out


def test_an_error_of_writing_names_the_file(tmp_path):
  with pytest.raises(OSError, match="No space left on device: '.*a.json'"):
    with files.replace_file(tmp_path / "a.json") as beside:
      beside.touch()
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_of_the_temporary_file_names_the_one_it_replaces(tmp_path):
  with pytest.raises(PermissionError) as raised, files.replace_file(tmp_path / "a.json") as beside:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(beside))
  assert raised.value.filename == str(tmp_path / "a.json")


def test_sigterm_cleans_up_and_exits_with_status_143(tmp_path):
  program = """
    import sys, time
    from mooer_jax.files import exit_on_sigterm, replace_file
    with exit_on_sigterm(), replace_file(sys.argv[1]) as beside:
      beside.touch()
      print("ready", flush=True)
      time.sleep(60)
  """
  command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a.txt")]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "ready\n" and list(tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
  assert not list(tmp_path.iterdir())
