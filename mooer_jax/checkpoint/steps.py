"""A run's folder: one checkpoint per saved step, the oldest removed."""

import re
import shutil
from pathlib import Path

import jax

_STEP = re.compile(r"step_\d{8,}")


def step_folder(workdir: str | Path, step: int) -> Path:
  """Where a run keeps the checkpoint of a step."""
  return Path(workdir) / f"step_{step:08d}"


def latest(workdir: str | Path) -> Path | None:
  """The complete checkpoint of the highest step in a run's folder, or None."""
  return max(_steps(workdir), default=None, key=step_of)


def all_steps(workdir: str | Path) -> list[Path]:
  """All complete checkpoints in a run's folder, the oldest first."""
  return sorted(_steps(workdir), key=step_of)


def find(path: str | Path) -> Path:
  """The checkpoint that a user means: the folder itself, or the newest one of a run's folder.

  Raises:
    FileNotFoundError: if the path does not exist, or is neither, naming what is missing.
  """
  folder = Path(path)
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: no such checkpoint folder")
  if (folder / "config.json").is_file():
    return folder
  newest = latest(folder)
  if newest is None:
    raise FileNotFoundError(
      f"{folder}: neither a checkpoint (no config.json) nor a run's folder (no step_*)"
    )
  return newest


def keep_last(workdir: str | Path, count: int) -> list[Path]:
  """Removes all but the newest `count` checkpoints of a run, and what killed saves left behind."""
  if count < 1:
    raise ValueError(f"count={count}: at least one checkpoint must be kept")
  if jax.process_index() != 0:
    return []
  for left_over in Path(workdir).glob(".tmp-step_*"):
    shutil.rmtree(left_over)
  for replaced in Path(workdir).glob(".old-step_*"):
    whole = replaced.with_name(replaced.name.removeprefix(".old-"))
    if whole.exists():
      shutil.rmtree(replaced)
    else:  # killed between the two renames of an overwriting save
      replaced.rename(whole)
  old = sorted(_steps(workdir), key=step_of)[:-count]
  for folder in old:
    shutil.rmtree(folder)
  return old


def _steps(workdir) -> list[Path]:
  workdir = Path(workdir)
  if not workdir.is_dir():
    return []
  return [f for f in workdir.iterdir() if _STEP.fullmatch(f.name) and (f / "config.json").is_file()]


def step_of(folder: Path) -> int:
  """The step of a checkpoint in a run's folder."""
  return int(folder.name.removeprefix("step_"))
