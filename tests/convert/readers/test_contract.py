"""What every reader does with damaged files: one line that names the file and the remedy."""

import io
import json
import random
import warnings

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch

from convert.readers import ReadError, open_source
from tests.convert.ctranslate2_files import ctranslate2_bytes
from tests.convert.readers.zero_folders import write_zero

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
VALUES = {
  "norm.weight": np.linspace(-2, 2, 64, dtype=np.float32),
  "proj.weight": np.linspace(-2, 2, 12, dtype=np.float16).reshape(4, 3),
  "embed.weight": np.linspace(-2, 2, 20).astype(ml_dtypes.bfloat16).reshape(5, 4),
}
GGUF_NAMES = {"token_embd.weight": (8, 64), "output_norm.weight": (64,)}


def as_torch(arrays):
  return {
    name: torch.from_numpy(array.astype(np.float32)).to(getattr(torch, array.dtype.name))
    for name, array in arrays.items()
  }


def torch_bytes(arrays, zipped=True):
  buffer = io.BytesIO()
  torch.save(as_torch(arrays), buffer, _use_new_zipfile_serialization=zipped)
  return buffer.getvalue()


def gguf_bytes(folder, arrays):
  writer = gguf.GGUFWriter(folder / "written.gguf", "llama")
  writer.add_context_length(128)
  writer.add_embedding_length(64)
  writer.add_block_count(1)
  writer.add_feed_forward_length(96)
  writer.add_head_count(4)
  writer.add_layer_norm_rms_eps(1e-5)
  for (name, shape), array in zip(GGUF_NAMES.items(), arrays.values()):
    filled = np.ones(shape, array.dtype)
    filled.reshape(-1)[-1] = array.reshape(-1)[-1]
    writer.add_tensor(name, filled)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return (folder / "written.gguf").read_bytes()


FILES = ["safetensors", "torch", "torch-legacy", "gguf", "ctranslate2"]
FOLDERS = ["shards", "deepspeed"]


@pytest.fixture
def write(tmp_path, write_safetensors):
  """Writes VALUES in a format: (path to open, the file to damage)."""

  def written(kind, arrays=VALUES):
    if kind == "safetensors":
      file = write_safetensors(tmp_path / "a.safetensors", arrays)
    elif kind == "gguf":
      float32 = {n: a if a.dtype.kind == "i" else a.astype(np.float32) for n, a in arrays.items()}
      (file := tmp_path / "a.gguf").write_bytes(gguf_bytes(tmp_path, float32))
    elif kind == "ctranslate2":
      (file := tmp_path / "a.bin").write_bytes(ctranslate2_bytes(arrays))
    elif kind == "shards":
      folder = tmp_path / "shards"
      folder.mkdir(exist_ok=True)
      shards = {name: f"model-{i}.safetensors" for i, name in enumerate(arrays)}
      for name, shard in shards.items():
        write_safetensors(folder / shard, {name: arrays[name]})
      (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
      return folder, folder / "model-1.safetensors"
    elif kind == "deepspeed":
      params = {n: t.float() for n, t in as_torch(arrays).items()}
      folder = write_zero(tmp_path / "zero", 2, 2, params)
      return folder, folder / "global_step20" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    else:
      (file := tmp_path / "a.pt").write_bytes(torch_bytes(arrays, kind == "torch"))
    return file, file

  return written


def read_all(path):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns of odd pickles before it refuses them
    source = open_source(path)
    for name in source.tensors:
      source.read(name)
  return source


def refusal(path, file):
  """The message of the error, which is one line about the file."""
  with pytest.raises(ReadError) as error:
    read_all(path)
  said = str(error.value)
  assert file.name in said and "\n" not in said and len(said) < 500, said
  return said


@pytest.mark.parametrize("kind", FILES + FOLDERS)
def test_whole_files_are_read(write, kind):
  assert read_all(write(kind)[0]).tensors


@pytest.mark.parametrize("kind", FILES + FOLDERS)
def test_a_cut_file_is_to_be_copied_again(write, kind):
  path, file = write(kind)
  whole = file.read_bytes()
  for length in (0, 1, 4, 8, 100, len(whole) // 2, len(whole) - 1):
    file.write_bytes(whole[:length])
    said = refusal(path, file)
    assert said.endswith("copy it again")


@pytest.mark.parametrize("kind", FILES + FOLDERS)
def test_a_git_lfs_pointer_is_to_be_pulled(write, kind):
  path, file = write(kind)
  file.write_bytes(POINTER)
  assert refusal(path, file).endswith("a Git LFS pointer: run git lfs pull")


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_missing_file_is_named(write, kind):
  path, file = write(kind)
  file.unlink()
  with pytest.raises(ReadError, match=r"(copy it too|download them)$"):
    open_source(path)


@pytest.mark.parametrize("kind", FILES + ["shards"])
def test_integer_weights_are_refused_with_the_release_to_use(write, kind):
  path, file = write(kind, {"norm.weight": VALUES["norm.weight"], "a.weight": np.ones(4, np.int8)})
  said = refusal(path, file)
  assert "a.weight" in said or "output_norm.weight" in said
  assert "float16" in said or "F16" in said


@pytest.mark.parametrize("kind", FILES + FOLDERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted(write, kind, value):
  arrays = {name: array.copy() for name, array in VALUES.items()}
  arrays["proj.weight"].reshape(-1)[-1] = value
  path, _ = write(kind, arrays)
  with pytest.raises(ReadError, match=r"tensor '[\w.]+' has 1 of (12|64) values that are NaN"):
    read_all(path)


@pytest.mark.parametrize("kind", FILES + FOLDERS)
def test_damaged_bytes_never_raise_anything_else(write, kind):
  path, file = write(kind)
  whole = file.read_bytes()
  start = 4 if kind == "ctranslate2" else 0  # these four bytes tell the format of a .bin file
  rng, refused, cases = random.Random(7), 0, 100 if kind in FOLDERS else 300
  for case in range(cases):
    damaged = bytearray(whole)
    if case % 3:
      for _ in range(rng.randint(1, 3)):
        damaged[rng.randrange(start, min(len(damaged), 700))] = rng.randrange(256)
    else:
      del damaged[rng.randrange(start, len(damaged)) :]
    file.write_bytes(damaged)
    try:
      read_all(path)
    except ReadError as error:
      refused += 1
      assert file.name in str(error) or file.parent.name in str(error)
      assert "\n" not in str(error)
  assert cases / 3 < refused <= cases
