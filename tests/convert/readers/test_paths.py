"""Folders and indexes: every tensor from just the shard that the index names."""

import json

import numpy as np
import pytest
import torch

from convert.readers import ReadError, open_source


def _write_sharded(folder, tensors, write_safetensors, *, change=None):
  """Two shards and their index; `change(weight_map)` may spoil it."""
  names = list(tensors)
  shards = {
    "model-00001-of-00002.safetensors": names[:3],
    "model-00002-of-00002.safetensors": names[3:],
  }
  weight_map = {}
  for shard, held in shards.items():
    write_safetensors(folder / shard, {name: tensors[name] for name in held})
    weight_map.update(dict.fromkeys(held, shard))
  weight_map = change(weight_map) if change else weight_map
  index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


def test_shards_of_safetensors(tmp_path, tensors, write_safetensors, same_bits):
  _write_sharded(tmp_path, tensors, write_safetensors)
  source = open_source(tmp_path)
  same_bits(source, tensors)
  assert len({tensor.file for tensor in source.tensors.values()}) == 2
  same_bits(open_source(tmp_path / "model.safetensors.index.json"), tensors)


def test_shards_of_torch(tmp_path, tensors, to_torch, same_bits):
  weight_map = {}
  for i, name in enumerate(tensors):
    shard = f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin"
    weight_map[name] = shard
  for shard in sorted(set(weight_map.values())):
    held = {name: tensors[name] for name in tensors if weight_map[name] == shard}
    torch.save(to_torch(held), tmp_path / shard)
  (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
  same_bits(open_source(tmp_path), tensors)


def test_shards_that_transformers_writes(tmp_path):
  from transformers import Qwen2Config, Qwen2ForCausalLM

  config = Qwen2Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
  )
  model = Qwen2ForCausalLM(config).to(torch.bfloat16)
  model.save_pretrained(tmp_path, max_shard_size="12KB")
  source = open_source(tmp_path)
  assert len({tensor.file for tensor in source.tensors.values()}) > 2
  state = model.state_dict()
  assert set(source.tensors) == set(state)
  for name, value in state.items():
    np.testing.assert_array_equal(source.read(name).view(np.int16), value.view(torch.int16).numpy())


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda m: {**m, "lm_head.weight": "model-00003-of-00003.safetensors"},
      "1 of 3 shards are missing: model-00003-of-00003.safetensors",
    ),
    (
      lambda m: {**m, "lm_head.weight": "model-00001-of-00002.safetensors"},
      "'lm_head.weight' should be in model-00001",
    ),
    (
      lambda m: {**m, "mask": "model-00001-of-00002.safetensors"},
      "'mask' should be in model-00001",
    ),
    (lambda m: {n: s for n, s in m.items() if n != "mask"}, "'mask' of .* is not in the index"),
    (
      lambda m: {**m, "mask": "../../x.safetensors"},
      "'mask' cannot be in '../../x.safetensors'",
    ),
    (lambda m: {**m, "mask": "/etc/x.safetensors"}, "beside the index"),
    (lambda m: {**m, "mask": "sub/x.safetensors"}, "beside the index"),
    (lambda m: {**m, "mask": "..\\x.safetensors"}, "beside the index"),
    (
      lambda m: {
        **m,
        "mask": "..",
      },
      "beside the index",
    ),
    (lambda m: {**m, "mask": "passwd"}, "weight files beside the index"),
    (lambda m: {**m, "mask": 3}, "beside the index"),
    (lambda m: {}, "no weight_map"),
    (lambda m: list(m), "no weight_map"),
  ],
)
def test_an_index_that_is_wrong(tmp_path, tensors, write_safetensors, change, message):
  _write_sharded(tmp_path, tensors, write_safetensors, change=change)
  with pytest.raises(ReadError, match=rf"index\.json: .*{message}"):
    open_source(tmp_path)


@pytest.mark.parametrize(
  "text, message",
  [
    ("{", "not JSON"),
    ("[]", "object"),
  ],
)
def test_an_index_that_is_no_index(tmp_path, text, message):
  (tmp_path / "model.safetensors.index.json").write_text(text)
  with pytest.raises(ReadError, match=message):
    open_source(tmp_path)


def test_a_tensor_in_two_shards(tmp_path, tensors, write_safetensors):
  _write_sharded(tmp_path, tensors, write_safetensors)
  again = {name: tensors[name] for name in ["mask", "embed.weight", "steps", "scale", "none"]}
  write_safetensors(tmp_path / "model-00002-of-00002.safetensors", again)
  with pytest.raises(ReadError, match="'embed.weight' is there also in model-00001"):
    open_source(tmp_path)


def test_the_usual_file_is_taken_and_the_other_named(
  tmp_path, tensors, to_torch, same_bits, write_safetensors
):
  torch.save({"other": torch.ones(2)}, tmp_path / "pytorch_model.bin")
  torch.save({"lr": 1}, tmp_path / "training_args.bin")
  write_safetensors(tmp_path / "model.safetensors", tensors)
  source = open_source(tmp_path)
  same_bits(source, tensors)
  assert source.notes == ("model.safetensors is read, pytorch_model.bin is not",)


@pytest.mark.parametrize("model", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("adapter", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_model_and_a_lora_in_one_folder(tmp_path, model, adapter):
  for name in (model, adapter):
    (tmp_path / name).touch()
  with pytest.raises(ReadError, match=rf"model \({model}\) and a LoRA \({adapter}\) in one"):
    open_source(tmp_path)


def test_a_folder_with_one_file(tmp_path, tensors, to_torch, same_bits):
  torch.save(to_torch(tensors), tmp_path / "paraformer-encoder.pth")
  (tmp_path / "am.mvn").write_text("")
  same_bits(open_source(tmp_path), tensors)


def test_paths_without_weights(tmp_path, tensors, to_torch):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    open_source(tmp_path / "nowhere")
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ReadError, match="no weights in it; looked for model.safetensors"):
    open_source(tmp_path)
  with pytest.raises(ReadError, match="unknown extension '.json'"):
    open_source(tmp_path / "config.json")
  for name in ("a.pt", "b.pt"):
    torch.save(to_torch(tensors), tmp_path / name)
  with pytest.raises(ReadError, match="2 weight files and no index: a.pt, b.pt"):
    open_source(tmp_path)


def test_only_torch_files_have_parts(tmp_path, tensors, write_safetensors):
  with pytest.raises(ReadError, match="a.safetensors: must be a PyTorch file .*entry 'model'"):
    open_source(write_safetensors(tmp_path / "a.safetensors", tensors), "model")
