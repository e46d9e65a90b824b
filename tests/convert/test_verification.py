"""`verify` finds both sides equal, and sees a weight that is not."""

import numpy as np
import pytest

from convert.importing import Options, import_checkpoint
from convert.main import main
from convert.verification import verify
from mooer_jax import checkpoint, tree
from tests.convert.folders_of import saved_llm
from tests.convert.releases import release
from tests.convert.test_kinds import funasr_folder


def assert_close(verdict, stages):
  assert [row.stage for row in verdict.errors] == stages
  for row in verdict.errors:
    # Rounding of float32; in the features, of logarithms of small energies.
    assert row.relative <= 1e-3, row


def test_a_release_and_its_checkpoint_agree_on_a_clip(tmp_path, clips, capsys):
  release(tmp_path / "release")
  import_checkpoint("mooer", tmp_path / "release", tmp_path / "ours", Options(task="asr"))
  args = dict(audio=[clip.path for clip in clips[:3]], max_new_tokens=7)
  verdict = verify("mooer", tmp_path / "release", tmp_path / "ours", **args)
  assert_close(verdict, ["features", "encoder", "adapter", "logits"])
  assert verdict.agreement == (21, 21)
  assert all(0 < row.mean_kl <= row.largest_kl < 0.1 for row in verdict.accuracy)

  loaded = checkpoint.load(tmp_path / "ours")
  flat = tree.flatten(loaded.params)
  path = "connector/linear2/bias"
  wrong = {path: np.asarray(flat[path]) + 0.5}
  checkpoint.save(
    tmp_path / "wrong",
    params=tree.unflatten(wrong),
    config_json=loaded.config,
    tokenizer=loaded.tokenizer,
    generation=loaded.generation,
    base=tmp_path / "ours",
  )
  verdict = verify("mooer", tmp_path / "release", tmp_path / "wrong", **args)
  bad = {row.stage: row.largest for row in verdict.errors}
  assert bad["encoder"] < 1e-3 and bad["adapter"] > 0.4

  assert main([
    "verify", "mooer", str(tmp_path / "release"), str(tmp_path / "ours"),
    "--audio", str(clips[0].path), "--max-new-tokens", "3",
  ]) == 0  # fmt: skip
  shown = capsys.readouterr().out
  assert "3 of 3 the same" in shown and "bfloat16 compute" in shown


def test_an_encoder_and_a_language_model_alone(tmp_path, clips):
  funasr_folder(tmp_path / "funasr")
  import_checkpoint("paraformer", tmp_path / "funasr", tmp_path / "encoder")
  files = [clip.path for clip in clips[:2]]
  verdict = verify("paraformer", tmp_path / "funasr", tmp_path / "encoder", audio=files)
  assert_close(verdict, ["features", "encoder"])
  saved_llm(tmp_path / "hf", "llama")
  import_checkpoint("llama", tmp_path / "hf", tmp_path / "llm")
  verdict = verify("llama", tmp_path / "hf", tmp_path / "llm", max_new_tokens=5)
  assert_close(verdict, ["logits"])
  assert verdict.agreement == (5, 5)


@pytest.mark.parametrize("kind, word", [("mooer", "--audio"), ("peft", "--llm")])
def test_what_is_needed_is_named(tmp_path, kind, word, capsys):
  saved_llm(tmp_path / "hf", "llama")
  import_checkpoint("llama", tmp_path / "hf", tmp_path / "llm")
  assert main(["verify", kind, str(tmp_path / "hf"), str(tmp_path / "llm")]) == 2
  assert word in capsys.readouterr().err
