"""LoRA folders of peft: the same logits here, the same bits back, odd options refused by name."""

import json
import math

import pytest
import torch

from convert.core.errors import ConversionError
from convert.core.options import Options
from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from mooer_jax import checkpoint
from mooer_jax.config import part_from_json
from tests.convert.folders_of import saved_llm, with_lora
from tests.convert.parts.test_language_model import assert_same_logits, assert_same_tensors
from tests.numerics import exceeds_the_bound

ALL = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """(folder of transformers, its checkpoint)."""
  folder = tmp_path_factory.mktemp("base")
  _, source = saved_llm(folder / "hf", "qwen2")
  import_checkpoint("qwen2", source, folder / "ours")
  return source, folder / "ours"


def tuned(source, folder, *, binary=False, dotted=False, **options):
  """A LoRA folder for a base model, and the module."""
  from transformers import AutoModelForCausalLM

  module = with_lora(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), **options)
  module.save_pretrained(folder, safe_serialization=not binary)
  if dotted or binary:
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    state = {n: t for n, t in module.state_dict().items() if "lora_" in n}
    if not dotted:
      state = {name.replace(".default", ""): tensor for name, tensor in state.items()}
    torch.save(state, folder / "adapter_model.bin")
  return module, folder


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(rank=4, alpha=16, targets=ALL, binary=True),
    dict(rank=5, alpha=3, use_rslora=True, dotted=True),
  ],
  ids=["some-targets", "all-targets-bin", "rslora-default-in-names"],
)
def test_a_lora_on_its_base_gives_the_logits_of_peft(base, tmp_path, options):
  source, ours = base
  module, folder = tuned(source, tmp_path / "lora", **options)
  import_checkpoint("peft", folder, tmp_path / "tuned", options=Options(base_checkpoint=ours))
  assert_same_logits(tmp_path / "tuned", module)
  with exceeds_the_bound():
    assert_same_logits(ours, module)  # else the LoRA would not show
  config = part_from_json(checkpoint.describe(tmp_path / "tuned").config["decoder"], "decoder")
  rank, alpha = options.get("rank", 3), options.get("alpha", 7)
  scale = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
  assert math.isclose(config.lora_scale, scale, rel_tol=1e-12)
  assert config.lora_targets == options.get("targets", ("q", "v", "down"))

  export_checkpoint("peft", tmp_path / "tuned", tmp_path / "back")
  assert_same_tensors(folder, tmp_path / "back")
  files = sorted(p.name for p in folder.iterdir() if p.name != "README.md")
  assert sorted(p.name for p in (tmp_path / "back").iterdir()) == files
  original = json.loads((folder / "adapter_config.json").read_text())
  assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == original


def test_a_lora_without_its_base_comes_back(base, tmp_path):
  _, folder = tuned(base[0], tmp_path / "lora")
  import_checkpoint("peft", folder, tmp_path / "alone")
  about = checkpoint.describe(tmp_path / "alone")
  assert about.config["lora"] == {
    "rank": 3,
    "alpha": 7.0,
    "dropout": 0.0,
    "targets": ["q", "v", "down"],
  }
  export_checkpoint("peft", tmp_path / "alone", tmp_path / "back")
  assert_same_tensors(folder, tmp_path / "back")


def test_an_export_of_a_lora_trained_here_loads_in_peft(base, tmp_path):
  """No folder of peft's stood at its beginning, so there is nothing to copy the options from."""
  import shutil

  from peft import PeftModel
  from transformers import AutoModelForCausalLM

  module, folder = tuned(base[0], tmp_path / "lora", use_rslora=True, rank=5)
  import_checkpoint("peft", folder, tmp_path / "tuned", options=Options(base_checkpoint=base[1]))
  shutil.rmtree(tmp_path / "tuned" / "source")
  export_checkpoint("peft", tmp_path / "tuned", tmp_path / "back")
  plain = AutoModelForCausalLM.from_pretrained(base[0], dtype=torch.float32)
  again = PeftModel.from_pretrained(plain, tmp_path / "back").eval()
  assert_same_logits(tmp_path / "tuned", module, again)


@pytest.mark.parametrize(
  "option",
  [
    {"use_dora": True},
    {"modules_to_save": ["lm_head"]},
    {"rank_pattern": {"q_proj": 8}},
    {"alpha_pattern": {"q_proj": 8}},
    {"bias": "lora_only"},
    {"layers_to_transform": [0]},
    {"fan_in_fan_out": True},
    {"lora_bias": True},
    {"init_lora_weights": "pissa"},
    {"peft_type": "IA3"},
    {"some_future_option": 3},
  ],
  ids=lambda option: next(iter(option)),
)
def test_an_option_that_cannot_be_expressed_is_named(base, tmp_path, option):
  folder = tmp_path / "lora"
  folder.mkdir()
  plain = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "bias": "none"}
  (folder / "adapter_config.json").write_text(json.dumps({**plain, **option}))
  with pytest.raises(ConversionError, match=next(iter(option))):
    import_checkpoint("peft", folder, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_layer_without_its_lora_and_a_wrong_rank_are_all_named(base, tmp_path):
  from safetensors.torch import load_file, save_file

  _, folder = tuned(base[0], tmp_path / "lora")
  file = folder / "adapter_model.safetensors"
  state = load_file(file)
  start = "base_model.model.model.layers."
  del state[f"{start}1.self_attn.q_proj.lora_A.weight"]
  state[f"{start}0.mlp.down_proj.lora_B.weight"] = torch.zeros(40, 2)
  state[f"{start}7.mlp.down_proj.lora_B.weight"] = torch.zeros(40, 3)
  save_file(state, file)
  with pytest.raises(ConversionError) as caught:
    import_checkpoint("peft", folder, tmp_path / "out", options=Options(base_checkpoint=base[1]))
  message = str(caught.value)
  assert "3 problems" in message
  assert "layers.1.self_attn.q_proj.lora_A.weight [3, 40] is missing" in message
  assert "layers.0.mlp.down_proj.lora_B.weight has shape [40, 2], the model needs [40, 3]" in (
    message
  )
  assert "layers.7.mlp.down_proj.lora_B.weight [40, 3] is unmapped" in message


def test_export_of_a_model_without_lora_says_so(base, tmp_path):
  with pytest.raises(ConversionError, match="no LoRA in it"):
    export_checkpoint("peft", base[1], tmp_path / "out")
  assert list(tmp_path.iterdir()) == []
