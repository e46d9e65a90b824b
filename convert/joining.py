"""`convert join OUT PART …`: encoders and an LLM to one checkpoint, to train on."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, LazyArray, describe, find, read_leaves

from .core.errors import ConversionError
from .core.folders import SOURCE_FILE, check_apart, check_target, copier, save_checkpoint
from .core.kind import Opened, Writer
from .readers import read_object


def join(out: Path, parts: Sequence[Path], *, overwrite: bool = False) -> dict[str, LazyArray]:
  """Copies the leaves of several checkpoints into one, one tensor at a time.

  The parts are encoders, in the order in which their frames are joined, and one LLM. The connector
  between them is absent; training initializes it. Returns path -> leaf.

  Raises:
    FileNotFoundError, FileExistsError: for a part and the target.
    ConversionError: if two parts have the same leaf, or one is not an encoder or LLM alone.
  """
  opened = [describe(find(part)) for part in parts]
  check_apart(out, [path for about in opened for path in (about.folder, about.base)])
  check_target(out, overwrite=overwrite)
  config: dict[str, Any] = {"encoders": [], "frontends": []}
  leaves: dict[str, LazyArray] = {}
  style: dict[str, Any] = {}
  kept: dict[str, tuple[Path, ...] | Writer] = {}
  tokenizer: list[Path] = []
  for about in opened:
    about.check_not_quantized()
    if unknown := sorted(set(about.config) - {"encoders", "frontends", "decoder"}):
      raise ConversionError(
        f"{about.folder} is not an encoder or an LLM alone: it has {', '.join(unknown)}"
      )
    for path, leaf in tree.flatten(about.params).items():
      if path in leaves:
        raise ConversionError(f"{about.folder} has {path}, which another part has too")
      leaves[path] = LazyArray(leaf.shape, leaf.dtype, functools.partial(_read, about, path))
    config["encoders"] += about.config.get("encoders", [])
    config["frontends"] += about.config.get("frontends", [])
    if "decoder" in about.config:
      config["decoder"] = about.config["decoder"]
      tokenizer = sorted(about.tokenizer.iterdir())
    for folder in about.sources:
      style |= read_object(folder / SOURCE_FILE)["style"]
      kept |= {p.name: tuple(sorted(p.iterdir())) for p in sorted(folder.iterdir()) if p.is_dir()}
  if "decoder" not in config or not config["encoders"]:
    found = "no LLM" if config["encoders"] else "no encoder"
    raise ConversionError(f"{found} among {', '.join(map(str, parts))}; both are needed")
  joined = Opened(config=config, leaves=leaves, style=style, tokenizer=copier(tokenizer), kept=kept)
  save_checkpoint(out, joined, kind="join", overwrite=overwrite)
  return leaves


def _read(about: Checkpoint, path: str) -> np.ndarray:
  return read_leaves(about, [path])[path]
