"""`convert import KIND SRC OUT`: PyTorch files to a checkpoint."""

from pathlib import Path

from .core.errors import Problems
from .core.folders import check_apart, check_target, save_checkpoint
from .core.kind import Opened
from .core.options import Options, flag
from .kinds import find_kind


def import_checkpoint(kind: str, src: Path, out: Path, *, options: Options = Options()) -> Opened:
  """Converts PyTorch files to the checkpoint `out`, one tensor at a time.

  Raises:
    FileNotFoundError, FileExistsError: for the source and the target.
    ValueError: for an unknown kind, or an option without effect.
    ConversionError: with every tensor, setting and option that does not fit.
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
  opened = problems.attempt(found.open, src, options, problems)
  problems.check(str(src))
  assert opened is not None
  save_checkpoint(out, opened, kind=kind, overwrite=options.overwrite)
  return opened
