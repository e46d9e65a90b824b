"""Folders of MooER's training program: the model that was trained, on the release it began with."""

import json
import re
import shutil

import pytest
import torch

from convert.core.errors import ConversionError
from convert.core.options import Options
from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from convert.main import main
from mooer_jax import checkpoint
from mooer_jax.config import from_json
from tests.convert.families.test_mooer import assert_same_model, cmvn_of
from tests.convert.folders_of import llm, with_lora
from tests.convert.readers.zero_folders import write_zero
from tests.convert.releases import adapter, encoder, release

ALL = ("q", "k", "v", "o", "gate", "up", "down")
BUFFER = "llm.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  """(release, its checkpoint, its modules)."""
  folder = tmp_path_factory.mktemp("deepspeed")
  modules = release(folder / "release", extra=False)
  import_checkpoint("mooer", folder / "release", folder / "base", options=Options(task="asr"))
  return folder / "release", folder / "base", modules


def tuned(modules, *, seed=3, rank=4, targets=ALL):
  """The same encoder and LLM with another adapter and another LoRA."""
  module = llm("qwen2", vocab_size=modules["llm"].config.vocab_size)
  lora = with_lora(module, seed=seed, rank=rank, alpha=16, targets=targets)
  return {"encoder": modules["encoder"], "adapter": adapter(40, seed=seed), "llm": lora}


def trained(modules):
  """What the program trains, under the names of its whole model."""
  lora = {f"llm.{n}": t for n, t in modules["llm"].state_dict().items() if "lora_" in n}
  joined = {f"encoder_projector.{n}": t for n, t in modules["adapter"].state_dict().items()}
  return joined | lora


def frozen_llm(modules):
  return {f"llm.{n}": t for n, t in modules["llm"].state_dict().items() if "lora_" not in n}


def write(folder, params, stage=2, **options):
  return write_zero(folder, stage, 3, params, buffer=BUFFER, **options)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_model_is_the_one_that_was_trained(released, tmp_path, stage):
  source, base, modules = released
  modules = tuned(modules)
  assert any(".lora_A.default.weight" in name for name in trained(modules))
  write(tmp_path / "ds", trained(modules), stage)
  options = Options(base_checkpoint=base, lora_config=source / "asr" / "lora_weights")
  report = import_checkpoint("deepspeed", tmp_path / "ds", tmp_path / "ours", options=options)
  assert report.ignored == (BUFFER,)
  about = checkpoint.describe(tmp_path / "ours")
  assert about.base == base
  assert all(re.match(r"connector/|.*/lora_[ab]$", path) for path in about.trained)
  assert len(about.trained) == len(trained(modules))
  assert_same_model(tmp_path / "ours", modules, cmvn_of(source))
  with pytest.raises(AssertionError):
    assert_same_model(base, modules, cmvn_of(source))  # else nothing would show

  export_checkpoint("mooer", tmp_path / "ours", tmp_path / "back")
  import_checkpoint("mooer", tmp_path / "back", tmp_path / "again", options=Options(task="asr"))
  assert_same_model(tmp_path / "again", modules, cmvn_of(source))


def test_rank_and_alpha(released, tmp_path, capsys):
  source, base, modules = released
  write(tmp_path / "usual", trained(tuned(modules, rank=64)))
  args = ["import", "deepspeed", str(tmp_path / "usual"), str(tmp_path / "ours")]
  assert main([*args, "--base", str(base), "--task", "ast"]) == 0
  said = capsys.readouterr().out
  assert "LoRA: rank 64, alpha 16, on q, k, v, o, gate, up, down; alpha of MooER's usual" in said
  assert f"from {base}: CMVN, LLM, encoder" in said
  config = from_json(checkpoint.describe(tmp_path / "ours").config)
  assert (config.decoder.lora_rank, config.decoder.lora_scale) == (64, 0.25)
  assert config.prompts == (("ast", "Translate speech to english text. "),)

  write(tmp_path / "small", trained(tuned(modules)))
  with pytest.raises(ConversionError, match="has rank 4, .*--lora-config"):
    import_checkpoint(
      "deepspeed", tmp_path / "small", tmp_path / "out", options=Options(base_checkpoint=base)
    )
  written = json.loads((source / "asr" / "lora_weights" / "adapter_config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**written, "r": 5}))
  options = Options(base_checkpoint=base, lora_config=tmp_path / "config.json")
  with pytest.raises(ConversionError, match="has rank 4, but r is 5"):
    import_checkpoint("deepspeed", tmp_path / "small", tmp_path / "out", options=options)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_encoder_and_frozen_weights_in_the_folder_are_taken(released, tmp_path, stage):
  source, base, modules = released
  modules = {**tuned(modules), "encoder": encoder(seed=1)}
  heard = {f"encoder.model.{n}": t for n, t in modules["encoder"].state_dict().items()}
  folder = write(tmp_path / "ds", trained(modules) | heard, stage, frozen=frozen_llm(modules))
  assert any(".q_proj.base_layer.weight" in name for name in frozen_llm(modules))
  options = Options(base_checkpoint=base, lora_config=source / "asr" / "lora_weights")
  import_checkpoint("deepspeed", folder, tmp_path / "ours", options=options)
  assert_same_model(tmp_path / "ours", modules, cmvn_of(source))
  export_checkpoint("mooer", tmp_path / "ours", tmp_path / "back")
  import_checkpoint("mooer", tmp_path / "back", tmp_path / "again", options=Options(task="asr"))
  assert_same_model(tmp_path / "again", modules, cmvn_of(source))


def test_an_adapter_alone_keeps_the_lora_of_the_base(released, tmp_path):
  source, base, modules = released
  modules = {**modules, "adapter": adapter(40, seed=5)}
  params = {n: t for n, t in trained(modules).items() if "llm." not in n}
  import_checkpoint(
    "deepspeed",
    write(tmp_path / "ds", params),
    tmp_path / "ours",
    options=Options(base_checkpoint=base),
  )
  assert_same_model(tmp_path / "ours", modules, cmvn_of(source))


def test_an_llm_that_was_trained_itself(released, tmp_path):
  source, base, modules = released
  plain = llm("qwen2", vocab_size=modules["llm"].config.vocab_size, seed=9)
  modules = {**modules, "adapter": adapter(40, seed=5), "llm": plain}
  params = {n: t for n, t in trained(modules).items() if "lora" not in n} | frozen_llm(modules)
  folder = write(tmp_path / "ds", params)
  with pytest.raises(ConversionError, match="the LLM itself was trained"):
    import_checkpoint("deepspeed", folder, tmp_path / "ours", options=Options(base_checkpoint=base))
  import_checkpoint(
    "mooer", source, tmp_path / "merged", options=Options(task="asr", merge_lora=True)
  )
  import_checkpoint(
    "deepspeed", folder, tmp_path / "ours", options=Options(base_checkpoint=tmp_path / "merged")
  )
  assert_same_model(tmp_path / "ours", modules, cmvn_of(source))


def test_a_tied_head_in_the_folder_is_the_embedding(released, tmp_path):
  source, _, modules = released
  tied = llm("qwen2", vocab_size=modules["llm"].config.vocab_size, tie_word_embeddings=True)
  shutil.copytree(source, tmp_path / "release")
  tied.save_pretrained(tmp_path / "release" / "Qwen2-tiny")
  options = Options(task="asr", lora=False)
  import_checkpoint("mooer", tmp_path / "release", tmp_path / "base", options=options)
  modules = {**modules, "adapter": adapter(40, seed=5)}
  modules["llm"] = llm("qwen2", vocab_size=tied.config.vocab_size, tie_word_embeddings=True, seed=9)
  params = {n: t for n, t in trained(modules).items() if "lora" not in n} | frozen_llm(modules)
  options = Options(base_checkpoint=tmp_path / "base")
  folder = write(tmp_path / "ds", params)
  report = import_checkpoint("deepspeed", folder, tmp_path / "ours", options=options)
  assert set(report.ignored) == {BUFFER, "llm.lm_head.weight"}
  assert_same_model(tmp_path / "ours", modules, cmvn_of(source))
  params["llm.lm_head.weight"] = params["llm.lm_head.weight"] + 1
  with pytest.raises(ConversionError, match="llm.lm_head.weight .* is unmapped"):
    import_checkpoint(
      "deepspeed", write(tmp_path / "odd", params), tmp_path / "out", options=options
    )


def test_everything_that_does_not_fit_is_named(released, tmp_path):
  source, base, modules = released
  params = trained(tuned(modules))
  del params["llm.base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"]
  params |= {
    "visual.proj.weight": torch.zeros(2, 2),
    "encoder.model.encoders.7.norm1.bias": torch.zeros(32),
    "encoder_projector.linear3.bias": torch.zeros(2),
  }
  options = Options(base_checkpoint=base, lora_config=source / "asr" / "lora_weights")
  with pytest.raises(ConversionError) as caught:
    import_checkpoint(
      "deepspeed", write(tmp_path / "ds", params), tmp_path / "out", options=options
    )
  for part in (
    "visual.proj.weight [2, 2] is unmapped",
    "encoders.7.norm1.bias [32] is unmapped",
    "linear3.bias [2] is unmapped",
    "up_proj.lora_B.default.weight [56, 4] is missing",
  ):
    assert part in str(caught.value), part
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(merge_lora=True), "import the base without --merge-lora"),
    (dict(), "has a LoRA on decoder/layers_0/attention/k/lora_a .*--no-lora"),
  ],
)
def test_the_wrong_base_is_refused(released, tmp_path, change, message):
  source, _, modules = released
  import_checkpoint("mooer", source, tmp_path / "base", options=Options(task="asr", **change))
  targets = ALL if change else ("q", "v")
  folder = write(tmp_path / "ds", trained(tuned(modules, rank=64, targets=targets)))
  with pytest.raises(ConversionError, match=message):
    import_checkpoint(
      "deepspeed", folder, tmp_path / "out", options=Options(base_checkpoint=tmp_path / "base")
    )


def test_what_is_needed_is_named(released, tmp_path):
  source, base, modules = released
  folder = write(tmp_path / "ds", trained(tuned(modules)))
  with pytest.raises(ValueError, match="--base"):
    import_checkpoint("deepspeed", folder, tmp_path / "out")
  import_checkpoint("qwen2", source / "Qwen2-tiny", tmp_path / "llm")
  with pytest.raises(ConversionError, match="has no encoders; give an imported release"):
    import_checkpoint(
      "deepspeed", folder, tmp_path / "out", options=Options(base_checkpoint=tmp_path / "llm")
    )
  folder = write(tmp_path / "other", {"model.norm.weight": torch.ones(40), "x": torch.ones(2, 2)})
  with pytest.raises(ConversionError, match="model.norm.weight .40. is unmapped"):
    import_checkpoint("deepspeed", folder, tmp_path / "out", options=Options(base_checkpoint=base))


def test_the_merged_form_is_a_release_but_for_a_name(released, tmp_path):
  """adapter_project.pt and new_llm/, as the program writes beside the training folder."""
  source, _, modules = released
  shutil.copytree(source, tmp_path / "release")
  modules = tuned(modules)
  shutil.rmtree(tmp_path / "release" / "asr" / "lora_weights")
  modules["llm"].save_pretrained(tmp_path / "release" / "asr" / "new_llm")
  joined = {n: t for n, t in trained(modules).items() if "llm" not in n}
  torch.save(joined, tmp_path / "release" / "asr" / "adapter_project.pt")
  import_checkpoint("mooer", tmp_path / "release", tmp_path / "ours", options=Options(task="asr"))
  assert_same_model(tmp_path / "ours", modules, cmvn_of(source))
  shutil.copytree(source / "asr" / "lora_weights", tmp_path / "release" / "asr" / "lora_weights")
  with pytest.raises(ConversionError, match="lora_weights and new_llm"):
    import_checkpoint("mooer", tmp_path / "release", tmp_path / "out", options=Options(task="asr"))


def test_inspect_knows_the_folder(released, tmp_path, capsys):
  write(tmp_path / "ds", trained(tuned(released[2])))
  assert main(["inspect", "--short", str(tmp_path / "ds")]) == 0
  assert "kind: deepspeed" in capsys.readouterr().out
