"""`verify` finds both sides equal, and fails by name of the stage where a weight is not."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from convert.core.errors import ConversionError
from convert.core.options import Options
from convert.importing import import_checkpoint
from convert.main import main
from convert.verify import ours
from convert.verify.bounds import with_bounds
from convert.verify.report import Report, accuracy, same_tokens, stage_errors
from convert.verify.run import verify
from mooer_jax import checkpoint, tree
from tests.convert.folders_of import llm, saved_llm, with_lora
from tests.convert.releases import funasr_folder, release
from tests.numerics import condition, rounded_to, rounding

STAGES = ["features", "encoder", "adapter", "prompt", "logits"]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
  """(release, its checkpoint)."""
  folder = tmp_path_factory.mktemp("verify")
  release(folder / "release")
  import_checkpoint("mooer", folder / "release", folder / "ours", options=Options(task="asr"))
  return folder / "release", folder / "ours"


@pytest.fixture
def source(sides, tmp_path):
  """A copy of the release, to be altered."""
  return shutil.copytree(sides[0], tmp_path / "altered")


@pytest.fixture
def run(clips, capsys):
  """Runs `verify mooer` on two clips: (exit status, what it printed)."""

  def command(src, folder, *more):
    audio = [str(clip.path) for clip in clips[:2]]
    arguments = [str(src), str(folder), "--audio", *audio, "--max-new-tokens", "4", *more]
    capsys.readouterr()
    status = main(["verify", "mooer", *arguments])
    printed = capsys.readouterr()
    return status, printed.out + printed.err

  return command


def fine_tune(out, base, change, **config):
  """A checkpoint that differs from its base in one leaf."""
  about = checkpoint.load(base)
  [(path, value)] = change.items()
  leaf = np.asarray(tree.flatten(about.params)[path])
  return checkpoint.save(
    out,
    params=tree.unflatten({path: leaf + np.asarray(value, leaf.dtype)}),
    config_json={**about.config, **config},
    tokenizer=lambda folder: shutil.copytree(about.tokenizer, folder, dirs_exist_ok=True),
    generation=about.generation,
    base=base,
  )


def rewrite(file, change):
  """Saves a torch file again as `change` makes it."""
  torch.save(change(torch.load(file)), file)


def nudged(name):
  def change(state):
    return {**state, name: state[name] + 0.05 * torch.randn(state[name].shape)}

  return change


def test_a_release_and_its_checkpoint_agree_on_clips(sides, clips):
  audio = [clip.path for clip in clips[:2]]
  report = verify("mooer", *sides, audio=audio, max_new_tokens=4)
  assert [row.stage for row in report.errors] == STAGES
  assert report.failed == [] and report.agreement == (8, 8)
  assert [row.name for row in report.accuracy] == [name for name, *_ in ours.DTYPES]
  assert all(0 < row.mean_kl <= row.largest_kl < 0.1 for row in report.accuracy)


def test_the_command_says_so_for_a_run_folder_too(sides, run, tmp_path):
  shutil.copytree(sides[1], tmp_path / "run" / "step_00000007")
  status, printed = run(sides[0], tmp_path / "run")
  assert status == 0 and "passed" in printed and "FAILED" not in printed
  assert "8 of 8 the same" in printed and "bfloat16 compute" in printed


@pytest.mark.parametrize(
  "path, value, stage",
  [
    ("frontend/sanm/shift", 0.5, "features"),
    ("decoder/layers_1/mlp/down/lora_b", 0.01, "logits"),
  ],
)
def test_an_altered_leaf_of_the_checkpoint_fails_from_its_stage_on(
  sides, run, tmp_path, path, value, stage
):
  fine_tune(tmp_path / "wrong", sides[1], {path: value})
  status, printed = run(sides[0], tmp_path / "wrong")
  failed = printed.split("FAILED, over the bound: ")[1].split("\n")[0].split(", ")
  assert status == 1 and failed[:1] == [stage]
  assert [row for row in failed if row != "tokens"] == STAGES[STAGES.index(stage) :]


@pytest.mark.parametrize(
  "file, name, stage",
  [
    ("paraformer_encoder/paraformer-encoder.pth", "encoders.1.norm2.bias", "encoder"),
    ("asr/adapter_project.pt", "encoder_projector.linear1.bias", "adapter"),
  ],
)
def test_an_altered_tensor_of_the_source_fails(sides, source, run, file, name, stage):
  rewrite(source / file, nudged(name))
  status, printed = run(source, sides[1])
  assert status == 1 and f"FAILED, over the bound: {stage}, " in printed


def test_tokens_are_those_that_each_side_generates(sides, clips, monkeypatch):
  """Right logits do not make up for another answer."""
  short = np.array([[9, -1, -1, -1]] * 2)
  monkeypatch.setattr(ours, "generate", lambda *_: SimpleNamespace(tokens_BS=short))
  audio = [clip.path for clip in clips[:2]]
  report = verify("mooer", *sides, audio=audio, max_new_tokens=4)
  assert report.failed == ["tokens"] and report.agreement in [(n, 8) for n in range(3)]


def test_an_encoder_that_was_trained_along_is_heard_with(run, tmp_path):
  release(tmp_path / "release", tuned_encoder=True)
  import_checkpoint("mooer", tmp_path / "release", tmp_path / "ours", options=Options(task="asr"))
  assert run(tmp_path / "release", tmp_path / "ours")[0] == 0
  plain = lambda state: {k: v for k, v in state.items() if "encoder.model." not in k}  # noqa: E731
  rewrite(tmp_path / "release" / "asr" / "adapter_project.pt", plain)
  status, printed = run(tmp_path / "release", tmp_path / "ours")
  assert status == 1 and "bound: encoder, " in printed


@pytest.mark.parametrize("option", ["lora", "merge_lora"])
def test_the_original_has_the_lora_that_the_checkpoint_has(sides, run, tmp_path, option):
  choice = {"lora": False} if option == "lora" else {"merge_lora": True}
  import_checkpoint("mooer", sides[0], tmp_path / "ours", options=Options(task="asr", **choice))
  status, printed = run(sides[0], tmp_path / "ours")
  assert status == 0 and ("--no-lora" in printed) == (option == "lora")


def test_a_lora_that_is_gone_is_missed(sides, source, run):
  shutil.rmtree(source / "asr" / "lora_weights")
  status, printed = run(source, sides[1])
  assert status == 2 and "lora_weights: not found" in printed


def test_nested_files_are_read_as_the_import_reads_them(source, run, tmp_path):
  inside = lambda state: {f"encoder.model.{name}": t for name, t in state.items()}  # noqa: E731
  rewrite(
    source / "paraformer_encoder" / "paraformer-encoder.pth",
    lambda state: {"state_dict": inside(state), "epoch": 3},
  )
  rewrite(
    source / "asr" / "adapter_project.pt",
    lambda state: {"model": {name: t.bfloat16() for name, t in state.items()}},
  )
  import_checkpoint("mooer", source, tmp_path / "ours", options=Options(task="asr"))
  assert run(source, tmp_path / "ours")[0] == 0


def test_the_task_is_that_of_the_checkpoint(sides, source, run, tmp_path):
  prompts = {"ast": "Translate speech to english text. "}
  fine_tune(tmp_path / "ast", sides[1], {"connector/linear1/bias": 0}, prompts=prompts)
  status, printed = run(sides[0], tmp_path / "ast")
  assert status == 2 and "(ast); one is needed" in printed
  shutil.copytree(source / "asr", source / "ast")
  rewrite(source / "asr" / "adapter_project.pt", nudged("encoder_projector.linear1.bias"))
  assert run(source, tmp_path / "ast")[0] == 0


def test_a_base_that_moved_is_named(sides, run, tmp_path, capsys):
  base = shutil.copytree(sides[1], tmp_path / "base")
  tuned = str(fine_tune(tmp_path / "tuned", base, {"connector/linear2/bias": 0.5}))
  moved = str(base.rename(tmp_path / "moved"))
  back = tmp_path / "back"
  for arguments in (["export", "mooer", tuned, str(back)], ["verify", "llama", "none", tuned]):
    assert main(arguments) == 2
    assert "--base" in capsys.readouterr().err
  assert main(["export", "mooer", tuned, str(back), "--base", moved]) == 0
  status, printed = run(back, tuned, "--base", moved)
  assert status == 0 and "passed" in printed
  status, printed = run(sides[0], tuned, "--base", moved)
  assert status == 1 and "bound: adapter, " in printed


def test_an_encoder_and_a_language_model_alone(tmp_path, clips):
  funasr_folder(tmp_path / "funasr")
  import_checkpoint("paraformer", tmp_path / "funasr", tmp_path / "encoder")
  files = [clip.path for clip in clips[:2]]
  report = verify("paraformer", tmp_path / "funasr", tmp_path / "encoder", audio=files)
  assert [row.stage for row in report.errors] == ["features", "encoder"]
  assert report.failed == [] and report.agreement is None
  rewrite(tmp_path / "funasr" / "model.pt", nudged("encoder.after_norm.bias"))
  report = verify("paraformer", tmp_path / "funasr", tmp_path / "encoder", audio=files)
  assert report.failed == ["encoder"]

  saved_llm(tmp_path / "hf", "llama")
  import_checkpoint("llama", tmp_path / "hf", tmp_path / "llm")
  report = verify("llama", tmp_path / "hf", tmp_path / "llm", max_new_tokens=5)
  assert [row.stage for row in report.errors] == ["logits"]
  assert report.failed == [] and report.agreement == (5, 5)


@pytest.mark.parametrize("dotted", [False, True], ids=["plain", "default-in-names"])
def test_a_lora_of_peft(tmp_path, dotted):
  base, _ = saved_llm(tmp_path / "hf", "qwen2")
  import_checkpoint("qwen2", tmp_path / "hf", tmp_path / "base")
  with_lora(base, rank=5, alpha=3, use_rslora=True).save_pretrained(tmp_path / "lora")
  file = tmp_path / "lora" / "adapter_model.safetensors"
  if dotted:
    from safetensors.torch import load_file

    state = {n.replace(".weight", ".default.weight"): t for n, t in load_file(file).items()}
    torch.save(state, tmp_path / "lora" / "adapter_model.bin")
    file.unlink()
  import_checkpoint(
    "peft", tmp_path / "lora", tmp_path / "ours", options=Options(base_checkpoint=tmp_path / "base")
  )
  args = dict(options=Options(llm=tmp_path / "hf"), max_new_tokens=5)
  report = verify("peft", tmp_path / "lora", tmp_path / "ours", **args)
  assert report.failed == [] and report.agreement == (5, 5)
  described = tmp_path / "lora" / "adapter_config.json"
  described.write_text(json.dumps({**json.loads(described.read_text()), "lora_alpha": 4}))
  assert "logits" in verify("peft", tmp_path / "lora", tmp_path / "ours", **args).failed


def test_a_model_that_transformers_does_not_find_is_no_measure(tmp_path):
  saved_llm(tmp_path / "hf", "llama")
  import_checkpoint("llama", tmp_path / "hf", tmp_path / "llm")
  (tmp_path / "hf" / "model.safetensors").unlink()
  nested = {"state_dict": llm("llama").state_dict()}
  torch.save(nested, tmp_path / "hf" / "pytorch_model.bin")
  with pytest.raises(ConversionError, match="transformers does not find lm_head.weight"):
    verify("llama", tmp_path / "hf", tmp_path / "llm")


@pytest.mark.parametrize(
  "kind, words",
  [
    ("mooer", "--audio"),
    ("peft", "--llm"),
    ("deepspeed", "checkpoint with the kind mooer"),
    ("paraformer --audio a.wav", "has no encoders"),
  ],
)
def test_what_is_needed_is_named(tmp_path, kind, words, capsys):
  saved_llm(tmp_path / "hf", "llama")
  import_checkpoint("llama", tmp_path / "hf", tmp_path / "llm")
  kind, *more = kind.split()
  assert main(["verify", kind, str(tmp_path / "hf"), str(tmp_path / "llm"), *more]) == 2
  assert words in capsys.readouterr().err


def test_a_lora_without_its_base_cannot_be_verified(tmp_path):
  base, _ = saved_llm(tmp_path / "hf", "qwen2")
  with_lora(base).save_pretrained(tmp_path / "lora")
  import_checkpoint("peft", tmp_path / "lora", tmp_path / "ours")
  with pytest.raises(ConversionError, match="has no LLM; it holds lora"):
    verify("peft", tmp_path / "lora", tmp_path / "ours", options=Options(llm=tmp_path / "hf"))


@pytest.mark.parametrize("size, held", [(1.0, True), (1.01, False), (float("nan"), False)])
def test_only_what_is_within_its_bound_is_held(size, held):
  ours = {"encoder": np.array([[1.0, 0.0], [7.0, 0.0]]), "logits": np.zeros((1, 2))}
  theirs = {"encoder": np.array([[1.0, 0.0], [7.0, 0.25 * size]]), "logits": np.zeros((1, 2))}
  rows = stage_errors(
    ours, theirs, {"encoder": np.array([[9.0], [0.25]]), "logits": np.zeros((1, 1))}
  )
  assert [row.held for row in rows] == [held, True]
  assert Report(rows).failed == ([] if held else ["encoder"])
  assert Report([], (3, 4)).failed == ["tokens"] and Report([], (4, 4)).failed == []


def test_tokens_that_one_side_lacks_differ():
  assert same_tokens([[1, 2, 3], [4]], [[1, 2, 3], [4]]) == (4, 4)
  assert same_tokens([[1, 2], [4]], [[1, 2, 3], [5]]) == (2, 4)
  assert same_tokens([[2, 3]], [[1, 2, 3]]) == (0, 3)


def test_small_divergences_are_computed_in_float64():
  """Of logits x and x + e, KL is half the variance of e under x's softmax, up to e's cube."""
  rng = np.random.default_rng(0)
  x_AV = (3 * rng.normal(size=(4, 50))).astype(np.float32)
  y_AV = (x_AV + 1e-4 * rng.normal(size=x_AV.shape)).astype(np.float32)
  e_AV = y_AV.astype(np.float64) - x_AV
  p_AV = np.exp(x_AV.astype(np.float64))
  p_AV /= p_AV.sum(-1, keepdims=True)
  variance_A = (p_AV * e_AV**2).sum(-1) - (p_AV * e_AV).sum(-1) ** 2
  found = accuracy("here", x_AV, y_AV)
  np.testing.assert_allclose(found.mean_kl, variance_A.mean() / 2, rtol=1e-3)
  np.testing.assert_allclose(found.largest_kl, variance_A.max() / 2, rtol=1e-3)
  assert found.agreement == 1


def test_a_stage_of_one_value_is_compared_too():
  """As the features of silence are."""
  same, bounds = {"features": np.full((1, 3), -1.5)}, {"features": np.ones((1, 1))}
  (error,) = stage_errors(same, same, bounds)
  assert error.relative == 0
  (error,) = stage_errors({"features": np.zeros((1, 3))}, same, bounds)
  assert error.relative == math.inf


def test_one_vector_rounded_to_float16_exceeds_the_bound(tmp_path):
  saved_llm(tmp_path / "hf", "llama")
  import_checkpoint("llama", tmp_path / "hf", tmp_path / "ours")
  path = "decoder/final_norm/scale"
  scale = np.asarray(tree.flatten(checkpoint.load(tmp_path / "ours").params)[path])
  fault = rounded_to(np.float16, scale) - scale
  fine_tune(tmp_path / "wrong", tmp_path / "ours", {path: fault})
  report = verify("llama", tmp_path / "hf", tmp_path / "wrong", max_new_tokens=5)
  assert report.failed[:1] == ["logits"]


def test_the_bound_is_that_of_the_tests():
  """Of a matrix product, both derivations give the same, and another order of the sum is within."""
  rng = np.random.default_rng(0)
  params = {"dense": {"kernel": rng.normal(size=(4096, 3)).astype(np.float32)}}
  clips = [rng.normal(size=4096).astype(np.float32)]

  def product(params, clips):
    return {"logits": np.stack(clips) @ params["dense"]["kernel"]}

  values, bounds = with_bounds(product, params, clips)
  scale = condition(lambda p, x: product(p, [x])["logits"], params, *clips, of_rows=True)
  assert bounds["logits"].shape == (1, 1)
  np.testing.assert_allclose(bounds["logits"], rounding(4096, scale), rtol=1)
  order = rng.permutation(4096)
  again = product({"dense": {"kernel": params["dense"]["kernel"][order]}}, [clips[0][order]])
  assert np.all(np.abs(again["logits"] - values["logits"]) <= bounds["logits"])
  rounded = rounded_to(np.float16, params)
  assert np.any(np.abs(product(rounded, clips)["logits"] - values["logits"]) > bounds["logits"])


def test_what_does_not_exist_is_named_and_not_sought_on_the_net(sides):
  source, folder = sides
  missing = Options(llm=Path("lmsys/vicuna-7b-v1.5"))
  with pytest.raises(FileNotFoundError, match="lmsys/vicuna-7b-v1.5: no such file or folder"):
    verify("mooer", source, folder, audio=["a.wav"], options=missing)
