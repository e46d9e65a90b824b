"""Qwen2 and LLaMA folders of transformers: the same logits here, the same bits back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.core import folders
from convert.core.errors import ConversionError
from convert.core.options import Options
from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from convert.readers import ReadError, open_source
from mooer_jax import checkpoint, tree
from mooer_jax.config import part_from_json
from mooer_jax.decoders.llm import LLM
from mooer_jax.sharding import make_mesh, param_shardings
from mooer_jax.text.tokenizer import Tokenizer
from tests.convert.folders_of import saved_llm
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding


def our_logits(folder):
  """(Function of params and tokens [B, S], the folder's params)."""
  loaded = checkpoint.load(folder, dtype="float32")
  module = LLM(part_from_json(loaded.config["decoder"], "decoder"))

  @jax.jit
  def logits(params, tokens_BS):
    variables = {"params": params}
    inputs_BSD = module.apply(variables, tokens_BS, method=LLM.embed_tokens)
    hidden_BSD, _ = module.apply(variables, inputs_BSD, jnp.ones(tokens_BS.shape, bool))
    return module.apply(variables, hidden_BSD, method=LLM.logits)

  return logits, loaded.params["decoder"]


def their_logits(module, tokens_BS):
  with torch.no_grad():
    return module(input_ids=torch.tensor(tokens_BS)).logits.float().numpy()


def assert_same_logits(folder, *modules):
  """Compares our logits with those of each module."""
  tokens_BS = np.random.default_rng(0).integers(0, 61, (2, 11))
  logits, params = our_logits(folder)
  # The longest sums, over the MLP, in each of two layers.
  bound = rounding(2 * 56, condition(logits, params, tokens_BS))
  ours = logits(params, tokens_BS)
  for module in modules:
    assert_within(ours, their_logits(module, tokens_BS), bound)


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
def test_logits_are_those_of_transformers_and_the_export_is_the_source(tmp_path, kind, tied, shard):
  module, source = saved_llm(tmp_path / "hf", kind, tie_word_embeddings=tied, shard=shard)
  assert (source / "model.safetensors").exists() == (shard == "10GB")
  report = import_checkpoint(kind, source, tmp_path / "ours")
  assert report.ignored == ()
  export_checkpoint(kind, tmp_path / "ours", tmp_path / "back", shard_bytes=40_000)
  assert_same_tensors(source, tmp_path / "back")
  again = type(module).from_pretrained(tmp_path / "back", dtype=torch.float32)
  assert_same_logits(tmp_path / "ours", module, again)


@pytest.mark.parametrize(
  "change",
  [{"rms_norm_eps": 2e-5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}],
  ids=str,
)
def test_a_setting_that_is_lost_changes_the_logits(tmp_path, change):
  _, source = saved_llm(tmp_path / "hf", "qwen2")
  other, _ = saved_llm(tmp_path / "other", "qwen2", **change)
  import_checkpoint("qwen2", source, tmp_path / "ours")
  with exceeds_the_bound():
    assert_same_logits(tmp_path / "ours", other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_stored_dtype_stays(tmp_path, dtype):
  _, source = saved_llm(tmp_path / "hf", "qwen2", dtype=getattr(torch, dtype))
  import_checkpoint("qwen2", source, tmp_path / "ours")
  leaves = tree.flatten(checkpoint.describe(tmp_path / "ours").params).values()
  assert {leaf.dtype.name for leaf in leaves} == {dtype}
  export_checkpoint("qwen2", tmp_path / "ours", tmp_path / "back")
  assert_same_tensors(source, tmp_path / "back")


def test_scaled_rope_is_refused_beside_plain_parameters(tmp_path):
  _, source = saved_llm(tmp_path / "hf", "qwen2")
  config = json.loads((source / "config.json").read_text())
  assert config["rope_parameters"]["rope_type"] == "default"
  config["rope_scaling"] = {"type": "linear", "factor": 4.0}
  (source / "config.json").write_text(json.dumps(config))
  with pytest.raises(ConversionError, match="rope_scaling=.*only unscaled rotary positions"):
    import_checkpoint("qwen2", source, tmp_path / "ours")


def test_heads_of_another_width_than_their_share(tmp_path):
  module, source = saved_llm(tmp_path / "hf", "llama", head_dim=6)
  import_checkpoint("llama", source, tmp_path / "ours")
  shutil.rmtree(tmp_path / "ours" / "source")  # so that config.json is written anew
  export_checkpoint("llama", tmp_path / "ours", tmp_path / "back")
  again = type(module).from_pretrained(tmp_path / "back", dtype=torch.float32)
  assert_same_logits(tmp_path / "ours", module, again)


def as_binary(source, folder, change=lambda state: None):
  """The same model as pytorch_model.bin, with a changed state dict."""
  state = {name: torch.tensor(source_tensor) for name, source_tensor in arrays(source).items()}
  change(state)
  folder.mkdir()
  for path in source.glob("*.json"):
    if "index" not in path.name:
      shutil.copy(path, folder)
  torch.save(state, folder / "pytorch_model.bin")
  return folder


def arrays(folder):
  opened = open_source(folder)
  return {name: opened.read(name) for name in opened.tensors}


def test_a_tied_head_that_is_saved_all_the_same(tmp_path):
  module, source = saved_llm(tmp_path / "hf", "qwen2", tie_word_embeddings=True)

  def add(state, head):
    state["lm_head.weight"] = head(state["model.embed_tokens.weight"])
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)

  equal = as_binary(source, tmp_path / "equal", lambda s: add(s, torch.clone))
  report = import_checkpoint("qwen2", equal, tmp_path / "ours")
  assert report.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
  assert_same_logits(tmp_path / "ours", module)
  export_checkpoint("qwen2", tmp_path / "ours", tmp_path / "back")
  exported = arrays(tmp_path / "back")
  np.testing.assert_array_equal(exported["lm_head.weight"], exported["model.embed_tokens.weight"])
  assert exported.keys() == arrays(source).keys() | {"lm_head.weight"}

  other = as_binary(source, tmp_path / "other", lambda s: add(s, lambda embedding: embedding + 1))
  with pytest.raises(ConversionError, match="lm_head.weight differs from model.embed_tokens"):
    import_checkpoint("qwen2", other, tmp_path / "out")


def test_everything_that_does_not_fit_is_told_at_once(tmp_path):
  _, source = saved_llm(tmp_path / "hf", "qwen2")

  def spoil(state):
    del state["model.norm.weight"]
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    state["model.layers.0.mlp.down_proj.weight"] = torch.zeros(56, 40)  # the other way round
    state["model.layers.2.input_layernorm.weight"] = torch.zeros(40)
    state["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(40)
    state["lm_head.weight"] = state["lm_head.weight"].double()

  folder = as_binary(source, tmp_path / "bad", spoil)
  with pytest.raises(ConversionError) as caught:
    import_checkpoint("qwen2", folder, tmp_path / "out")
  lines = str(caught.value).splitlines()
  assert "7 problems" in lines[0] and len(lines) == 8
  for part in (
    "model.norm.weight [40] is missing (decoder/final_norm/scale)",
    "model.layers.1.mlp.up_proj.weight [56, 40] is missing",
    "self_attn.q_proj.bias has shape [3], the model needs [40]",
    "down_proj.weight has shape [56, 40], the model needs [40, 56]",
    "model.layers.2.input_layernorm.weight [40] is unmapped: the model has no such part",
    "self_attn.o_proj.bias [40] is unmapped: no rule knows this name",
    "lm_head.weight has dtype float64",
  ):
    assert any(part in line for line in lines), part
  assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "hf"]


def test_a_value_that_is_not_finite_is_found_before_anything_is_written(tmp_path, monkeypatch):
  monkeypatch.setattr(folders, "save", None)
  _, source = saved_llm(tmp_path / "hf", "qwen2")

  def spoil(state):
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan

  folder = as_binary(source, tmp_path / "bad", spoil)
  with pytest.raises(ReadError, match=r"/bad/.*\.bin: tensor .*layers.1.mlp.up_proj.weight.* NaN"):
    import_checkpoint("qwen2", folder, tmp_path / "out")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "hf"]


def test_overwriting_replaces_an_earlier_result_and_nothing_else(tmp_path):
  _, source = saved_llm(tmp_path / "hf", "llama")
  ours, out = tmp_path / "ours", tmp_path / "out"
  runs = (
    lambda target, **o: import_checkpoint("llama", source, target, options=Options(**o)),
    lambda target, **o: export_checkpoint("llama", ours, target, **o),
  )
  runs[0](ours)
  for number, run in enumerate(runs):
    target = tmp_path / f"again{number}"
    run(target)
    with pytest.raises(FileExistsError, match="exists.* --overwrite"):
      run(target)
    run(target, overwrite=True)
  out.mkdir()
  (out / "thesis.txt").write_text("mine")
  for run in runs:
    with pytest.raises(FileExistsError, match=r"not a checkpoint|other files, such as thesis\.txt"):
      run(out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_part_of_what_is_read_is_never_replaced(tmp_path):
  _, source = saved_llm(tmp_path / "hf", "llama")
  ours = tmp_path / "ours"
  import_checkpoint("llama", source, ours)
  with pytest.raises(ValueError, match="would replace a part of"):
    export_checkpoint("llama", ours, ours / "weights", overwrite=True)
  (source / "part").mkdir()
  with pytest.raises(ValueError, match="would replace a part of"):
    import_checkpoint("llama", source, source / "part", options=Options(overwrite=True))


def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path):
  _, source = saved_llm(tmp_path / "hf", "llama")
  (file,) = source.glob("*.safetensors")
  file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
  with pytest.raises(ReadError, match="a Git LFS pointer: run git lfs pull"):
    import_checkpoint("llama", source, tmp_path / "out")


def test_tokenizer_and_generation_config_travel(tmp_path):
  _, source = saved_llm(tmp_path / "hf", "qwen2")
  Tokenizer.from_characters("abc").save(source)
  (source / "generation_config.json").write_text('{"top_k": 3}')
  (source / "README.md").write_text("not carried")
  import_checkpoint("qwen2", source, tmp_path / "ours")
  assert Tokenizer.from_folder(tmp_path / "ours" / "tokenizer").encode("cab") == [2, 0, 1]
  export_checkpoint("qwen2", tmp_path / "ours", tmp_path / "back")
  names = {path.name for path in source.iterdir()} - {"README.md"}
  assert {path.name for path in (tmp_path / "back").iterdir()} == names
  for name in names - {"model.safetensors", "config.json"}:
    assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_another_kind_is_named(tmp_path):
  _, source = saved_llm(tmp_path / "hf", "qwen2")
  with pytest.raises(ConversionError, match="model_type='qwen2' is not the kind 'llama'"):
    import_checkpoint("llama", source, tmp_path / "out")
  import_checkpoint("qwen2", source, tmp_path / "ours")
  with pytest.raises(ConversionError, match="kind qwen2, not llama"):
    export_checkpoint("llama", tmp_path / "ours", tmp_path / "out")
  with pytest.raises(ConversionError, match="no sanm encoder"):
    export_checkpoint("paraformer", tmp_path / "ours", tmp_path / "out")
  with pytest.raises(ValueError, match="describes a part of a speech LLM"):
    export_checkpoint("mooer", tmp_path / "ours", tmp_path / "out")
  with pytest.raises(ValueError, match="--task has no effect on the kind 'qwen2'"):
    import_checkpoint("qwen2", source, tmp_path / "out", options=Options(task="asr"))


def test_it_restores_sharded_over_a_mesh(tmp_path):
  module, source = saved_llm(tmp_path / "hf", "qwen2", vocab_size=64)
  import_checkpoint("qwen2", source, tmp_path / "ours")
  mesh = make_mesh(data=1, fsdp=2, tensor=4)
  described = checkpoint.describe(tmp_path / "ours").params
  shardings = param_shardings(mesh, described, fsdp_min_size=1)
  loaded = tree.flatten(checkpoint.load(tmp_path / "ours", shardings=shardings).params)
  embedding = loaded["decoder/embed/embedding"]
  assert embedding.addressable_shards[0].data.shape == (16, 20)
  expected = module.state_dict()["model.embed_tokens.weight"].numpy()
  np.testing.assert_array_equal(embedding, expected)
  assert not checkpoint.find_damage(tmp_path / "ours")
