"""What each config says, Paraformer and GGUF in and out, and the command line."""

import json

import numpy as np
import pytest
import torch

from convert.errors import ConversionError, Problems
from convert.exporting import export_checkpoint
from convert.hf_config import hf_config, llm_config
from convert.importing import import_checkpoint
from convert.main import main
from mooer_jax import checkpoint
from mooer_jax.config import DECODERS, part_from_json
from mooer_jax.encoders.sanm import SANMEncoder
from tests.convert.folders_of import SIZES, saved_llm
from tests.convert.releases import encoder, release, write_cmvn
from tests.convert.test_language_model import assert_same_tensors
from tests.parity import torch_models
from tests.tiny import SANM

QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **SIZES}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}


@pytest.mark.parametrize(
  "change, word",
  [
    ({"model_type": "mistral"}, "mistral"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "SequenceClassification"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_parameters"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ({"hidden_size": None}, "hidden_size=None"),
    ({"num_attention_heads": 5, "hidden_size": 40}, "heads=5"),
    ({"head_dim": 6}, "head_dim=6"),
  ],
)
def test_what_the_model_cannot_express_is_refused_by_name(change, word):
  problems = Problems()
  assert llm_config({**QWEN2, **change}, problems) is None
  assert len(problems.found) == 1 and word in problems.found[0]


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_biases_of_llama_are_refused(key):
  problems = Problems()
  assert llm_config({**LLAMA, key: True}, problems) is None
  assert key in problems.found[0]


def test_all_reasons_are_told():
  problems = Problems()
  bad = {**QWEN2, "use_sliding_window": True, "hidden_act": "gelu", "vocab_size": "many"}
  llm_config(bad, problems)
  assert len(problems.found) == 3
  with pytest.raises(ConversionError, match="3 problems"):
    problems.check("here")


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_written_config_describes_the_model_to_transformers_and_to_us(name, tmp_path):
  from transformers import AutoConfig

  written = hf_config(DECODERS[name], np.dtype(np.float16), eos_id=7)
  assert llm_config(written, Problems()) == DECODERS[name]
  (tmp_path / "config.json").write_text(json.dumps(written))
  theirs = AutoConfig.from_pretrained(tmp_path)
  assert theirs.rope_parameters["rope_theta"] == DECODERS[name].rope_theta
  assert (theirs.dtype, theirs.eos_token_id) == (torch.float16, 7)
  theirs.save_pretrained(tmp_path)  # its own spelling
  spelt = json.loads((tmp_path / "config.json").read_text())
  assert llm_config(spelt, Problems()) == DECODERS[name]


def test_old_and_new_spelling_of_rope():
  old = {**QWEN2, "rope_theta": 5e5, "rope_scaling": None}
  new = {**QWEN2, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
  assert llm_config(old, Problems()) == llm_config(new, Problems())
  assert llm_config(old, Problems()).rope_theta == 5e5


def funasr_folder(folder, **changes):
  """A folder as FunASR's: the whole model in model.pt, of which the encoder is a part."""
  import yaml

  folder.mkdir()
  module = encoder()
  state = {f"encoder.{name}": tensor for name, tensor in module.state_dict().items()}
  torch.save({**state, "decoder.after_norm.weight": torch.ones(3)}, folder / "model.pt")
  cmvn = write_cmvn(folder / "am.mvn")
  conf = {
    "encoder": "SANMEncoder",
    "encoder_conf": {"attention_heads": 4, "input_layer": "pe", "sanm_shfit": 0, **changes},
    "frontend_conf": {"fs": 16000, "window": "hamming", "lfr_m": 7, "lfr_n": 6},
  }
  (folder / "config.yaml").write_text(yaml.safe_dump(conf))
  return module, cmvn


def test_paraformer(tmp_path):
  module, cmvn = funasr_folder(tmp_path / "funasr")
  report = import_checkpoint("paraformer", tmp_path / "funasr", tmp_path / "ours")
  assert report.ignored == ("decoder.after_norm.weight",)
  loaded = checkpoint.load(tmp_path / "ours")
  config = part_from_json(loaded.config["encoders"][0], "encoders[0]")
  assert config == SANM
  np.testing.assert_allclose(loaded.params["frontend"]["sanm"]["shift"], cmvn[0], rtol=1e-6)
  x_BTF = np.random.default_rng(0).normal(size=(1, 9, SANM.input_width)).astype(np.float32)
  params = {"params": loaded.params["encoders"]["sanm"]}
  ours, _ = SANMEncoder(config).apply(params, x_BTF, np.ones((1, 9), bool))
  with torch.no_grad():
    theirs = module(torch.tensor(x_BTF), torch.tensor([9]))[0]
  assert torch_models.error(ours, theirs) <= 1e-4  # float32 rounding through three layers

  export_checkpoint("paraformer", tmp_path / "ours", tmp_path / "back")
  before = torch.load(tmp_path / "funasr" / "model.pt")
  after = torch.load(tmp_path / "back" / "model.pt")
  assert before.keys() - after.keys() == {"decoder.after_norm.weight"}
  assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
  assert import_checkpoint("paraformer", tmp_path / "back", tmp_path / "again").ignored == ()


@pytest.mark.parametrize("change", [{"sanm_shfit": 5}, {"input_layer": "conv2d"}])
def test_another_paraformer_is_refused_by_name(tmp_path, change):
  funasr_folder(tmp_path / "funasr", **change)
  with pytest.raises(ConversionError, match=f"encoder_conf.{next(iter(change))}"):
    import_checkpoint("paraformer", tmp_path / "funasr", tmp_path / "ours")


def test_the_command_line_goes_there_and_back(tmp_path, capsys):
  _, source = saved_llm(tmp_path / "hf", "qwen2")
  ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
  assert main(["import", "qwen2", str(source), ours]) == 0
  assert "27 leaves, 0.03 M parameters, float32" in capsys.readouterr().out
  assert main(["export", "qwen2", ours, back, "--shard-size", "0.1MB"]) == 0
  assert_same_tensors(source, tmp_path / "back")
  assert main(["inspect", back]) == 0
  shown = capsys.readouterr().out
  assert "model.layers.1.mlp.up_proj.weight" in shown and "kind: qwen2" in shown
  assert main(["inspect", "--short", ours]) == 0
  shown = capsys.readouterr().out
  assert "kind: checkpoint of mooer_jax" in shown and "decoder/" not in shown


def test_inspect_guesses_the_kinds(tmp_path, capsys):
  funasr_folder(tmp_path / "funasr")
  release(tmp_path / "mooer")
  saved_llm(tmp_path / "llama", "llama")
  for path, kind in (
    ("funasr", "paraformer"),
    ("mooer", "mooer"),
    ("mooer/asr/lora_weights", "peft"),
    ("llama", "llama"),
  ):
    assert main(["inspect", str(tmp_path / path), "--short"]) == 0
    assert f"kind: {kind}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
  "args, message",
  [
    (["import", "qwen2", "nowhere", "out"], "nowhere: no such file or folder"),
    (["export", "qwen2", "nowhere", "out"], "nowhere: no such checkpoint folder"),
    (["inspect", "nowhere"], "nowhere: no such file or folder"),
    (["import", "mooer", ".", "out", "--task", "tts"], "--task tts: choose one of asr, ast"),
  ],
)
def test_what_the_user_did_wrong_is_told(tmp_path, capsys, monkeypatch, args, message):
  monkeypatch.chdir(tmp_path)
  assert main(args) == 2
  said = capsys.readouterr()
  assert message in said.err and said.out == ""
  assert list(tmp_path.iterdir()) == []
