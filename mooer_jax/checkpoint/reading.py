"""Opens checkpoints and reads from them."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import tree
from mooer_jax.checkpoint import arrays
from mooer_jax.checkpoint.leaves import CheckpointError
from mooer_jax.checkpoint.steps import latest

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint that was opened.

  Attributes:
    folder: where it lies.
    params: nested dict, per layer (`layers_0`, …): arrays, or `ShapeDtypeStruct`s from `describe`.
    config: what config.json holds.
    generation: what generation.json holds.
    hash: SHA-256 (hex) of the weights, or of the trained leaves and their base's hash.
    base: folder of the base of a fine-tune, else None.
    trained: paths that a fine-tune has of its own; all paths where there is no base.
  """

  folder: Path
  params: dict
  config: dict
  generation: dict
  hash: str
  base: Path | None
  trained: tuple[str, ...]

  @property
  def tokenizer(self) -> Path:
    """Folder of the tokenizer's files."""
    return self.folder / "tokenizer"

  @property
  def sources(self) -> list[Path]:
    """Folders of what the converter kept: of this checkpoint, then of its base, and so on."""
    own = [self.folder / "source"] if (self.folder / "source").is_dir() else []
    return own if self.base is None else own + describe(self.base).sources


def has_base(folder: str | Path) -> bool:
  """Whether a checkpoint is a fine-tune, which points to its base."""
  return open_folder(folder)[1]["base"] is not None


def describe(folder: str | Path, *, base: str | Path | None = None) -> Checkpoint:
  """Opens a checkpoint without reading its weights: params are `ShapeDtypeStruct`s.

  Args, Raises: as for `load`.
  """
  folder, about = open_folder(folder)
  leaves = about["leaves"]
  origin = None
  if about["base"] is None and base is not None:
    raise CheckpointError(
      f"{folder} is whole: it has no base, so base={base} (--base) means nothing"
    )
  if about["base"] is not None:
    origin = _base(folder, about["base"]) if base is None else Path(base)
    if not origin.is_dir():
      raise FileNotFoundError(
        f"{folder} is a fine-tune of {origin}, which is not there; if it moved, say where it"
        " is: --base FOLDER, in Python base=FOLDER, to go on training --config.init_from=FOLDER"
      )
    under = describe(origin)
    if under.hash != about["base"]["hash"]:
      raise CheckpointError(
        f"{folder} was trained on other weights than {origin} holds (hash {about['base']['hash']}, "
        f"there {under.hash}); pass base=FOLDER (--base FOLDER) of the right ones"
      )
    leaves = {**arrays.shapes(under.params), **leaves}
  structs = {
    path: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
    for path, (shape, dtype) in leaves.items()
  }
  return Checkpoint(
    folder=folder,
    params=tree.unflatten(structs),
    config=_read_json(folder / "config.json"),
    generation=_read_json(folder / "generation.json"),
    hash=about["hash"],
    base=origin,
    trained=tuple(about["leaves"]),
  )


def load(
  folder: str | Path,
  *,
  shardings: Mapping | None = None,
  dtype: Any = None,
  base: str | Path | None = None,
) -> Checkpoint:
  """Loads a checkpoint; each device reads its own part of each leaf.

  Args:
    folder: from `save`.
    shardings: nested dict with a sharding for every leaf of `describe(folder).params`; default:
      everything on the first local device.
    dtype: what floating-point matrices become, and vectors float32; default: all as saved.
    base: where the base of a fine-tune lies, if it moved without it or was replaced there.

  Raises:
    FileNotFoundError: if the folder, or the base of a fine-tune, does not exist.
    CheckpointError: if it is no checkpoint (what is missing is named), of a newer format, damaged,
      of another base, or if the shardings do not fit.
  """
  about = describe(folder, base=base)
  wanted = tree.flatten(about.params)
  if shardings is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = dict.fromkeys(wanted, device)
  else:
    places = tree.flatten(shardings)
    if odd := sorted(places.keys() ^ wanted.keys()):
      kind = "no sharding for" if odd[0] in wanted else "a sharding but no leaf for"
      raise CheckpointError(f"{about.folder}: {kind} {odd[0]} ({len(odd)} such paths)")
  targets = {
    path: jax.ShapeDtypeStruct(leaf.shape, _cast(leaf, dtype), sharding=places[path])
    for path, leaf in wanted.items()
  }
  return dataclasses.replace(about, params=tree.unflatten(_read_leaves(about, targets)))


def read_leaves(about: Checkpoint, paths: Iterable[str]) -> dict[str, np.ndarray]:
  """Reads some leaves of a checkpoint to the host, in the dtype that they are saved in.

  Args:
    about: from `describe`.
    paths: of the leaves, such as "decoder/embed/embedding".

  Raises:
    CheckpointError: if the files are damaged.
  """
  leaves = tree.flatten(about.params)
  return _read_leaves(about, {path: leaves[path] for path in paths})


def load_train_state(folder: str | Path, target: Any) -> tuple[Any, dict]:
  """Loads what `save` got as train_state, and this process's data_state.

  Args:
    folder: from `save`.
    target: pytree of the same structure, of arrays or `ShapeDtypeStruct`s with shardings; leaves
      without a sharding come to the first local device.

  Returns:
    (state like `target`, data_state).

  Raises:
    CheckpointError: if there is no train state, or a leaf's path, shape or dtype differs.
  """
  folder, about = open_folder(folder)
  if about["train_state"] is None:
    raise CheckpointError(f"{folder} holds no train_state; it cannot be resumed, only loaded")
  data = folder / "train_state" / data_file()
  if not data.is_file():
    raise CheckpointError(
      f"{data} is missing; the run was saved by another number of processes than "
      f"{jax.process_count()}"
    )
  saved, wanted = about["train_state"], tree.flatten(arrays.by_path(target))
  if odd := sorted(saved.keys() ^ wanted.keys()):
    where = "not in the checkpoint" if odd[0] in wanted else "only in the checkpoint"
    raise CheckpointError(f"{folder}/train_state: {odd[0]} is {where}; the configs differ")
  expected = arrays.shapes(arrays.by_path(target))
  for path, have in saved.items():
    if have != expected[path]:
      raise CheckpointError(
        f"{folder}/train_state: {path} is saved as {have}, this run has {expected[path]}"
      )
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  targets = {
    path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or device)
    for path, x in wanted.items()
  }
  flat = arrays.read(folder / "train_state" / "arrays", saved, targets)
  paths = [arrays.path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(target)[0]]
  state = jax.tree.unflatten(jax.tree.structure(target), [flat[path] for path in paths])
  return state, _read_json(data)


def verify(folder: str | Path) -> None:
  """Reads all bytes of the weights and compares them with the hash of when they were saved.

  Raises:
    CheckpointError: if they differ.
  """
  folder, about = open_folder(folder)
  base = about["base"]
  weights = folder / ("weights" if base is None else "trainable")
  seed = "" if base is None else base["hash"]
  if all(arrays.hash_files(weights, seed, stamped=x) != about["hash"] for x in (False, True)):
    raise CheckpointError(f"{weights}: the files have changed since they were saved")


def open_folder(folder) -> tuple[Path, dict]:
  folder = Path(folder).absolute()
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: no such checkpoint folder")
  missing = [
    name
    for name in ("config.json", "generation.json", "checkpoint.json", "tokenizer")
    if not (folder / name).exists()
  ]
  if missing:
    hint = ""
    if (newest := latest(folder)) is not None:
      hint = f"; it is the folder of a run, whose newest checkpoint is {newest}"
    elif list(folder.glob("*.safetensors")) or list(folder.glob("*.pt")):
      hint = "; these are PyTorch weights, which must be converted first"
    raise CheckpointError(f"{folder} is not a mooer_jax checkpoint: no {', '.join(missing)}{hint}")
  about = _read_json(folder / "checkpoint.json")
  if about.get("format") != FORMAT:
    raise CheckpointError(
      f"{folder} has format {about.get('format')}, this mooer_jax reads format {FORMAT}"
    )
  name = "weights" if about["base"] is None else "trainable"
  if not (folder / name).is_dir():
    raise CheckpointError(f"{folder} is not a mooer_jax checkpoint: no {name}")
  return folder, about


def _read_leaves(about: Checkpoint, targets: dict) -> dict:
  """Reads the leaves that the folder has of its own, and the others from its base."""
  own = set(about.trained)
  name = "weights" if about.base is None else "trainable"
  saved = open_folder(about.folder)[1]["leaves"]
  flat = arrays.read(about.folder / name, saved, {p: t for p, t in targets.items() if p in own})
  if about.base is None:
    return flat
  rest = {path: target for path, target in targets.items() if path not in own}
  return {**_read_leaves(describe(about.base), rest), **flat}


def _base(folder: Path, pointer: dict) -> Path:
  """Where the base lies from here, as when a fine-tune moves with it; else where it lay."""
  beside = Path(os.path.normpath(folder / pointer.get("relative", pointer["path"])))
  return beside if beside.is_dir() else Path(pointer["path"])


def _cast(leaf, wanted):
  if wanted is None or not jnp.issubdtype(leaf.dtype, jnp.floating):
    return leaf.dtype
  # CMVN, norms and biases are small; to round them would cost more than to round the matrices.
  return np.dtype(np.float32 if len(leaf.shape) < 2 else wanted)


def data_file() -> str:
  return f"data_{jax.process_index()}.json"


def _read_json(path: Path) -> dict:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
