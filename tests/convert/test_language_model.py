"""Qwen2 and LLaMA folders of transformers: the same logits here, the same bits back."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from convert.readers import open_source
from mooer_jax import checkpoint
from mooer_jax.config import part_from_json
from mooer_jax.decoders.llm import LLM
from tests.convert.folders_of import saved_llm


def our_logits(folder, tokens_BS):
  loaded = checkpoint.load(folder, dtype="float32")
  config = part_from_json(loaded.config["decoder"], "decoder")
  variables = {"params": loaded.params["decoder"]}
  module = LLM(config)
  inputs_BSD = module.apply(variables, tokens_BS, method=LLM.embed_tokens)
  hidden_BSD, _ = module.apply(variables, inputs_BSD, jnp.ones(tokens_BS.shape, bool))
  return np.asarray(module.apply(variables, hidden_BSD, method=LLM.logits))


def their_logits(module, tokens_BS):
  with torch.no_grad():
    return module(input_ids=torch.tensor(tokens_BS)).logits.float().numpy()


def assert_same_logits(folder, module):
  tokens_BS = np.random.default_rng(0).integers(0, 61, (2, 11))
  ours, theirs = our_logits(folder, tokens_BS), their_logits(module, tokens_BS)
  # Float32 rounding in another order of summation.
  assert np.abs(ours - theirs).max() / theirs.std() <= 1e-4


def bits(source):
  return {
    name: (t.shape, t.dtype.name, source.read(name).tobytes()) for name, t in source.tensors.items()
  }


def assert_same_tensors(a, b):
  of_a, of_b = bits(open_source(a)), bits(open_source(b))
  assert of_a.keys() == of_b.keys()
  assert [name for name in of_a if of_a[name] != of_b[name]] == []


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["10GB", "30KB"])
def test_logits_are_those_of_transformers_and_the_export_is_the_source(
  tmp_path, kind, tied, shard
):
  module, source = saved_llm(tmp_path / "hf", kind, tie_word_embeddings=tied, shard=shard)
  assert (source / "model.safetensors").exists() == (shard == "10GB")
  report = import_checkpoint(kind, source, tmp_path / "ours")
  assert report.ignored == ()
  assert_same_logits(tmp_path / "ours", module)
  export_checkpoint(kind, tmp_path / "ours", tmp_path / "back", shard_bytes=40_000)
  assert_same_tensors(source, tmp_path / "back")
  again = type(module).from_pretrained(tmp_path / "back", dtype=torch.float32)
  tokens_BS = np.arange(12).reshape(2, 6)
  assert np.array_equal(their_logits(again, tokens_BS), their_logits(module, tokens_BS))
