import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory):
  """A folder with Qwen2's real tokenizer: 151,643 byte-pair tokens and 3 special ones."""
  spec = importlib.util.spec_from_file_location("qwen_files", Path(__file__).with_name("qwen.py"))
  qwen = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(qwen)
  return qwen.write_qwen2_folder(tmp_path_factory.mktemp("qwen2"))
