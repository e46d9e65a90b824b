"""What each config says, and the command line."""

import json

import numpy as np
import pytest
import torch

from convert import kinds, readers
from convert.core.errors import ConversionError, Problems
from convert.core.options import Options, flag
from convert.main import main
from convert.parts.hf_config import hf_config, llm_config
from mooer_jax.decoders.llm import LLMConfig
from tests.convert.folders_of import SIZES, saved_llm
from tests.convert.parts.test_language_model import assert_same_tensors
from tests.convert.releases import funasr_folder, release

QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **SIZES}
LFS_FILES = {  # file -> kind and options of its import
  "model.gguf": "llama",
  "beats.pt": "beats",
  "large.pt": "whisper",
  "salmonn_v1.pth": "salmonn --whisper FOLDER --llm FOLDER",
  "model.pt": "paraformer",
  "am.mvn": "paraformer",
  "config.yaml": "paraformer",
  "config.json": "qwen2",
  "model.safetensors": "qwen2",
  "tokenizer.json": "qwen2",
  "tokenizer_config.json": "llama",
  "adapter_config.json": "peft",
}
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
  assert problems.attempt(llm_config, {**QWEN2, **change}) is None
  assert len(problems.found) == 1 and word in problems.found[0]


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_biases_of_llama_are_refused(key):
  with pytest.raises(ConversionError, match=key):
    llm_config({**LLAMA, key: True})


def test_all_reasons_are_told():
  bad = {**QWEN2, "use_sliding_window": True, "hidden_act": "gelu", "vocab_size": "many"}
  with pytest.raises(ConversionError, match="3 problems"):
    llm_config(bad)
  problems = Problems()
  for _ in range(2):  # the same reasons are told once
    problems.attempt(llm_config, bad)
  problems.add("another")
  with pytest.raises(ConversionError, match="here: 4 problems"):
    problems.check("here")


@pytest.mark.parametrize("name", sorted(LLMConfig.SIZES))
def test_a_written_config_describes_the_model_to_transformers_and_to_us(name, tmp_path):
  from transformers import AutoConfig

  written = hf_config(LLMConfig.SIZES[name], np.dtype(np.float16), eos_id=7)
  assert llm_config(written) == LLMConfig.SIZES[name]
  (tmp_path / "config.json").write_text(json.dumps(written))
  theirs = AutoConfig.from_pretrained(tmp_path)
  assert theirs.rope_parameters["rope_theta"] == LLMConfig.SIZES[name].rope_theta
  assert (theirs.dtype, theirs.eos_token_id) == (torch.float16, 7)
  theirs.save_pretrained(tmp_path)  # its own spelling
  spelt = json.loads((tmp_path / "config.json").read_text())
  assert llm_config(spelt) == LLMConfig.SIZES[name]


def test_old_and_new_spelling_of_rope():
  old = {**QWEN2, "rope_theta": 5e5, "rope_scaling": None}
  new = {**QWEN2, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
  assert llm_config(old) == llm_config(new)
  assert llm_config(old).rope_theta == 5e5


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


def test_every_kind_is_found_by_its_name():
  for name in kinds.KINDS:
    kind = kinds.find_kind(name)
    assert kind.name == name
    assert {*kind.options, *kind.needs, *kind.takes} <= vars(Options()).keys()
  with pytest.raises(ValueError, match="kind='gpt': choose one of mooer, "):
    kinds.find_kind("gpt")


@pytest.mark.parametrize("command", ["import", "verify"])
def test_help_has_a_line_with_the_options_of_each_kind(capsys, command):
  with pytest.raises(SystemExit):
    main([command, "--help"])
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  for name in kinds.KINDS:
    kind = kinds.find_kind(name)
    taken = (*kind.needs, *kind.takes) if command == "verify" else kind.options
    expected = {
      *map(flag, taken),
      *(["--audio"] if command == "verify" and kind.takes_audio else []),
    }
    found = [words for words in lines if words[:1] == [name]]
    if command == "verify" and kind.reference is None:
      assert not found
      continue
    [line] = found
    assert {w.strip("[]") for w in line if w.strip("[]").startswith("--")} == expected


def test_a_new_kind_is_one_file_and_one_line(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(kinds.KINDS, "toy", "tests.convert.toy_kind:KIND")
  source, ours, back = (tmp_path / name for name in ("toy", "ours", "back"))
  source.mkdir()
  scale = np.arange(5, dtype=np.float32)
  np.save(source / "toy.npy", scale)
  assert main(["import", "toy", str(source), str(ours), "--task", "asr"]) == 0
  assert "1 leaves" in (said := capsys.readouterr().out) and "task: asr" in said
  assert main(["inspect", str(ours)]) == 0
  assert "decoder/final_norm/scale" in capsys.readouterr().out
  assert main(["export", "toy", str(ours), str(back)]) == 0
  np.testing.assert_array_equal(np.load(back / "toy.npy"), scale)
  torch.save({"toy.scale": torch.tensor(scale)}, tmp_path / "toy.pt")
  capsys.readouterr()
  assert main(["inspect", str(tmp_path / "toy.pt")]) == 0
  assert "kind: toy" in capsys.readouterr().out
  np.save(source / "toy.npy", scale[None])
  assert main(["import", "toy", str(source), str(tmp_path / "no")]) == 2
  assert "one axis is needed" in capsys.readouterr().err
  assert main(["import", "toy", str(source), str(tmp_path / "no"), "--no-lora"]) == 2
  assert "--no-lora has no effect" in capsys.readouterr().err
  assert main(["verify", "toy", str(source), str(ours)]) == 2
  assert "not a whole model" in capsys.readouterr().err


def test_inspect_refuses_a_base_of_what_is_no_checkpoint(tmp_path, capsys):
  _, source = saved_llm(tmp_path / "hf", "qwen2")
  assert main(["inspect", str(source), "--base-checkpoint", str(tmp_path)]) == 2
  assert "--base-checkpoint has no effect" in capsys.readouterr().err


def test_inspect_takes_a_run_folder(tmp_path, capsys):
  _, source = saved_llm(tmp_path / "hf", "llama")
  assert main(["import", "llama", str(source), str(tmp_path / "run" / "step_00000007")]) == 0
  (tmp_path / "run" / "metrics.jsonl").touch()
  capsys.readouterr()
  assert main(["inspect", str(tmp_path / "run")]) == 0
  said = capsys.readouterr().out
  assert "decoder/embed/embedding" in said and "kind: run of mooer_jax, step_00000007" in said


def test_the_old_name_of_base_checkpoint_warns(tmp_path, capsys):
  for name, warned in (("--base", True), ("--base-checkpoint", False)):
    assert main(["export", "llama", str(tmp_path / "no"), str(tmp_path / "out"), name, "x"]) == 2
    assert ("--base is deprecated; use --base-checkpoint" in capsys.readouterr().err) == warned


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize("file", sorted(LFS_FILES))
def test_a_git_lfs_pointer_is_named_before_any_tensor_is_read(tmp_path, capsys, monkeypatch, file):
  kind, *more = LFS_FILES[file].split()
  path = tmp_path / "src" / file
  if kind in ("llama", "qwen2") and not file.endswith(".gguf"):
    saved_llm(path.parent, kind)
  elif kind == "paraformer":
    funasr_folder(path.parent)
  path.parent.mkdir(exist_ok=True)
  path.write_text(POINTER)
  source = path if path.suffix in (".gguf", ".pt", ".pth") and kind != "paraformer" else path.parent
  monkeypatch.setattr(readers.Source, "read", None)
  others = [str(tmp_path) if word == "FOLDER" else word for word in more]
  assert main(["import", kind, str(source), str(tmp_path / "ours"), *others]) == 2
  said = capsys.readouterr().err
  assert f"{path}: a Git LFS pointer: run git lfs pull" in said and "Traceback" not in said


@pytest.mark.parametrize("size", ["infGB", "0GB", "-1GB", "nanGB", "5"])
def test_a_shard_size_is_above_zero(capsys, size):
  with pytest.raises(SystemExit):
    main(["export", "qwen2", "ours", "back", f"--shard-size={size}"])
  assert f"{size!r}: write a size above 0, such as" in capsys.readouterr().err


def test_a_maximum_size_of_a_kind_with_one_file_is_refused(tmp_path, capsys):
  for kind in ("paraformer", "beats", "peft"):
    assert main(["export", kind, "ours", str(tmp_path / "back"), "--shard-size", "1GB"]) == 2
    assert f"--shard-size has no effect on {kind}" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("key", "value"),
  [("num_attention_heads", 0), ("num_key_value_heads", "2"), ("rms_norm_eps", None)],
)
def test_a_value_of_the_original_config_is_named(key, value):
  assert llm_config(QWEN2)
  problems = Problems()
  assert problems.attempt(llm_config, {**QWEN2, key: value}) is None
  assert [text.partition(":")[0] for text in problems.found] == [f"{key}={value!r}"]
