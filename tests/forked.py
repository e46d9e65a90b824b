"""Programs in processes that have the modules of training already: importing them takes seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["mooer_jax.programs.train", "mooer_jax.programs.eval"])


class Program:
  """`python *arguments` in a folder with an environment; it prints into two files of `out`.

  JAX has read its own environment variables before: those are the ones of the tests.
  """

  def __init__(
    self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], out: Path
  ) -> None:
    self.arguments = [*map(str, arguments)]
    self.streams = [out / name for name in ("program.stdout", "program.stderr")]
    self.process = _CONTEXT.Process(target=_work, args=(self.arguments, cwd, {**env}, self.streams))
    self.process.start()

  def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
    self.process.join(timeout)
    status = self.process.exitcode
    if status is None:
      self.process.kill()
      raise TimeoutError(f"{self.arguments} did not end within {timeout} s")
    texts = [path.read_text("utf-8") for path in self.streams]
    return subprocess.CompletedProcess(self.arguments, status, *texts)


def run(
  arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], out: Path
) -> subprocess.CompletedProcess:
  """A `Program`, run to its end."""
  return Program(arguments, cwd=cwd, env=env, out=out).wait()


def _work(arguments: list[str], cwd: Path, env: dict[str, str], streams: list[Path]) -> None:
  for stream, path in zip((sys.stdout, sys.stderr), streams, strict=True):
    with path.open("wb") as file:
      os.dup2(file.fileno(), stream.fileno())
  os.chdir(cwd)
  os.environ.clear()
  os.environ.update(env)
  sys.argv = arguments
  runpy.run_path(arguments[0], run_name="__main__")
