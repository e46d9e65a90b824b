"""What each config says, and the command line."""

import json

import numpy as np
import pytest
import torch

from convert.core.errors import ConversionError, Problems
from convert.main import main
from convert.parts.hf_config import hf_config, llm_config
from mooer_jax.config import DECODERS
from tests.convert.folders_of import SIZES, saved_llm
from tests.convert.parts.test_language_model import assert_same_tensors
from tests.convert.releases import funasr_folder, release

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


def test_every_ignored_name_is_printed(tmp_path, capsys):
  others = {f"decoder.{n}.weight": torch.zeros(1) for n in range(50)}
  funasr_folder(tmp_path / "funasr", others=others)
  assert main(["import", "paraformer", str(tmp_path / "funasr"), str(tmp_path / "ours")]) == 0
  said = capsys.readouterr().out.splitlines()
  at = said.index("ignored, 50 in all:")
  assert said[at + 1 : at + 51] == [f"  {name}" for name in others]


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
