"""Steps of a demo: a finished step runs again only if its inputs have changed."""

import contextlib
import hashlib
import importlib.util
import json
import modulefinder
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mooer_jax.files import exit_on_sigterm

ROOT = Path(__file__).resolve().parents[1]


def fingerprint(value: Any, files: Iterable[Path] = ()) -> str:
  """Return a hash of a JSON value and of the contents of files."""
  digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
  for path in sorted(files):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def imported_sources(program: str | Path, root: Path = ROOT) -> set[Path]:
  """Return a program and all files below `root` that it imports, directly or not."""
  finder = modulefinder.ModuleFinder([str(root)])
  finder.run_script(str(root / program))
  files = (getattr(module, "__file__", None) for module in finder.modules.values())
  return {Path(file) for file in files if file}


def call(*arguments: str | Path):
  """Print and run a command; after Ctrl-C or SIGTERM, wait until it has saved and ended.

  Raises:
    subprocess.CalledProcessError: if it fails.
  """
  command = [str(argument) for argument in arguments]
  program = "python" if command[0] == sys.executable else Path(command[0]).name
  # As a user would type it in the clone.
  shown = [program, *(word.replace(f"{ROOT}{os.sep}", "") for word in command[1:])]
  print("\n$ " + " ".join(shown), flush=True)
  process: subprocess.Popen | None = None
  interrupted: BaseException | None = None

  def forward(number, frame):
    nonlocal interrupted
    interrupted = SystemExit(128 + number)
    if process:
      process.terminate()

  # The child receives Ctrl-C, but not SIGTERM; a second one makes training stop at once.
  before = signal.signal(signal.SIGTERM, forward)
  try:
    with subprocess.Popen(command) as process:
      if interrupted:
        process.terminate()
      while process.poll() is None:
        try:
          process.wait()
        except KeyboardInterrupt as error:
          interrupted = error
  finally:
    signal.signal(signal.SIGTERM, before)
  if interrupted:
    raise interrupted
  if process.returncode:
    raise subprocess.CalledProcessError(process.returncode, shown[:2])


def packaged(package: str, name: str) -> Path:
  """Return a file or folder in an installed package, such as weights."""
  found = importlib.util.find_spec(package)
  if found is None or not found.submodule_search_locations:
    raise ModuleNotFoundError(
      f"the package {package} is not installed; `make`, as in the README, installs it"
    )
  return Path(found.submodule_search_locations[0]) / name


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
  except (KeyboardInterrupt, SystemExit) as error:
    print(f"{name}: interrupted; rerun the same command to resume", file=sys.stderr)
    sys.exit(getattr(error, "code", 130))


class Stages:
  """The steps of one run, recorded in `stages.json` of its folder.

  The fingerprint of a step includes that of its predecessor, so a change in an early step repeats
  all later steps.

  Attributes:
    seconds: time of each step, in this run or in the run that finished it; for a resumable step,
      interrupted runs included.
    redone: names of the steps that were not already finished.
  """

  def __init__(self, folder: Path):
    """Read the records of a run's folder, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    self._path = folder / "stages.json"
    self._records = json.loads(self._path.read_text("utf-8")) if self._path.exists() else {}
    self._last = ""
    self._chains = {"": ""}
    self.seconds: dict[str, float] = {}
    self.redone: list[str] = []

  def run(
    self,
    name: str,
    work: Callable[[], Any],
    *,
    makes: Path,
    inputs: Any = None,
    files: Iterable[Path] = (),
    resumable: bool = False,
    after: str | None = None,
  ) -> None:
    """Run a step, unless it has already finished with the same inputs.

    Args:
      name, work: the step.
      makes: output folder of the step. Its outputs from other inputs are removed first.
      inputs, files: JSON value and files that the step depends on.
      resumable: whether `work` resumes from the outputs of an interrupted run.
      after: name of the preceding step; default: the step that was run last.

    Raises:
      RuntimeError: if the output folder exists, but no step of this name is recorded.
    """
    before = self._chains[self._last if after is None else after]
    self._last, self._chains[name] = name, fingerprint([before, inputs], files)
    record = self._records.get(name, {})
    same = record.get("made_from") == self._chains[name] and makes.exists()
    if same and record.get("done"):
      self.seconds[name] = record["seconds"]
      print(f"{name}: already done with the same inputs, in {record['seconds']:.0f} s", flush=True)
      return
    spent = record.get("seconds", 0.0) if same and resumable else 0.0
    if not (same and resumable) and makes.exists():
      if not record:
        raise RuntimeError(
          f"{makes} is the output folder of {name}, but another program made it; move it away"
        )
      print(f"{name}: {makes} has other inputs or is incomplete; running again", flush=True)
      shutil.rmtree(makes)
    self._write(name, spent, done=False)
    start, done = time.perf_counter(), False
    try:
      with exit_on_sigterm():
        work()
      done = True
    finally:
      self._write(name, spent + time.perf_counter() - start, done=done)
    self.redone.append(name)
    print(f"{name}: {self.seconds[name]:.0f} s", flush=True)

  def _write(self, name: str, seconds: float, *, done: bool):
    self.seconds[name] = seconds
    self._records[name] = {"made_from": self._chains[name], "done": done, "seconds": seconds}
    self._path.write_text(json.dumps(self._records, indent=2) + "\n", encoding="utf-8")
