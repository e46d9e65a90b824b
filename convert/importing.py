"""`convert import KIND SRC OUT`: PyTorch files to a checkpoint."""

import dataclasses
from pathlib import Path

from mooer_jax.checkpoint import LazyArray

from .core.errors import Problems
from .core.folders import check_apart, check_target, save_checkpoint
from .core.options import Options, flag
from .kinds import find_kind


@dataclasses.dataclass(frozen=True)
class Report:
  """Results of an import: the checkpoint, and fields of `Opened`."""

  folder: Path
  leaves: dict[str, LazyArray]
  ignored: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


def import_checkpoint(kind: str, src: Path, out: Path, options: Options = Options()) -> Report:
  """Converts PyTorch files to a checkpoint, one tensor at a time.

  Args:
    kind: a name in KINDS.
    src: the folder or file to import.
    out: folder of the checkpoint; complete or absent.
    options: options of the kind.

  Raises:
    FileNotFoundError, FileExistsError: for the source and the target.
    ValueError: for an option that has no effect or is missing.
    ConversionError: with every tensor and setting that does not fit.
    ReadError: for a file that is damaged, or has values that are not finite.
  """
  found = find_kind(kind)
  if not src.exists():
    raise FileNotFoundError(f"{src}: no such file or folder")
  check_apart(out, (src, *options.paths()))
  check_target(out, overwrite=options.overwrite)
  for name in options.given():
    if name not in (*found.options, "overwrite"):
      raise ValueError(f"{flag(name)} has no effect on the kind {kind!r}")
  if options.merge_lora and not options.lora:
    raise ValueError("--merge-lora and --no-lora: choose one of them")
  problems = Problems()
  opened = found.open(src, options, problems)
  problems.check(str(src))
  assert opened is not None, f"{kind}: None without a problem"
  save_checkpoint(out, opened, kind=kind, overwrite=options.overwrite)
  return Report(out, opened.leaves, opened.ignored, opened.notes)
