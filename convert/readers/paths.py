"""Opens any path with the reader that it needs."""

from pathlib import Path

from .ctranslate2_file import is_ctranslate2, open_ctranslate2
from .deepspeed_folder import is_deepspeed, open_deepspeed
from .gguf_file import open_gguf
from .safetensors_file import open_safetensors
from .source import ReadError, Source, check_file, join_sources, read_object
from .torch_file import open_torch

_TORCH = (".bin", ".pt", ".pth")
_EXTENSIONS = (".safetensors", *_TORCH, ".gguf")
# In the order of transformers: a folder often has the same weights in two formats.
_MODEL = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


def open_source(path: str | Path, part: str | None = None) -> Source:
  """Opens weights of any supported format, without reading tensors.

  Args:
    path: a .safetensors, .bin (of torch or CTranslate2), .pt, .pth or .gguf file, one of torch.save
      without extension, an index of shards (.index.json), or a folder with an index, one file with
      such an extension, or a DeepSpeed checkpoint.
    part: key of the dict to open in a torch file (see `open_torch`).

  Raises:
    FileNotFoundError: if there is no such path.
    ReadError: if it has no weights, or they are damaged or need code to be run.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file or folder")
  if path.is_dir():
    return _open_folder(path, part)
  if not path.is_file():
    raise ReadError(f"{path}: neither a file nor a folder")
  if path.name.endswith(".index.json"):
    return _open_index(path, part)
  return _open_file(path, part)


def _open_file(path: Path, part: str | None) -> Source:
  if not path.suffix and _is_zip(path):
    return open_torch(path, part)
  if path.suffix not in _EXTENSIONS:
    raise ReadError(
      f"{path}: unknown extension {path.suffix!r}; supported are {', '.join(_EXTENSIONS)}"
    )
  check_file(path)
  ctranslate2 = path.suffix == ".bin" and is_ctranslate2(path)
  if path.suffix in _TORCH and not ctranslate2:
    return open_torch(path, part)
  if part:
    raise ReadError(
      f"{path}: must be a PyTorch file ({', '.join(_TORCH)}), whose entry {part!r} has the weights"
    )
  if ctranslate2:
    return open_ctranslate2(path)
  return open_gguf(path) if path.suffix == ".gguf" else open_safetensors(path)


def _is_zip(path: Path) -> bool:
  """Whether a file is an archive, as of torch.save; HiFi-GAN saves without extension."""
  with path.open("rb") as file:
    return file.read(4) == b"PK\x03\x04"


def _open_folder(path: Path, part: str | None) -> Source:
  model, adapter = (
    [path / name for name in names if (path / name).is_file()] for names in (_MODEL, _ADAPTER)
  )
  if model and adapter:
    raise ReadError(
      f"{path}: a model ({model[0].name}) and a LoRA ({adapter[0].name}) in one folder; move one"
      " of them, with its config, to a folder of its own"
    )
  if usual := model or adapter:
    source = open_source(usual[0], part)
    notes = [f"{usual[0].name} is read, {other.name} is not" for other in usual[1:]]
    return join_sources(path, [source], notes)
  files = sorted(file for file in path.iterdir() if file.suffix in _EXTENSIONS and file.is_file())
  if is_deepspeed(path):
    if part:
      raise ReadError(f"{path}: a DeepSpeed checkpoint has no parts, got part={part!r}")
    return open_deepspeed(path)
  if len(files) == 1:
    return _open_file(files[0], part)
  if files:
    names = ", ".join(file.name for file in files[:8])
    raise ReadError(f"{path}: {len(files)} weight files and no index: {names}; give one of them")
  raise ReadError(
    f"{path}: no weights in it; looked for {', '.join((*_MODEL, *_ADAPTER))} or one file "
    f"ending in {', '.join(_EXTENSIONS)}"
  )


def _open_index(path: Path, part: str | None) -> Source:
  weight_map = read_object(path).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise ReadError(f"{path}: no weight_map from tensors to files")
  for name, shard in weight_map.items():
    plain = isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard
    if not plain or Path(shard).suffix not in _EXTENSIONS:
      raise ReadError(
        f"{path}: tensor {name!r} cannot be in {shard!r}; shards must be weight files beside the"
        " index"
      )
  shards = list(dict.fromkeys(weight_map.values()))
  if missing := [shard for shard in shards if not (path.parent / shard).is_file()]:
    raise ReadError(
      f"{path}: {len(missing)} of {len(shards)} shards are missing: "
      f"{', '.join(missing[:8])}; download them"
    )
  source = join_sources(path, [_open_file(path.parent / shard, part) for shard in shards])
  found = {name: tensor.file.name for name, tensor in source.tensors.items()}
  wrong = [
    f"{name!r} should be in {shard}"
    for name, shard in weight_map.items()
    if found.get(name) != shard
  ] + [f"{name!r} of {found[name]} is not in the index" for name in found.keys() - weight_map]
  if wrong:
    more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    raise ReadError(f"{path}: index and shards disagree: {'; '.join(wrong[:8])}{more}")
  return source
