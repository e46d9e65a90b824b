"""The command line, interrupted."""

import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from convert import kinds
from convert import main as main_module
from convert.main import main

PROGRAM = """
  import itertools, runpy, sys, time
  import numpy as np
  from convert import kinds
  from mooer_jax import checkpoint
  from tests.convert import toy_kind

  calls, slow = itertools.count(1), int(sys.argv[1])

  def slowly(function):
    def call(*args):
      if next(calls) == slow:
        print("ready", flush=True)
        time.sleep(3)
      return function(*args)
    return call

  class Lazy(checkpoint.LazyArray):
    def __init__(self, shape, dtype, read):
      super().__init__(shape, dtype, slowly(read))

  toy_kind.LazyArray = Lazy
  toy_kind.read_leaves = slowly(toy_kind.read_leaves)
  kinds.KINDS["toy"] = "tests.convert.toy_kind:KIND"
  sys.argv = ["convert", *sys.argv[2:]]
  runpy.run_module("convert", run_name="__main__")
"""


@pytest.mark.parametrize("stage", ["checking", "writing", "exporting"])
def test_sigterm_leaves_no_partial_folder_and_exits_with_status_143(tmp_path, monkeypatch, stage):
  source, ours, out = (tmp_path / name for name in ("toy", "ours", "parent/out"))
  source.mkdir()
  np.save(source / "toy.npy", np.arange(5, dtype=np.float32))
  out.parent.mkdir()
  arguments = ["import", "toy", source, out]
  if stage == "exporting":
    monkeypatch.setitem(kinds.KINDS, "toy", "tests.convert.toy_kind:KIND")
    assert main(["import", "toy", str(source), str(ours)]) == 0
    arguments = ["export", "toy", ours, out]
  call = "2" if stage == "writing" else "1"  # an import reads every leaf twice
  command = [sys.executable, "-c", textwrap.dedent(PROGRAM), call, *map(str, arguments)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "ready\n" and (stage == "checking") != any(
      out.parent.iterdir()
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
  assert not any(out.parent.iterdir())


@pytest.mark.parametrize(
  "arguments, function, extras",
  [
    (["inspect", "a"], "_inspect", "[convert]"),
    (["import", "llama", "a", "b"], "_import", "[convert]"),
    (["verify", "llama", "a", "b"], "_verify", "[convert,verify]"),
  ],
)
def test_an_absent_package_is_named_with_the_extras_of_the_command(
  monkeypatch, capsys, arguments, function, extras
):
  def absent(args):
    raise ModuleNotFoundError("No module named 'torch'", name="torch")

  monkeypatch.setattr(main_module, function, absent)
  assert main(arguments) == 2
  assert f"'torch'; install it with: pip install 'mooer-jax{extras}'\n" in capsys.readouterr().err
