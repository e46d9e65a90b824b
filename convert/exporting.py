"""`convert export KIND CKPT OUT`: a checkpoint to PyTorch files."""

from pathlib import Path

from mooer_jax.checkpoint import describe, find

from .core.errors import ConversionError
from .core.folders import check_apart, complete_folder
from .kinds import find_kind

SHARD_BYTES = 5 * 10**9


def export_checkpoint(
  kind: str,
  checkpoint: Path,
  out: Path,
  *,
  base: Path | None = None,
  shard_bytes: int | None = None,
  overwrite: bool = False,
) -> Path:
  """Converts a checkpoint, or the latest of a run, to PyTorch files in the folder `out`.

  Args:
    base: base checkpoint of a fine-tune, if it has moved.
    shard_bytes: maximum size of a file, unless one tensor is larger, for kinds that are sharded;
      default: SHARD_BYTES.

  Raises:
    FileNotFoundError, FileExistsError: for the checkpoint and the target.
    ConversionError, ValueError: if the files of the kind cannot express the checkpoint.
  """
  found = find_kind(kind)
  if found.export is None:
    raise ConversionError(f"{kind} is import only; export the checkpoint with the kind mooer")
  if shard_bytes is not None and not found.sharded:
    raise ConversionError(f"--shard-size has no effect on {kind}, which is exported as one file")
  about = describe(find(checkpoint), base=None if base is None else find(base))
  about.check_not_quantized()
  check_apart(out, (about.folder, about.base))
  with complete_folder(out, overwrite=overwrite) as folder:
    found.export(about, folder, shard_bytes or SHARD_BYTES)
  return out
