"""Folders that are complete or not there, and the files that travel in a checkpoint's source/."""

import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, Lazy, SaveError, put_in_place, save
from mooer_jax.config import SpeechLLMConfig, differences
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.decoders.llm import LORA_TARGETS, LLMConfig

from ..readers import ReadError
from .errors import ConversionError, Problems

SOURCE_FILE = "source.json"


def read_json(path: Path) -> dict[str, Any]:
  """Raises ValueError, naming the file, if it is not a JSON object."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not readable as JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
  return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def beside(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
  """Gives a folder to write into that becomes `out` if the block succeeds, else is removed.

  It lies beside `out` under a name of its own, so that runs at the same time keep apart.

  Raises:
    FileExistsError: if `out` exists, before or after the block, and overwrite is False.
  """
  out = out.absolute()

  def check():
    if out.exists() and not overwrite:
      raise FileExistsError(f"{out} exists; choose another folder or pass --overwrite")

  check()
  if out.exists() and not out.is_dir():
    raise FileExistsError(f"{out} is a file; choose another name")
  out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f".tmp-{out.name}-", dir=out.parent) as own:
    part = Path(own) / out.name  # a plain folder; `own` itself is closed to others
    part.mkdir()
    yield part
    check()
    _lose_nothing(part, out)
    put_in_place(part, out)


def _lose_nothing(part: Path, out: Path) -> None:
  """Raises FileExistsError if `out` holds a file that is not written again."""
  files = [
    {f.relative_to(folder) for f in folder.rglob("*") if f.is_file()} for folder in (out, part)
  ]
  if lost := sorted(map(str, files[0] - files[1])):
    raise FileExistsError(
      f"{out} holds {len(lost)} files that this would remove, such as {lost[0]}; remove the folder"
      " yourself or choose another"
    )


def keep_apart(out: Path, sources: Iterable[Path | None]) -> None:
  """Raises ValueError if replacing `out` would remove what is read, or a part of it."""
  out = out.resolve()
  for source in filter(None, sources):
    read = source.resolve()
    if out in (read, *read.parents):
      raise ValueError(f"{out} would replace {read}, which is read; choose another folder")
    if out.exists() and read in out.parents:
      raise ValueError(
        f"{out} would replace a part of {read}, which is read; choose another folder"
      )


def check_target(out: Path, *, overwrite: bool) -> None:
  """Raises FileExistsError if a checkpoint cannot be made there; only a checkpoint is replaced."""
  if not out.exists():
    return
  if not overwrite:
    raise FileExistsError(f"{out} exists; choose another folder or pass --overwrite")
  if not (out / "checkpoint.json").is_file() and (not out.is_dir() or any(out.iterdir())):
    raise FileExistsError(
      f"{out} is no checkpoint, and --overwrite replaces nothing else; choose another folder"
    )


def copier(files: Iterable[Path]) -> Callable[[Path], None]:
  """A function that copies files into the folder it is given."""

  def copy(folder: Path):
    for file in files:
      shutil.copyfile(file, folder / file.name)

  return copy


@dataclasses.dataclass(frozen=True)
class Release:
  """A whole speech LLM whose files were opened; no tensor is read."""

  config: SpeechLLMConfig
  leaves: dict[str, Lazy]
  style: dict[str, Any]
  tokenizer: Callable[[Path], Any]
  kept: dict[str, tuple[Path, ...]]
  ignored: tuple[str, ...]
  notes: tuple[str, ...]


def save_checkpoint(
  out: Path,
  leaves: Mapping[str, Lazy],
  *,
  config: Mapping[str, Any],
  kind: str,
  style: Mapping[str, Any],
  tokenizer: Callable[[Path], Any] = lambda folder: None,
  kept: Mapping[str, Iterable[Path]] | None = None,
  generation: Mapping[str, Any] | None = None,
  base: Path | None = None,
  overwrite: bool = False,
) -> Path:
  """Saves imported leaves with all that an export needs to make the files again.

  Args:
    out: the checkpoint's folder.
    leaves: path -> leaf, read one after another.
    config: content of config.json.
    kind: what was imported.
    style: how its files were written where that is a choice.
    tokenizer: writes the files for tokenizer/.
    kept: folder below source/ -> files that go there.
    generation: content of generation.json.
    base: checkpoint that the other leaves are in.
    overwrite: replace a checkpoint that is there.
  """

  def write_source(folder: Path):
    write_json(folder / SOURCE_FILE, {"kind": kind, "style": dict(style)})
    for name, files in (kept or {}).items():
      (folder / name).mkdir()
      copier(files)(folder / name)

  # Values that are not finite are found before anything is written; that costs a second reading.
  console = Console(stderr=True)
  for leaf in track(leaves.values(), "checking", console=console, disable=not console.is_terminal):
    leaf.read()
  try:
    return save(
      out,
      params=tree.unflatten(leaves),
      config_json=config,
      tokenizer=tokenizer,
      generation=generation or {},
      source=write_source,
      base=base,
      overwrite=overwrite,
    )
  except SaveError as error:
    cause: BaseException | None = error
    while cause is not None:  # a tensor that cannot be read says so itself
      if isinstance(cause, ReadError | ConversionError):
        raise cause from error
      cause = cause.__cause__
    raise


def style_of(about: Checkpoint, part: str) -> dict[str, Any]:
  """How the files of a part were written that it was imported from; {} if it was not."""
  for folder in about.sources:
    style = read_json(folder / SOURCE_FILE)["style"]
    if part in style:
      return style[part]
  return {}


def kept_files(about: Checkpoint, name: str) -> list[Path]:
  """The files in a folder of source/, of the checkpoint itself or of the base it was tuned from."""
  for folder in about.sources:
    if (folder / name).is_dir():
      return sorted((folder / name).iterdir())
  return []


def kept_json(about: Checkpoint, name: str, file: str) -> dict[str, Any] | None:
  """A JSON file in a folder of source/, or None if it is not there."""
  return next((read_json(path) for path in kept_files(about, name) if path.name == file), None)


def check_same(meant: SpeechLLMConfig, read: SpeechLLMConfig, problems: Problems) -> None:
  """Adds everything in which a model and its exported form, read again, are different models.

  Dropout of encoder and connector, which only training knows, is nobody's business here.
  """
  for path, (ours, theirs) in differences(_essence(meant), _essence(read)).items():
    numbers = isinstance(ours, float) and isinstance(theirs, float)
    if not (numbers and math.isclose(ours, theirs, rel_tol=1e-12)):
      problems.add(
        f"{path} is {ours!r} in config.json, which these files cannot say: who reads them takes"
        f" {theirs!r}; pass on the checkpoint itself, or make a model with that value"
      )


def _essence(config: SpeechLLMConfig) -> SpeechLLMConfig:
  decoder = config.decoder
  if decoder.lora_rank:
    targets = tuple(name for name in LORA_TARGETS if name in decoder.lora_targets)
    decoder = dataclasses.replace(decoder, lora_targets=targets)
  else:
    none: dict[str, Any] = {
      field.name: field.default
      for field in dataclasses.fields(LLMConfig)
      if field.name.startswith("lora_")
    }
    decoder = dataclasses.replace(decoder, **none)
  encoders = tuple(dataclasses.replace(encoder, dropout=0.0) for encoder in config.encoders)
  connector = config.connector
  if isinstance(connector, QFormerConfig):
    connector = dataclasses.replace(connector, dropout=0.0)
  return config.replace(decoder=decoder, encoders=encoders, connector=connector)
