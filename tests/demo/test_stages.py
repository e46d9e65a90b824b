"""A step that SIGTERM ends has its time written down, and its command ends in its own way."""

import json
import signal
import subprocess
import sys
import time

import pytest

from demo.stages import Stages, call, imported_sources, one_line_errors

# The command says that it is there, then ends as train.py does: it saves first.
COMMAND = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
  time.sleep(0.5)
  (folder / "saved").touch()
  sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / "ready").touch()
time.sleep(60)
"""
RUN = """
import pathlib, sys, time
from demo.stages import Stages, call
folder, command = pathlib.Path(sys.argv[1]), sys.argv[2:]
def work():
  (folder / "made").mkdir(exist_ok=True)
  if command:
    return call(*command)
  (folder / "ready").touch()
  time.sleep(60)
Stages(folder).run("step", work, makes=folder / "made", resumable=True)
"""


@pytest.mark.parametrize("command", [[], [sys.executable, "-c", COMMAND]], ids=["work", "command"])
def test_sigterm_counts_the_time_and_lets_the_command_save(tmp_path, plain_env, command):
  spent = 0.0
  for _ in range(2):  # the second run goes on from the first
    (tmp_path / "ready").unlink(missing_ok=True)
    (tmp_path / "saved").unlink(missing_ok=True)
    arguments = [str(tmp_path), *command, *([str(tmp_path)] if command else [])]
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], env=plain_env)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "saved").exists() == bool(command)
    record = json.loads((tmp_path / "stages.json").read_text("utf-8"))["step"]
    assert not record["done"] and record["seconds"] > spent + 0.3
    spent = record["seconds"]


def test_after_a_step_sigterm_does_what_it_did_before(tmp_path):
  before = signal.getsignal(signal.SIGTERM)

  def killed():
    signal.raise_signal(signal.SIGTERM)

  stages = Stages(tmp_path)
  with pytest.raises(SystemExit):
    stages.run("step", killed, makes=tmp_path / "made")
  assert signal.getsignal(signal.SIGTERM) == before
  stages.run("step", lambda: None, makes=tmp_path / "made")
  assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_reaches_a_command_outside_of_any_step(tmp_path, plain_env):
  run = "import sys\nfrom demo.stages import call\ncall(*sys.argv[1:])"
  command = [sys.executable, "-c", run, sys.executable, "-c", COMMAND, str(tmp_path)]
  process = subprocess.Popen(command, env=plain_env, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 60
  while not (tmp_path / "ready").exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  process.wait(timeout=30)
  assert (tmp_path / "saved").exists()


def test_every_sigterm_reaches_a_command(tmp_path, plain_env):
  """train.py saves after the first, and ends at once after the second."""
  count = (
    "import pathlib, signal, sys, time\n"
    "folder, got = pathlib.Path(sys.argv[1]), []\n"
    "def handle(number, frame):\n"
    "  got.append(number)\n"
    "  (folder / str(len(got))).touch()\n"
    "signal.signal(signal.SIGTERM, handle)\n"
    "(folder / '0').touch()\n"
    "while len(got) < 2: time.sleep(0.02)\n"
  )
  arguments = [str(tmp_path), sys.executable, "-c", count, str(tmp_path)]
  process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], env=plain_env)
  deadline = time.monotonic() + 60
  for number in range(3):
    while not (tmp_path / str(number)).exists():
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.02)
    if number < 2:
      process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 143


def test_a_command_that_fails_says_so():
  call(sys.executable, "-c", "")
  with pytest.raises(subprocess.CalledProcessError) as caught:
    call(sys.executable, "-c", "raise SystemExit(3)")
  assert caught.value.returncode == 3


@pytest.mark.parametrize(
  "error, message",
  [
    (subprocess.CalledProcessError(3, ["python", "train.py"]), "exit status 3"),
    (FileNotFoundError(2, "No such file", "clip.wav"), "clip.wav"),
  ],
)
def test_a_failed_step_is_one_line(error, message, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # and back, at the end of the test
  with pytest.raises(SystemExit, match=f"^make demo: .*{message}"), one_line_errors("make demo"):
    raise error


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_an_interruption_says_how_to_resume(error, code, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as ended, one_line_errors("make demo"):
    raise error
  assert ended.value.code == code and "rerun the same command" in capsys.readouterr().err


def test_a_change_redoes_what_goes_on_from_it_and_no_other_branch(tmp_path):
  def run(left_from):
    stages = Stages(tmp_path)
    steps = [("base", "1", ""), ("left", left_from, "base"), ("leaf", "3", "left")]
    for name, made_from, after in [*steps, ("right", "4", "base")]:
      makes = tmp_path / name
      stages.run(name, makes.mkdir, makes=makes, inputs=made_from, after=after)
    return stages.redone

  assert run("2") == ["base", "left", "leaf", "right"]
  assert run("2") == []
  assert run("other") == ["left", "leaf"]


def test_what_is_made_again_is_said_and_what_others_made_is_left_alone(tmp_path, capsys):
  made = tmp_path / "made"
  for made_from in ("1", "2"):
    Stages(tmp_path).run("step", made.mkdir, makes=made, inputs=made_from)
  assert f"{made} has other inputs or is incomplete" in capsys.readouterr().out
  (tmp_path / "stages.json").unlink()
  with pytest.raises(RuntimeError, match="made is the output folder of step, .* move it away"):
    Stages(tmp_path).run("step", made.mkdir, makes=made, inputs="2")
  assert made.exists()


def test_the_sources_of_a_program_are_those_that_it_imports(tmp_path):
  (tmp_path / "package").mkdir()
  (tmp_path / "package" / "__init__.py").write_text("")
  (tmp_path / "package" / "used.py").write_text("def f():\n  import package.deep\n")
  (tmp_path / "package" / "deep.py").write_text("import json\n")
  (tmp_path / "package" / "unused.py").write_text("")
  (tmp_path / "program.py").write_text("from package import used\n")
  found = imported_sources(tmp_path / "program.py", tmp_path)
  assert {path.name for path in found} == {"program.py", "__init__.py", "used.py", "deep.py"}
