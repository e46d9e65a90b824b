"""`convert quantize`: a checkpoint for decoding whose LLM has int8 matrices."""

import dataclasses

import numpy as np
import pytest

import mooer_jax
from convert.main import main
from mooer_jax import checkpoint, cli, tree
from mooer_jax.config import to_json
from mooer_jax.generation.loading import load_model
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.sharding import make_mesh
from mooer_jax.text.tokenizer import Tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def config():
  config = tiny.answering_config(
    vocab_size=12, chat_template="bare", prompts=(("asr", "<|transcribe|>"),)
  )
  decoder = dataclasses.replace(config.decoder, tie_word_embeddings=False, lora_rank=4)
  return dataclasses.replace(config, decoder=decoder)


def save(folder, config, params, **more):
  tokenizer = Tokenizer.from_characters("0123456789", ("<|transcribe|>", "<|end|>"), eos="<|end|>")
  options = dict(config_json=to_json(config), tokenizer=tokenizer.save)
  return checkpoint.save(folder, params=params, generation={"max_new_tokens": 6}, **options, **more)


@pytest.fixture(scope="module")
def tuned(config, tmp_path_factory):
  """A fine-tune that holds the LoRA alone, beside its base."""
  folder = tmp_path_factory.mktemp("tuned")
  leaves = tree.flatten(tiny.init(config))
  lora = {path: leaves.pop(path) for path in list(leaves) if "lora_" in path}
  plain = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, lora_rank=0))
  base = save(folder / "base", plain, tree.unflatten(leaves))
  return save(folder / "tuned", config, tree.unflatten(lora), base=base)


@pytest.fixture(scope="module")
def int8(tuned):
  out = tuned.with_name("int8")
  assert main(["quantize", str(tuned), str(out)]) == 0
  return out


def test_it_is_what_loading_rounds_to(tuned, int8):
  rounded = load_model(tuned, ExecutionConfig(quantization="int8")).params
  for compute in (ExecutionConfig(), ExecutionConfig(quantization="int8")):
    found = tree.flatten(load_model(int8, compute).params)
    for path, leaf in tree.flatten(rounded).items():
      np.testing.assert_array_equal(found.pop(path), leaf, err_msg=path)
    assert not found
  kernels = [path for path in tree.flatten(rounded) if path.endswith("_int8")]
  assert len(kernels) == 2 * 7 + 1


def test_the_texts_are_those_of_the_rounded_weights_also_on_a_mesh(tuned, int8, clips):
  audio = [clip.path for clip in clips[:3]]
  rounded = mooer_jax.Transcriber.from_checkpoint(tuned, quantization="int8")
  expected = [result.text for result in rounded.transcribe(audio)]
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  for options in ({}, {"mesh": mesh}):
    ours = mooer_jax.Transcriber.from_checkpoint(int8, **options)
    assert [result.text for result in ours.transcribe(audio)] == expected
  assert len(set(expected)) > 1


def test_the_scale_of_the_lora_is_chosen(tuned, int8, tmp_path, capsys):
  base = load_model(tuned, ExecutionConfig(quantization="int8"), lora_scale=0.5).params
  assert main(["quantize", str(tuned), str(tmp_path / "half"), "--lora-scale", "0.5"]) == 0
  assert "int8" in capsys.readouterr().out
  half = tree.flatten(load_model(tmp_path / "half", ExecutionConfig()).params)
  for path, leaf in tree.flatten(base).items():
    np.testing.assert_array_equal(half[path], leaf, err_msg=path)
  assert main(["quantize", str(tuned.with_name("base")), "x", "--lora-scale", "1"]) == 2
  assert "--lora-scale 1 has no effect" in capsys.readouterr().err
  assert main(["quantize", str(tuned), "x", "--lora-scale", "nan"]) == 2
  assert "must be a finite number" in capsys.readouterr().err


def test_it_is_whole_and_refused_where_weights_must_be_exact(int8, clips, tmp_path, capsys):
  assert cli.main(["checkpoint", "verify", str(int8)]) == 0
  message = "was rounded to int8, for decoding only; use the checkpoint that it was made from"
  for command in (
    ["export", "mooer", str(int8), str(tmp_path / "out")],
    ["quantize", str(int8), str(tmp_path / "out")],
    ["join", str(tmp_path / "out"), str(int8)],
    ["verify", "mooer", str(tmp_path), str(int8), "--audio", str(clips[0].path)],
  ):
    assert main(command) == 2
    assert message in capsys.readouterr().err
  assert main(["quantize", str(int8), str(int8)]) == 2
  with pytest.raises(checkpoint.CheckpointError, match="rounded to int8"):
    checkpoint.check_leaves(checkpoint.describe(int8), {"decoder": {}})
