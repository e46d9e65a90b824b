"""The folder of a run: checkpoints of saved steps, and deletion of old ones."""

import hashlib
import re
import shutil
import warnings
from pathlib import Path

import jax

KEPT_BY = "kept_by"  # folder in a checkpoint, with a file for each run that is based on it
STEP = re.compile(r"step_\d{8,}")


def step_folder(workdir: str | Path, step: int) -> Path:
  """Folder of the checkpoint of a step."""
  return Path(workdir) / f"step_{step:08d}"


def step_of(folder: Path) -> int:
  """The step of a checkpoint in the folder of a run."""
  return int(folder.name.removeprefix("step_"))


def latest(workdir: str | Path) -> Path | None:
  """The checkpoint of the highest step in the folder of a run, or None."""
  return max(all_steps(workdir), default=None, key=step_of)


def all_steps(workdir: str | Path) -> list[Path]:
  """All checkpoints in the folder of a run, oldest first."""
  try:
    folders = list(Path(workdir).iterdir())  # glob would hide a PermissionError
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted((f for f in folders if STEP.fullmatch(f.name) and is_checkpoint(f)), key=step_of)


def enclosing(path: str | Path) -> Path | None:
  """The checkpoint that a path is, or is in; None if there is none."""
  path = Path(path).resolve()
  folders = (folder for folder in (path, *path.parents) if (folder / "checkpoint.json").is_file())
  return next(folders, None)


def keep_for(base: Path, dependent: Path) -> None:
  """Mark a checkpoint as the base of another, so that `keep_last` does not delete it.

  The mark is a file in `kept_by/` of the base, for all steps of a dependent run. It remains if the
  dependent disappears, which may only have moved; remove `kept_by/` to allow deletion. If the base
  is read-only, there is no mark, and a warning if it is a step of a run. If the base was deleted
  meanwhile, FileNotFoundError is raised.
  """
  if jax.process_index() != 0:
    return
  dependent = dependent.absolute()
  if STEP.fullmatch(dependent.name):
    dependent = dependent.parent
  name = hashlib.sha256(str(dependent).encode()).hexdigest()[:16]
  mark = base / KEPT_BY / f"{name}.txt"
  try:
    if not mark.exists():
      mark.parent.mkdir(exist_ok=True)
      mark.write_text(f"{dependent}\n", encoding="utf-8")
  except FileNotFoundError:
    raise FileNotFoundError(f"{base}, the base of {dependent}, was deleted meanwhile") from None
  except OSError as error:
    if STEP.fullmatch(base.name):
      warnings.warn(
        f"{base} cannot be marked as the base of {dependent} ({error.strerror}); its run may delete"
        " it: copy it elsewhere",
        stacklevel=2,
      )


def is_kept(folder: Path) -> bool:
  """Whether a checkpoint is marked as the base of another."""
  return any((folder / KEPT_BY).glob("*.txt"))


def keep_last(workdir: str | Path, count: int) -> None:
  """Delete all but the newest `count` checkpoints of a run, and remains of interrupted saves.

  Checkpoints that are the base of a fine-tune (`keep_for`) are not deleted.
  """
  if count < 1:
    raise ValueError(f"count={count}: at least one checkpoint must be kept")
  if jax.process_index() != 0:
    return
  workdir = Path(workdir)
  for left_over in workdir.glob(".tmp-step_*"):
    shutil.rmtree(left_over)
  for replaced in workdir.glob(".old-step_*"):
    whole = replaced.with_name(replaced.name.removeprefix(".old-"))
    if whole.exists():
      shutil.rmtree(replaced)
    else:  # killed between the two renames of an overwriting save
      replaced.rename(whole)
  for folder in all_steps(workdir)[:-count]:
    if not is_kept(folder):
      folder.rename(folder.with_name(f".del-{folder.name}"))
  # Renamed first: a concurrent mark is either in the folder now, or its writer does not find the
  # folder.
  for folder in workdir.glob(".del-step_*"):
    whole = folder.with_name(folder.name.removeprefix(".del-"))
    if not is_kept(folder):
      shutil.rmtree(folder)
    elif not whole.exists():
      folder.rename(whole)


def remedy(folder: Path) -> str:
  """Advice that ends a message about a damaged checkpoint."""
  advice = "restore the checkpoint from a copy, or convert or train it again"
  if STEP.fullmatch(folder.name) and not is_kept(folder):
    if earlier := [s for s in all_steps(folder.parent) if step_of(s) < step_of(folder)]:
      advice += f"; if you remove {folder.name}, training resumes from {earlier[-1].name}"
  return advice


def is_checkpoint(folder: Path) -> bool:
  """Whether a folder is a checkpoint, possibly with missing files, which opening it reports."""
  return any((folder / name).is_file() for name in ("config.json", "checkpoint.json"))
