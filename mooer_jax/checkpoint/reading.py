"""Open checkpoints and read from them."""

import contextlib
import dataclasses
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import files, storage, tree
from mooer_jax.checkpoint import arrays, sums
from mooer_jax.checkpoint.leaves import CheckpointError
from mooer_jax.checkpoint.manifest import FORMAT, MANIFEST, manifest_fault
from mooer_jax.checkpoint.remote import local_folder, url_of
from mooer_jax.checkpoint.steps import latest, remedy

_SECTIONS: dict[str, tuple[type, str]] = {  # of config.json
  **dict.fromkeys(("connector", "decoder", "prompts", "speech_output"), (dict, "an object")),
  **dict.fromkeys(("encoders", "frontends"), (list, "a list of objects")),
}
_WEIGHTS = ("weights", "trainable")  # of a whole checkpoint, of a fine-tune


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """An open checkpoint.

  Attributes:
    params: nested dict, per layer (`layers_0`, …): arrays, or `ShapeDtypeStruct`s from `describe`.
    config, generation: contents of config.json and generation.json.
    hash: SHA-256 (hex) of the weights, or of the trained leaves and the hash of their base.
    origin: the base of a fine-tune, else None.
    trained: paths of the leaves in this folder; all paths if there is no base.
    files: sizes and SHA-256 sums of the files; None if the checkpoint was saved without them.
  """

  folder: Path
  params: dict
  config: dict
  generation: dict
  hash: str
  origin: "Checkpoint | None"
  trained: tuple[str, ...]
  files: sums.Sums | None

  @property
  def base(self) -> Path | None:
    """Folder of the base of a fine-tune, else None."""
    return None if self.origin is None else self.origin.folder

  @property
  def weights(self) -> Path:
    """Folder of the leaves of this checkpoint, without those of its base."""
    return self.folder / _weights_name(self.origin)

  @property
  def tokenizer(self) -> Path:
    """Folder of the tokenizer's files."""
    return self.folder / "tokenizer"

  def check_not_quantized(self) -> None:
    """Raises CheckpointError if the LLM's matrices are int8, which only decoding reads."""
    if any(path.endswith("/kernel_int8") for path in tree.flatten(self.params)):
      raise CheckpointError(
        f"{self.folder} was rounded to int8, for decoding only; use the checkpoint that it was made"
        " from"
      )

  @property
  def sources(self) -> list[Path]:
    """The `source` folders of this checkpoint, its base, and so on."""
    own = [self.folder / "source"] if (self.folder / "source").is_dir() else []
    return own if self.origin is None else own + self.origin.sources


def has_base(folder: str | Path) -> bool:
  """Whether a checkpoint is a fine-tune with a base."""
  return open_folder(folder)[1]["base"] is not None


def describe(folder: str | Path, *, base: str | Path | None = None) -> Checkpoint:
  """Opens a checkpoint without reading its weights; params are `ShapeDtypeStruct`s.

  Raises the errors of `load`. The folder and the base may be URLs, of which a copy is opened; see
  `local_folder`.
  """
  folder, about = open_folder(folder)
  pointer, origin, leaves = about["base"], None, about["leaves"]
  if pointer is None and base is not None:
    raise CheckpointError(f"{folder} has no base checkpoint; leave out base_checkpoint={base}")
  if pointer is not None:
    named = _base(folder, pointer) if base is None else base
    try:
      place = local_folder(named)
    except FileNotFoundError:
      place = None
    if place is None or not place.is_dir():
      raise FileNotFoundError(
        f"{folder} is a fine-tune of {named}, which does not exist. If the base has moved, pass"
        " its path: --base-checkpoint PATH (Python: base_checkpoint=PATH; training:"
        " --config.init_from=PATH)"
      )
    if place.resolve() == folder.resolve():
      raise CheckpointError(
        f"{folder} names itself as its base; pass the right one: --base-checkpoint"
      )
    origin = describe(place)
    if origin.hash != pointer["hash"]:
      raise CheckpointError(
        f"{folder} is a fine-tune of weights with hash {pointer['hash']}, but those of {place}"
        f" have {origin.hash}; pass the right base: --base-checkpoint PATH"
      )
    leaves = {**arrays.shapes(origin.params), **leaves}
  try:
    structs = {
      path: jax.ShapeDtypeStruct(tuple(map(operator.index, shape)), np.dtype(dtype))
      for path, (shape, dtype) in leaves.items()
    }
  except (TypeError, ValueError) as error:
    raise _damaged(
      folder, f"checkpoint.json has a leaf without shape and dtype ({error})"
    ) from error
  return Checkpoint(
    folder=folder,
    params=tree.unflatten(structs),
    config=_read_config(folder),
    generation=_read_json(folder / "generation.json"),
    hash=about["hash"],
    origin=origin,
    trained=tuple(about["leaves"]),
    files=about.get("files"),
  )


def load(
  folder: str | Path,
  *,
  shardings: Mapping | None = None,
  dtype: Any = None,
  base: str | Path | None = None,
  without: Iterable[str] = (),
) -> Checkpoint:
  """Loads a checkpoint; each device reads its own part of each leaf.

  Args:
    shardings: nested dict with a sharding for every leaf of `describe(folder).params` that is
      read; default: everything on the first local device.
    dtype: dtype of floating-point matrices, while vectors become float32; default: as saved.
    base: folder of the base of a fine-tune, if it has moved.
    without: names of parts at the top of params that are not read.

  Raises:
    FileNotFoundError: if the folder, or the base of a fine-tune, does not exist.
    CheckpointError: if the folder is not a checkpoint, has a newer format, is damaged or has
      another base, or if the shardings do not fit.
  """
  about = describe(folder, base=base)
  if about.files is not None:
    sums.check_sizes(about.folder, about.files)
    sums.check(about.folder, about.files, [n for n in about.files if n.startswith("tokenizer/")])
    for name in sums.EDITABLE:
      if any(sums.damages(about.folder, {name: about.files[name]}, remember=True)):
        warnings.warn(f"{about.folder / name} was edited after it was saved", stacklevel=2)
  wanted = tree.flatten({n: part for n, part in about.params.items() if n not in set(without)})
  if shardings is None:
    places = dict.fromkeys(wanted, _first_device())
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
  """Read leaves of a checkpoint to the host, in their saved dtype, by paths such as "decoder/w".

  Raises:
    CheckpointError: if the files are damaged.
  """
  leaves = tree.flatten(about.params)
  return _read_leaves(about, {path: leaves[path] for path in paths})


def load_train_state(
  folder: str | Path, target: Any, *, optional: str = ""
) -> tuple[Any, list[dict]]:
  """Load the train_state, as (state like `target`, the data_state of each process that saved it).

  Args:
    target: pytree of arrays or `ShapeDtypeStruct`s with shardings; default sharding of a leaf: the
      first local device.
    optional: start of the paths of leaves that checkpoints of earlier versions lack; if one does,
      those of `target` are returned.

  Raises:
    CheckpointError: if there is no train state, or a leaf's path, shape or dtype differs.
  """
  folder, about = open_folder(folder)
  if (saved := about["train_state"]) is None:
    raise CheckpointError(f"{folder} holds no train_state; it cannot be resumed, only loaded")
  numbers = range(len(list((folder / "train_state").glob("data_*.json"))))
  data = [folder / "train_state" / f"data_{number}.json" for number in numbers]
  if not data or not all(file.is_file() for file in data):
    raise _damaged(folder, "train_state/ lacks the data state of a process")
  nested = arrays.by_path(target)
  wanted = arrays.shapes(nested)
  lacks = {path for path in wanted.keys() - saved.keys() if optional and path.startswith(optional)}
  for path in lacks:
    del wanted[path]
  for path in sorted(p for p in saved.keys() | wanted.keys() if saved.get(p) != wanted.get(p)):
    if path in saved and path in wanted:
      difference = f"is {saved[path]} in the checkpoint, but {wanted[path]} in this run"
    else:
      difference = f"is only in {'the checkpoint' if path in saved else 'this run'}"
    raise CheckpointError(f"{folder}/train_state: {path} {difference}; the configs differ")
  targets = {
    path: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=getattr(x, "sharding", None) or _first_device()
    )
    for path, x in tree.flatten(nested).items()
    if path not in lacks
  }
  if (recorded := about.get("files")) is not None:
    sums.check(folder, recorded, [n for n in recorded if n.startswith("train_state/")])
  with _with_remedy(folder):
    flat = arrays.read(folder / "train_state/arrays", saved, targets)
  state = jax.tree.map_with_path(lambda keys, x: flat.get(arrays.path_of(keys), x), target)
  return state, [_read_json(file) for file in data]


def find_damage(
  folder: str | Path, progress: Callable[[int, int], object] = lambda done, total: None
) -> list[str]:
  """Compare all files of a checkpoint, without its base, with their sums.

  If it was saved without sums, only the weights are checked. `progress` is called after each file
  with the number of checked bytes and of all bytes. Raises as `describe`.

  Returns:
    One line for each file that is missing or has changed.
  """
  folder, about = open_folder(folder)
  name, seed = _weights_name(about["base"]), (about["base"] or {}).get("hash", "")
  if (recorded := about.get("files")) is None:
    damage = _hash_damage(folder / name, seed, about["hash"])
    return [] if damage is None else [damage]
  found = list(sums.damages(folder, recorded, progress=progress))
  if sums.weights_hash(recorded, name, seed) != about["hash"]:
    found.append(f"{folder / 'checkpoint.json'} has changed: its hash does not fit its sums")
  return found


def check_leaves(about: Checkpoint, expected: Mapping) -> None:
  """Check that the weights are those of the model that config.json describes, `expected`.

  Raises:
    CheckpointError: if leaves are missing, belong to no part of the model, or differ in shape.
  """

  def described(params):
    return {
      path: str(list(leaf.shape)) + " of integers" * (not jnp.issubdtype(leaf.dtype, jnp.floating))
      for path, leaf in tree.flatten(params).items()
    }

  have, wanted = described(about.params), described(expected)
  if not any(path.endswith("_int8") for path in wanted):
    about.check_not_quantized()
  faults = []
  for path in sorted(p for p in have.keys() | wanted.keys() if have.get(p) != wanted.get(p)):
    if path not in wanted:
      faults.append(f"{path} is not a parameter of that model")
    elif path not in have:
      faults.append(f"{path} is missing from the weights")
    else:
      faults.append(f"{path} is {have[path]} in the weights, but {wanted[path]} by config.json")
  if faults:
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    raise CheckpointError(
      f"{about.folder}: config.json and the weights describe different models: {faults[0]}{more};"
      " restore the config.json that was saved with these weights"
    )


def _first_device() -> jax.sharding.Sharding:
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def open_folder(folder) -> tuple[Path, dict]:
  folder = local_folder(folder).absolute()
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: no such checkpoint folder")
  parts = ("config.json", "generation.json", "checkpoint.json", "tokenizer")
  missing = [name for name in parts if not (folder / name).exists()]
  if "checkpoint.json" in missing and not any((folder / name).is_dir() for name in _WEIGHTS):
    hint = ""
    if (newest := latest(folder)) is not None:
      hint = f"; it is the folder of a run, whose newest checkpoint is {newest}"
    elif list(folder.glob("*.safetensors")) or list(folder.glob("*.pt")):
      hint = "; these are PyTorch weights, which must be converted first"
    raise CheckpointError(f"{folder} is not a mooer_jax checkpoint: no {', '.join(missing)}{hint}")
  if missing:
    raise _damaged(folder, f"the checkpoint is not complete, it has no {', '.join(missing)}")
  about = _read_json(folder / "checkpoint.json")
  if isinstance(saved := about.get("format"), int) and saved > FORMAT:
    raise CheckpointError(
      f"{folder} has format {saved}, this mooer_jax reads format {FORMAT}; install a newer version"
    )
  if fault := manifest_fault(about):
    raise _damaged(folder, f"checkpoint.json {fault}")
  name = _weights_name(about["base"])
  if not (folder / name).is_dir():
    raise _damaged(folder, f"the checkpoint is not complete, it has no {name}")
  return folder, about


def _read_leaves(about: Checkpoint, targets: dict) -> dict:
  """Read leaves from the folder, and the others from its base."""
  trained = set(about.trained)
  own = {path: target for path, target in targets.items() if path in trained}
  if own:
    _check_weights(about, trained - own.keys())
  with _with_remedy(about.folder):
    flat = arrays.read(about.weights, about.trained, own)
  if about.origin is None:
    return flat
  rest = {path: target for path, target in targets.items() if path not in own}
  return {**_read_leaves(about.origin, rest), **flat}


def _check_weights(about: Checkpoint, unread: Iterable[str]) -> None:
  """Check the files of the weights, except those of `unread` leaves.

  Orbax would log a traceback for each damaged leaf, and does not detect changed bytes in files
  without compression.
  """
  seed = "" if about.origin is None else about.origin.hash
  if about.files is None:
    if damage := _hash_damage(about.weights, seed, about.hash, remember=True):
      raise CheckpointError(f"{damage}; {remedy(about.folder)}")
    return
  if not _has_hash(about.files, about.weights.name, seed, about.hash):
    raise _damaged(about.folder, "checkpoint.json has the sums of other weights than its hash")
  # A leaf has a folder, or its data is in files that all leaves share.
  folders = {path.replace("/", ".") for path in unread}
  inside = [path for path in about.files if path.startswith(f"{about.weights.name}/")]
  sums.check(about.folder, about.files, [p for p in inside if p.split("/")[1] not in folders])


def _has_hash(files: sums.Sums, name: str, seed: str, saved: str) -> bool:
  return saved in (sums.weights_hash(files, name, seed, stamped=old) for old in (False, True))


def _hash_damage(weights: Path, seed: str, saved: str, *, remember: bool = False) -> str | None:
  """Damage of weights that were saved without sums of their files, only with a hash of all."""
  now = sums.record(weights, prefix=f"{weights.name}/", remember=remember)
  if _has_hash(now, weights.name, seed, saved):
    return None
  return f"{weights}: files were added, removed or changed since they were saved"


@contextlib.contextmanager
def _with_remedy(folder: Path) -> Iterator[None]:
  try:
    yield
  except ValueError as error:
    raise CheckpointError(f"{error}; {remedy(folder)}") from error


def _damaged(folder: Path, damage: str) -> CheckpointError:
  return CheckpointError(f"{folder}: {damage}; {remedy(folder)}")


def _weights_name(base) -> str:
  return _WEIGHTS[base is not None]


def _base(folder: Path, pointer: dict) -> str | Path:
  """The base relative to the fine-tune, if they moved together, else its original path or URL."""
  relative = pointer.get("relative", pointer["path"])
  beside = Path(os.path.normpath(folder / relative))
  if beside.is_dir():
    return beside
  if (url := url_of(folder)) and storage.is_file(f"{storage.join(url, relative)}/{MANIFEST}"):
    return storage.join(url, relative)
  return pointer["path"]


def _cast(leaf, wanted):
  if wanted is None or not jnp.issubdtype(leaf.dtype, jnp.floating):
    return leaf.dtype
  # CMVN, norms and biases are small, and rounding them is costlier than rounding matrices.
  return np.dtype(np.float32 if len(leaf.shape) < 2 else wanted)


def data_file() -> str:
  return f"data_{jax.process_index()}.json"


def _read_config(folder: Path) -> dict:
  config = _read_json(folder / "config.json")
  for name, (kind, wanted) in _SECTIONS.items():
    value = config.get(name, kind())
    parts = value if kind is list else []
    if not isinstance(value, kind) or not all(isinstance(part, dict) for part in parts):
      raise _damaged(folder, f"config.json has {name}={value!r}, which must be {wanted}")
  return config


def _read_json(path: Path) -> dict:
  with _with_remedy(path.parent):
    return files.read_json_object(path)
