"""`convert inspect PATH`: what is in a file or folder of weights."""

import math
import sys
from collections import Counter
from pathlib import Path

from mooer_jax import tree
from mooer_jax.checkpoint import describe, find

from .core.errors import Problems
from .core.folders import read_json
from .families import mooer
from .parts import beats, language_model, lora, paraformer, qformer, whisper
from .readers import Source, open_source

# How MooER's training program begins the names of what it trains.
_TRAINING = ("encoder_projector.", "llm.")


def inspect(path: Path, *, names: bool = True) -> None:
  """Prints names, shapes and dtypes, totals, and the kind that `import` would take it for.

  Raises:
    FileNotFoundError, ReadError: if there is nothing that could be read.
  """
  from rich.box import SIMPLE
  from rich.console import Console
  from rich.table import Table

  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file or folder")
  rows, kind, notes = _content(path)
  # Into a file or a pipe, a row is a line, however long.
  console = Console(width=None if sys.stdout.isatty() else 500)
  if names:
    table = Table("name", "shape", "dtype", "file", title=str(path), box=SIMPLE)
    for name, shape, dtype, file in rows:
      table.add_row(name, str(list(shape)), dtype, file)
    console.print(table)
  count = sum(math.prod(shape) for _, shape, _, _ in rows)
  dtypes = ", ".join(f"{n} {dtype}" for dtype, n in Counter(r[2] for r in rows).most_common())
  console.print(f"{len(rows)} tensors ({dtypes}), {count / 1e6:.2f} M parameters", highlight=False)
  console.print(f"kind: {kind or 'unknown'}", highlight=False)
  for note in notes:
    console.print(note, highlight=False, markup=False)


def _content(path: Path) -> tuple[list[tuple[str, tuple, str, str]], str | None, list[str]]:
  if path.is_dir() and (path / "checkpoint.json").is_file():
    about = describe(find(path))
    rows = [
      (name, leaf.shape, str(leaf.dtype), "") for name, leaf in tree.flatten(about.params).items()
    ]
    return rows, "checkpoint of mooer_jax", []
  if path.is_dir() and (path / mooer.ADAPTER_FILE).is_file():
    sources = [open_source(path / mooer.ADAPTER_FILE)]
    if (added := mooer.find_lora(path)).is_dir():
      sources.append(open_source(added))
    return [row for s in sources for row in _rows(s, path)], "mooer (one task's part of it)", []
  if path.is_dir() and (path / mooer.ENCODER_FILE).is_file():
    return list(_rows(open_source(path / mooer.ENCODER_FILE), path)), "mooer (its encoder)", []
  if path.is_dir() and (path / mooer.ENCODER_FOLDER).is_dir():
    files = sorted(f for f in path.rglob("*") if f.name in (mooer.ENCODER_FILE, mooer.ADAPTER_FILE))
    sources = [open_source(file) for file in files]
    folders = [f.parent for name in ("config.json", lora.CONFIG_FILE) for f in path.rglob(name)]
    sources += [open_source(folder) for folder in sorted(folders)]
    return [row for s in sources for row in _rows(s, path)], "mooer", []
  source = open_source(path)
  kind = guess_kind(source, path)
  notes = [*source.notes, *(f"not a tensor: {name}" for name in source.ignored)]
  if path.is_dir() and (path / "config.json").is_file() and kind in ("qwen2", "llama"):
    problems = Problems()
    language_model.llm_config(read_json(path / "config.json"), problems)
    notes += [f"cannot be imported: {problem}" for problem in problems.found]
  return _rows(source, path), kind, notes


def _rows(source: Source, root: Path) -> list[tuple[str, tuple, str, str]]:
  def shown(file: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) else file.name

  return [(t.name, t.shape, t.dtype.name, shown(t.file)) for t in source.tensors.values()]


def guess_kind(source: Source, path: Path) -> str | None:
  """The kind whose table knows the tensors' names, or None."""
  if path.is_dir() and any(name.startswith(_TRAINING) for name in source.tensors):
    return "deepspeed"
  if qformer.QUERIES in source.tensors:
    return "salmonn"
  if any(".lora_A." in name for name in source.tensors):
    return "peft"
  if paraformer.find_prefix(source) is not None:
    return "paraformer"
  if whisper.find_format(source) is not None:
    return "whisper"
  if any(
    name.startswith("patch_embedding.") and beats.TABLE.to_jax(name) for name in source.tensors
  ):
    return "beats"
  if any(mooer.ADAPTER.to_jax(name) for name in source.tensors):
    return "mooer (its adapter alone)"
  if any(language_model.TABLE.to_jax(name) for name in source.tensors):
    biased = any(name.endswith("q_proj.bias") for name in source.tensors)
    return "qwen2" if biased else "llama"
  return None
