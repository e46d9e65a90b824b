"""Complete folders, and the source/ folder of an imported checkpoint."""

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

from mooer_jax import storage, tree
from mooer_jax.checkpoint import Checkpoint, SaveError, put_in_place, save
from mooer_jax.config import SpeechLLMConfig, differences, frontend_from_json, part_from_json
from mooer_jax.decoders.llm import LLMConfig

from ..readers import ReadError, read_object
from .errors import ConversionError, Problems
from .kind import Opened

SOURCE_FILE = "source.json"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def complete_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
  """Yields a folder to write into, which becomes `out` if the block succeeds.

  Raises FileExistsError if `out` exists without `overwrite`, or has files that are not rewritten;
  ValueError if it is a URL.
  """
  out = storage.local(out, "out").absolute()

  def check():
    if out.exists() and not overwrite:
      raise FileExistsError(f"{out} exists; choose another folder or pass --overwrite")

  check()
  if out.exists() and not out.is_dir():
    raise FileExistsError(f"{out} is a file; choose another name")
  out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f".tmp-{out.name}-", dir=out.parent) as own:
    part = Path(own) / out.name  # a plain folder; other users cannot read `own` itself
    part.mkdir()
    yield part
    check()
    _check_nothing_lost(part, out)
    put_in_place(part, out)


def _check_nothing_lost(part: Path, out: Path) -> None:
  """Raises FileExistsError if `out` holds a file that is not written again."""
  files = [
    {f.relative_to(folder) for f in folder.rglob("*") if f.is_file()} for folder in (out, part)
  ]
  if lost := sorted(map(str, files[0] - files[1])):
    raise FileExistsError(
      f"{out} has {len(lost)} other files, such as {lost[0]}; remove the folder or choose another"
    )


def check_apart(out: Path, sources: Iterable[Path | None]) -> None:
  """Raises ValueError if `out` is, contains or is part of one of the sources."""
  out = out.resolve()
  for source in filter(None, sources):
    read = source.resolve()
    if out in (read, *read.parents):
      raise ValueError(f"{out} would replace the source {read}; choose another folder")
    if out.exists() and read in out.parents:
      raise ValueError(f"{out} would replace a part of the source {read}; choose another folder")


def check_target(out: Path, *, overwrite: bool) -> None:
  """Raises FileExistsError unless `out` is absent, or a checkpoint or empty folder to replace.

  Raises ValueError if it is a URL.
  """
  if not storage.local(out, "out").exists():
    return
  if not overwrite:
    raise FileExistsError(f"{out} exists; choose another folder or pass --overwrite")
  if not (out / "checkpoint.json").is_file() and (not out.is_dir() or any(out.iterdir())):
    raise FileExistsError(
      f"{out} is not a checkpoint, and --overwrite replaces nothing else; choose another folder"
    )


def copier(files: Iterable[Path]) -> Callable[[Path], None]:
  """Returns a function that copies the files into a folder."""

  def copy(folder: Path):
    for file in files:
      shutil.copyfile(file, folder / file.name)

  return copy


def save_checkpoint(out: Path, opened: Opened, *, kind: str, overwrite: bool = False) -> Path:
  """Saves a source, leaf by leaf. Raises ReadError or ConversionError if one cannot be read."""

  def write_source(folder: Path):
    write_json(folder / SOURCE_FILE, {"kind": kind, "style": opened.style})
    for name, files in opened.kept.items():
      (folder / name).mkdir()
      write = files if callable(files) else copier(files)
      write(folder / name)

  # Reads everything twice, to find values that are not finite before anything is written.
  console, leaves = Console(stderr=True), opened.leaves
  for leaf in track(leaves.values(), "checking", console=console, disable=not console.is_terminal):
    leaf.read()
  try:
    return save(
      out,
      params=tree.unflatten(leaves),
      config_json=opened.config,
      tokenizer=opened.tokenizer,
      generation=opened.generation,
      source=write_source,
      base=opened.base,
      overwrite=overwrite,
    )
  except SaveError as error:
    cause: BaseException | None = error
    while cause is not None:  # find the error that names the tensor
      if isinstance(cause, ReadError | ConversionError):
        raise cause from error
      cause = cause.__cause__
    raise


def style_of(about: Checkpoint, part: str) -> dict[str, Any]:
  """Returns the layout of the imported files of a part; {} if it was not imported."""
  for folder in about.sources:
    style = read_object(folder / SOURCE_FILE)["style"]
    if part in style:
      return style[part]
  return {}


def kept_files(about: Checkpoint, name: str) -> list[Path]:
  """Lists the files in a folder of source/, of the checkpoint or else of its base."""
  for folder in about.sources:
    if (folder / name).is_dir():
      return sorted((folder / name).iterdir())
  return []


def kept_json(about: Checkpoint, name: str, file: str) -> dict[str, Any] | None:
  """Reads a JSON file in a folder of source/; None if it is absent."""
  return next((read_object(path) for path in kept_files(about, name) if path.name == file), None)


def encoder_of(about: Checkpoint, kind: str) -> tuple[Any, Any]:
  """Returns (config, config of its front end). Raises ConversionError without such an encoder."""
  encoders = about.config.get("encoders", ())
  for n, section in enumerate(encoders):
    if section.get("kind") == kind:
      frontend = frontend_from_json(about.config["frontends"][n], f"frontends[{n}]")
      return part_from_json(section, f"encoders[{n}]"), frontend
  held = ", ".join(section.get("kind", "?") for section in encoders) or "no encoder"
  raise ConversionError(f"{about.folder}: no {kind} encoder in it; it has {held}")


def check_roundtrip(
  about: Checkpoint, meant: SpeechLLMConfig, read: Callable[[Problems], SpeechLLMConfig]
) -> None:
  """Reads exported files again. Raises ConversionError if they mean a different model."""
  problems = Problems()
  found = problems.attempt(read, problems)
  different = {} if found is None else differences(_comparable(meant), _comparable(found))
  for path, (ours, theirs) in different.items():
    numbers = isinstance(ours, float) and isinstance(theirs, float)
    same = numbers and math.isclose(ours, theirs, rel_tol=1e-12)
    if not same and not path.endswith("/dropout"):
      problems.add(
        f"{path} is {ours!r} in config.json, which these files cannot express (they are read as"
        f" {theirs!r}); share the checkpoint itself, or train a model with that value"
      )
  problems.check(str(about.folder))


def _comparable(config: SpeechLLMConfig) -> SpeechLLMConfig:
  """Replaces options of a LoRA that is absent, and sorts the targets of one that is not."""
  decoder = config.decoder
  if not decoder.lora_rank:
    return config.replace(decoder=without_lora(decoder))
  targets = tuple(sorted(decoder.lora_targets))
  return config.replace(decoder=dataclasses.replace(decoder, lora_targets=targets))


def without_lora(config: LLMConfig) -> LLMConfig:
  names = [field.name for field in dataclasses.fields(config) if field.name.startswith("lora_")]
  return dataclasses.replace(config, **{name: getattr(LLMConfig, name) for name in names})
