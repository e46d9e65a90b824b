"""A release in MooER's layout: the same logits here as from its parts in PyTorch, the same bits."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.core.errors import ConversionError
from convert.core.options import Options
from convert.exporting import export_checkpoint
from convert.families import mooer
from convert.importing import import_checkpoint
from convert.readers import ReadError
from mooer_jax import checkpoint, speech_llm, tree
from mooer_jax.config import from_json
from tests.convert.folders_of import vary
from tests.convert.parts.test_language_model import assert_same_tensors
from tests.convert.releases import release
from tests.numerics import assert_within, condition, exceeds_the_bound, rounded_to, rounding
from tests.tiny import SANM

FILES = ("paraformer_encoder/paraformer-encoder.pth", "asr/adapter_project.pt", "asr/lora_weights",
         "Qwen2-tiny")  # fmt: skip


def their_hidden(modules, features_TF, tokens_S):
  """Logits of the PyTorch parts in a row: [speech, tokens]."""
  with torch.no_grad():
    heard = torch.tensor(features_TF)[None]
    frames = modules["encoder"](heard, torch.tensor([len(features_TF)]))[0]
    even = frames[:, : frames.shape[1] // 2 * 2]
    joined = even.reshape(1, -1, 2 * frames.shape[2])
    hidden = torch.relu(modules["adapter"]["linear1"](joined))
    speech = modules["adapter"]["linear2"](hidden)
    words = modules["llm"].get_input_embeddings()(torch.tensor(tokens_S)[None])
    return modules["llm"](inputs_embeds=torch.cat([speech, words], 1)).logits[0].numpy()


def assert_same_model(folder, modules, cmvn):
  loaded = checkpoint.load(folder, dtype="float32")
  config = from_json(loaded.config)
  rng = np.random.default_rng(0)
  raw_TF = rng.normal(size=(9, SANM.input_width)).astype(np.float32)
  tokens_S = rng.integers(0, 60, 5)
  shift, scale = cmvn
  expected = their_hidden(modules, ((raw_TF + shift) * scale).astype(np.float32), tokens_S)
  batch = speech_llm.Batch(
    features=(raw_TF[None],),
    frames=(np.array([len(raw_TF)]),),
    prefix_BS=np.zeros((1, 0), np.int32),
    suffix_BS=tokens_S[None],
    labels_BS=np.full((1, 1), -1),
  )

  @jax.jit
  def ours(params, batch):
    inputs_BSD, valid_BS = speech_llm.prompt(params, batch, config)
    hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, valid_BS, config)
    return speech_llm.logits(params, hidden_BSD, config)[0]

  # The longest sums, over a frame's features or the MLP, in three encoder and two decoder layers.
  bound = rounding(5 * 56, condition(ours, loaded.params, batch))
  assert_within(ours(loaded.params, batch), expected, bound)
  with exceeds_the_bound():
    rounded = rounded_to(jnp.float8_e4m3fn, loaded.params)
    assert_within(ours(rounded, batch), expected, bound)


def cmvn_of(folder):
  from mooer_jax.audio.cmvn import read_mvn

  return read_mvn(folder / "paraformer_encoder" / "am.mvn")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mooer") / "release"
  return folder, release(folder)


@pytest.mark.parametrize("merged", [False, True], ids=["lora-apart", "lora-merged"])
def test_logits_are_those_of_the_parts_in_pytorch(released, tmp_path, merged):
  folder, modules = released
  options = Options(task="asr", merge_lora=merged)
  report = import_checkpoint("mooer", folder, tmp_path / "ours", options=options)
  assert report.ignored == ("decoder.embed.0.weight",)
  assert_same_model(tmp_path / "ours", modules, cmvn_of(folder))
  export_checkpoint("mooer", tmp_path / "ours", tmp_path / "back")
  options = Options(task="asr", lora=not merged)
  import_checkpoint("mooer", tmp_path / "back", tmp_path / "again", options=options)
  first, second = (
    tree.flatten(checkpoint.load(tmp_path / name).params) for name in ("ours", "again")
  )
  assert first.keys() == second.keys()
  for path, leaf in first.items():
    assert leaf.dtype == second[path].dtype and jnp.array_equal(leaf, second[path]), path


@pytest.mark.parametrize("tuned", [False, True], ids=["frozen-encoder", "tuned-encoder"])
def test_the_export_is_the_release(tmp_path, tuned):
  folder = tmp_path / "release"
  modules = release(folder, tuned_encoder=tuned, extra=False, dtype=torch.bfloat16)
  report = import_checkpoint("mooer", folder, tmp_path / "ours", options=Options(task="asr"))
  assert len(report.ignored) == (15 if tuned else 0)  # a layer and the last norm
  modules["llm"] = modules["llm"].float()
  assert_same_model(tmp_path / "ours", modules, cmvn_of(folder))
  export_checkpoint("mooer", tmp_path / "ours", tmp_path / "back")
  for name in FILES[1:] if tuned else FILES:
    assert_same_tensors(folder / name, tmp_path / "back" / name)
  for a, b in zip(cmvn_of(folder), cmvn_of(tmp_path / "back")):
    np.testing.assert_array_equal(a, b)
  kept = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
  for name in (*(f"Qwen2-tiny/{n}" for n in kept), "asr/lora_weights/adapter_config.json"):
    before, after = (json.loads((f / name).read_text()) for f in (folder, tmp_path / "back"))
    assert before == after, name


def test_what_travels_in_the_checkpoint(released, tmp_path):
  folder, _ = released
  shutil.copytree(folder / "asr", folder / "asr_ast_mtl", dirs_exist_ok=True)
  import_checkpoint("mooer", folder, tmp_path / "ours", options=Options(task="asr_ast_mtl"))
  about = checkpoint.describe(tmp_path / "ours")
  config = from_json(about.config)
  assert config.prompts == (("asr_ast_mtl", "Translate speech to english text. "),)
  assert (config.decoder.lora_rank, config.decoder.lora_scale) == (4, 4.0)
  tokens = json.loads((about.tokenizer / "tokenizer.json").read_text())
  [eos] = [t["id"] for t in tokens["added_tokens"] if t["content"] == "<|im_end|>"]
  assert about.generation == {
    "num_beams": 4,
    "length_penalty": 0.8,
    "max_new_tokens": 200,
    "min_length": 1,
    "repetition_penalty": 1.0,
    "eos_token_id": [eos],
    "sequence_bias": [[eos, -0.2]],
  }


def test_the_llm_may_lie_elsewhere(released, tmp_path):
  folder, _ = released
  shutil.copytree(folder, tmp_path / "release", ignore=lambda *_: ["Qwen2-tiny"])
  with pytest.raises(ConversionError, match="one folder with a config.json, has none; pass --llm"):
    import_checkpoint("mooer", tmp_path / "release", tmp_path / "ours", options=Options(task="asr"))
  options = Options(task="asr", llm=folder / "Qwen2-tiny")
  import_checkpoint("mooer", tmp_path / "release", tmp_path / "ours", options=options)


def test_what_is_read_is_never_replaced(released, tmp_path):
  source, _ = released
  ckpt = tmp_path / "ckpt"
  import_checkpoint("mooer", source, ckpt, options=Options(task="asr"))
  with pytest.raises(ValueError, match="would replace"):
    import_checkpoint("mooer", source, source, options=Options(task="asr", overwrite=True))
  for out in (ckpt, tmp_path):
    with pytest.raises(ValueError, match="would replace"):
      export_checkpoint("mooer", ckpt, out, overwrite=True)
  assert checkpoint.load(ckpt).params and (source / "asr").is_dir()


def test_everything_wrong_is_told_at_once_and_nothing_is_left(released, tmp_path):
  folder = tmp_path / "release"
  shutil.copytree(released[0], folder)
  file = folder / "paraformer_encoder" / "paraformer-encoder.pth"
  state = torch.load(file)
  del state["after_norm.bias"]
  state["encoders.1.norm1.weight"] = torch.zeros(7)
  torch.save(state, file)
  state = torch.load(folder / "asr" / "adapter_project.pt")
  state["encoder_projector.linear3.weight"] = torch.zeros(2, 2)
  torch.save(state, folder / "asr" / "adapter_project.pt")
  config = json.loads((folder / "asr" / "lora_weights" / "adapter_config.json").read_text())
  config["use_dora"] = True
  (folder / "asr" / "lora_weights" / "adapter_config.json").write_text(json.dumps(config))
  (folder / "paraformer_encoder" / "am.mvn").write_text("<Nnet>")
  with pytest.raises(ConversionError) as caught:
    import_checkpoint("mooer", folder, tmp_path / "out", options=Options(task="asr"))
  for part in (
    "after_norm.bias [32] is missing",
    "encoders.1.norm1.weight has shape [7]",
    "linear3.weight [2, 2] is unmapped",
    "use_dora",
    "am.mvn: no <AddShift>",
  ):
    assert part in str(caught.value), part
  assert [path.name for path in tmp_path.iterdir()] == ["release"]


@pytest.mark.parametrize(
  "file, name",
  [
    ("paraformer_encoder/paraformer-encoder.pth", "encoders.1.norm1.bias"),
    ("asr/adapter_project.pt", "encoder_projector.linear2.weight"),
  ],
)
def test_a_value_that_is_not_finite_is_told_by_file_and_tensor(released, tmp_path, file, name):
  shutil.copytree(released[0], tmp_path / "release")
  state = torch.load(tmp_path / "release" / file)
  state[name].view(-1)[0] = torch.inf
  torch.save(state, tmp_path / "release" / file)
  with pytest.raises(ReadError, match=f"{file}: tensor '{name}' has 1 of .* NaN or infinite"):
    import_checkpoint("mooer", tmp_path / "release", tmp_path / "out", options=Options(task="asr"))
  assert [path.name for path in tmp_path.iterdir()] == ["release"]


@pytest.mark.parametrize("dtype, too_large", [(torch.float16, True), (torch.float32, False)])
def test_a_merge_that_is_too_large_for_the_weights_is_told(tmp_path, dtype, too_large):
  """float16 ends at 65504; each of LoRA's own values is far below."""
  folder = tmp_path / "release"
  release(folder, dtype=dtype)
  state = load_file(folder / "asr" / "lora_weights" / "adapter_model.safetensors")
  for letter, value in (("A", 300.0), ("B", 300.0)):
    name = f"base_model.model.model.layers.1.mlp.up_proj.lora_{letter}.weight"
    state[name] = torch.full_like(state[name], value)
  save_file(state, folder / "asr" / "lora_weights" / "adapter_model.safetensors")
  options = Options(task="asr", merge_lora=True)
  if not too_large:
    import_checkpoint("mooer", folder, tmp_path / "out", options=options)
    return
  message = r"^model.layers.1.mlp.up_proj.weight: .* 2240 of 2240 .* too large for float16; keep"
  with pytest.raises(ConversionError, match=message):
    import_checkpoint("mooer", folder, tmp_path / "out", options=options)
  assert [path.name for path in tmp_path.iterdir()] == ["release"]
  import_checkpoint("mooer", folder, tmp_path / "out", options=Options(task="asr"))  # apart


def test_a_run_that_went_on_from_a_release_is_exported_as_one(released, tmp_path):
  """Its own leaves, its base's other leaves and its base's files."""
  folder, _ = released
  import_checkpoint("mooer", folder, tmp_path / "ours", options=Options(task="asr"))
  loaded = checkpoint.load(tmp_path / "ours")
  trained, _ = tree.partition(loaded.params, ("connector/.*", ".*/lora_[ab]"))
  trained = tree.unflatten({path: leaf + 1 for path, leaf in tree.flatten(trained).items()})
  checkpoint.save(
    checkpoint.step_folder(tmp_path / "run", 1),
    params=trained,
    config_json=loaded.config,
    tokenizer=loaded.tokenizer,
    generation=loaded.generation,
    base=tmp_path / "ours",
  )
  export_checkpoint("mooer", tmp_path / "run", tmp_path / "back")
  assert_same_tensors(folder / "Qwen2-tiny", tmp_path / "back" / "Qwen2-tiny")
  before = torch.load(folder / "asr" / "adapter_project.pt")
  after = torch.load(tmp_path / "back" / "asr" / "adapter_project.pt")
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert torch.equal(after[name], tensor + 1), name
  same = "asr/lora_weights/adapter_config.json"
  before, after = (json.loads((f / same).read_text()) for f in (folder, tmp_path / "back"))
  assert before == after


def test_an_adapter_is_recognised_by_the_tensors_of_a_connector(tmp_path):
  adapter = ["encoder_projector.linear1.weight", "encoder.model.after_norm.bias"]
  assert mooer.KIND.recognises(tmp_path / "a.pt", adapter) == "mooer (its adapter alone)"
  assert mooer.KIND.recognises(tmp_path / "a.pt", [*adapter, "llm.lm_head.weight"]) is None
  for other in ("encoder_projector.conv.weight", "encoder.model.after_norm.bias"):
    assert mooer.KIND.recognises(tmp_path / "a.pt", [other]) is None


def test_vary_moves_every_vector():
  """The parity above would not see two norms mixed up if all were ones."""
  module = vary(torch.nn.LayerNorm(4))
  assert not torch.equal(module.weight, torch.ones(4)) and module.bias.abs().min() > 0
