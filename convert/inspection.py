"""`convert inspect PATH`: lists the content of weights, a checkpoint or a run."""

import math
import sys
from collections import Counter
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mooer_jax import tree
from mooer_jax.checkpoint import all_steps, describe, find

from .core.errors import Problems
from .kinds import KINDS, find_kind
from .parts import hf_config
from .readers import open_source, read_object

Row = tuple[str, tuple, str, str]  # name, shape, dtype, file


def inspect(path: Path, *, names: bool = True, base: Path | None = None) -> None:
  """Prints totals and the kind to import it with; with `names`, a row for each tensor.

  Args:
    path: a file or folder of weights, a checkpoint, or a run folder with its latest checkpoint.
    base: base checkpoint of a fine-tune, if it has moved.

  Raises:
    FileNotFoundError, ReadError: if there are no weights.
    ValueError: if `path` is not a checkpoint, but has a base.
  """
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file or folder")
  if (path / "checkpoint.json").is_file() or all_steps(path):
    rows, kind, notes = _checkpoint(path, base)
  else:
    if base is not None:
      raise ValueError(f"--base-checkpoint has no effect: {path} is not a checkpoint of mooer_jax")
    rows, kind, notes = _weights(path)
  # In a file or a pipe, a row is one line.
  console = Console(width=None if sys.stdout.isatty() else 500)
  if names:
    table = Table("name", "shape", "dtype", "file", title=str(path), box=SIMPLE)
    for name, shape, dtype, file in rows:
      table.add_row(name, str(list(shape)), dtype, file)
    console.print(table)
  count = sum(math.prod(shape) for _, shape, _, _ in rows)
  dtypes = ", ".join(f"{n} {dtype}" for dtype, n in Counter(r[2] for r in rows).most_common())
  console.print(f"{len(rows)} tensors ({dtypes}), {count / 1e6:.2f} M parameters", highlight=False)
  console.print(f"kind: {kind}", highlight=False)
  for note in notes:
    console.print(note, highlight=False, markup=False)


def _checkpoint(path: Path, base: Path | None) -> tuple[list[Row], str, list[str]]:
  about = describe(find(path), base=None if base is None else find(base))
  of_base = "" if about.base is None else f"base {about.base.name}"
  rows = [
    (name, leaf.shape, str(leaf.dtype), "" if name in about.trained else of_base)
    for name, leaf in tree.flatten(about.params).items()
  ]
  notes = [] if about.base is None else [f"fine-tune of {about.base}"]
  if steps := [folder.name for folder in all_steps(path)]:
    return rows, f"run of mooer_jax, {about.folder.name}", [f"saved: {', '.join(steps)}", *notes]
  return rows, "checkpoint of mooer_jax", notes


def _weights(path: Path) -> tuple[list[Row], str, list[str]]:
  kinds = [find_kind(name) for name in KINDS]
  files = next((found for kind in kinds if (found := kind.files(path))), [path])
  sources = [open_source(file) for file in files]
  rows = [
    (t.name, t.shape, t.dtype.name, str(t.file.relative_to(path) if path.is_dir() else t.file.name))
    for source in sources
    for t in source.tensors.values()
  ]
  names = [row[0] for row in rows]
  labels = (kind.recognises(path, names) for kind in kinds)
  label = next((label for label in labels if label), "unknown")
  notes = [note for source in sources for note in source.notes]
  notes += [f"not a tensor: {name}" for source in sources for name in source.ignored]
  if label in hf_config.ARCHITECTURES and (path / "config.json").is_file():
    problems = Problems()
    problems.attempt(hf_config.llm_config, read_object(path / "config.json"))
    notes += [f"cannot be imported: {problem}" for problem in problems.found]
  return rows, label, notes
