"""Steps of a demo: a finished step runs again only if its inputs have changed."""

import ast
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def fingerprint(value: Any, files: Iterable[Path] = ()) -> str:
  """Return a hash of a JSON value and of the contents of files."""
  digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
  for path in sorted(files):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def imported_sources(program: str | Path, root: Path = ROOT) -> set[Path]:
  """Return a program and all files below `root` that it imports, directly or not."""
  found: set[Path] = set()
  waiting = [root / program]
  while waiting:
    path = waiting.pop()
    if path in found or not path.is_file():
      continue
    found.add(path)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
      if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and node.module:
        modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
      else:
        continue
      for module in modules:
        parts = module.split(".")
        waiting.append(root.joinpath(*parts).with_suffix(".py"))
        waiting += [root.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
  return found


class Terminated(KeyboardInterrupt):
  """SIGTERM, which stops a step or command in the same way as Ctrl-C."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
  def stop(number, frame):
    raise Terminated

  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def call(*arguments: str | Path):
  """Print and run a command; on an interrupt, wait until it has ended, because it may be saving.

  Raises:
    subprocess.CalledProcessError: if it fails.
    Terminated: on SIGTERM, which is passed on to the command.
  """
  command = [str(argument) for argument in arguments]
  program = "python" if command[0] == sys.executable else Path(command[0]).name
  # As a user would type it in the clone.
  shown = [program, *(word.replace(f"{ROOT}{os.sep}", "") for word in command[1:])]
  print("\n$ " + " ".join(shown), flush=True)
  interrupted: KeyboardInterrupt | None = None
  with _terminable(), subprocess.Popen(command) as process:
    while process.poll() is None:
      try:
        process.wait()
      except KeyboardInterrupt as error:
        interrupted = error
        if isinstance(error, Terminated):  # the child receives Ctrl-C, but not SIGTERM
          process.terminate()
  if interrupted:
    raise interrupted
  if process.returncode:
    raise subprocess.CalledProcessError(process.returncode, shown[:2])


def schedule(steps: int, *, warmup: int) -> list[str]:
  """Return the config overrides of train.py for a number of optimizer steps."""
  return [
    f"--config.train.steps={steps}",
    f"--config.optimizer.total_steps={steps}",
    f"--config.optimizer.warmup_steps={warmup}",
  ]


@contextlib.contextmanager
def one_line_errors(name: str) -> Iterator[None]:
  """Run a demo in the clone; a failed step, a missing file or package exits with one line."""
  os.chdir(ROOT)
  try:
    yield
  except (subprocess.CalledProcessError, ImportError, OSError, RuntimeError) as error:
    sys.exit(f"{name}: {error}")
  except KeyboardInterrupt:
    print(f"{name}: interrupted; rerun the same command to resume", file=sys.stderr)
    sys.exit(130)


class Stages:
  """The steps of one run, recorded in `stages.json` of its folder.

  The fingerprint of a step includes that of its predecessor, so a change in an early step repeats
  all later steps.
  """

  def __init__(self, folder: Path):
    """Read the records of a run's folder, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    self._path = folder / "stages.json"
    self._records = json.loads(self._path.read_text("utf-8")) if self._path.exists() else {}
    self._last = ""
    self._chains = {"": ""}
    self.redone: list[str] = []

  def run(
    self,
    name: str,
    made_from: str,
    work: Callable[[], Any],
    *,
    makes: Path,
    resumable: bool = False,
    after: str | None = None,
  ) -> float:
    """Run a step, unless it has already finished with the same inputs.

    Args:
      name: name of the step.
      made_from: fingerprint of the step's own inputs.
      work: function that runs the step.
      makes: output folder of the step. Its outputs from other inputs are removed first.
      resumable: whether `work` resumes from the outputs of an interrupted run.
      after: name of the preceding step; default: the step that was run last.

    Returns:
      Seconds that the step took, in this run or in the run that finished it; for a resumable step,
      interrupted runs included.

    Raises:
      RuntimeError: if the output folder exists, but no step of this name is recorded.
      Terminated: on SIGTERM, after the time spent is recorded.
    """
    before = self._chains[self._last if after is None else after]
    self._last, self._chains[name] = name, fingerprint([before, made_from])
    record = self._records.get(name, {})
    same = record.get("made_from") == self._chains[name] and makes.exists()
    if same and record.get("done"):
      print(f"{name}: already done with the same inputs, in {record['seconds']:.0f} s", flush=True)
      return record["seconds"]
    spent = record.get("seconds", 0.0) if same and resumable else 0.0
    if not (same and resumable) and makes.exists():
      if not record:
        raise RuntimeError(
          f"{makes} is the output folder of {name}, but another program made it; move it away"
        )
      print(f"{name}: {makes} has other inputs or is incomplete; running again", flush=True)
      shutil.rmtree(makes)
    self._write(name, done=False, seconds=spent)
    start = time.perf_counter()
    try:
      with _terminable():
        work()
    except BaseException:
      self._write(name, done=False, seconds=spent + time.perf_counter() - start)
      raise
    seconds = spent + time.perf_counter() - start
    self._write(name, done=True, seconds=seconds)
    self.redone.append(name)
    print(f"{name}: {seconds:.0f} s", flush=True)
    return seconds

  def _write(self, name: str, **record):
    self._records[name] = {"made_from": self._chains[name], **record}
    self._path.write_text(json.dumps(self._records, indent=2) + "\n", encoding="utf-8")
