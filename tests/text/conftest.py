import importlib.util
from pathlib import Path

import pytest


def _load(name):
  spec = importlib.util.spec_from_file_location(Path(name).stem, Path(__file__).with_name(name))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory):
  """A folder with Qwen2's real tokenizer: 151,643 byte-pair tokens and 3 special ones."""
  return _load("qwen.py").write_qwen2_folder(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def spm_training():
  """The module that trains small SentencePiece models."""
  return _load("spm_training.py")
