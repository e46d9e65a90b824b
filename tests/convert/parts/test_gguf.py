"""GGUF files become checkpoints with the logits of the model they were made of."""

import string

import gguf
import pytest
import torch

from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from mooer_jax.text.tokenizer import Tokenizer
from tests.convert.parts.test_language_model import assert_same_logits, assert_same_tensors
from tests.convert.readers.test_gguf_file import _model, _write

LETTERS = string.ascii_letters + string.digits[:9] + "."
TOKENS = ["<eos>", "ab", *LETTERS]
assert len(TOKENS) == 64


def add_tokenizer(writer):
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("gpt-2")
  writer.add_token_list(TOKENS)
  writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 63)
  writer.add_token_merges(["a b"])
  writer.add_eos_token_id(0)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_logits_are_those_of_the_model(tmp_path, kind):
  module = _model(kind)
  file = tmp_path / "model.gguf"
  _write(file, kind, module.state_dict(), spoil=add_tokenizer)
  import_checkpoint(kind, file, tmp_path / "ours")
  assert_same_logits(tmp_path / "ours", module)
  tokenizer = Tokenizer.from_folder(tmp_path / "ours" / "tokenizer")
  assert (tokenizer.encode("abc"), tokenizer.eos_id) == ([1, 4], 0)

  export_checkpoint(kind, tmp_path / "ours", tmp_path / "hf")
  again = type(module).from_pretrained(tmp_path / "hf", dtype=torch.float32)
  assert again.generation_config.eos_token_id == 0
  module.save_pretrained(tmp_path / "original")
  assert_same_tensors(tmp_path / "original", tmp_path / "hf")
