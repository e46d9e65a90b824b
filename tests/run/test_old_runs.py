"""Run folders written by version 0.1 load, resume and transcribe.

`runs_of_version_0.1.tar.xz` holds two runs of two steps each, trained by commit 900609f with the
model of `SIZES`: `run` is a whole model, `tuned` trains its connector only and points to `run`.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

import mooer_jax
from mooer_jax import checkpoint, cli, tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.checkpoint import CheckpointError
from tests.numerics import assert_within, exceeds_the_bound, score_rounding
from tests.run.programs import train

SIZES = {
  "sanm": {"width": 8, "layers": 2, "heads": 1, "mlp_width": 8},
  "linear": {"hidden_width": 8},
  "llm": {"width": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_width": 8, "mlp_width": 8},
}


@pytest.fixture
def old_runs(tmp_path) -> Path:
  with tarfile.open(Path(__file__).with_name("runs_of_version_0.1.tar.xz")) as archive:
    archive.extractall(tmp_path, filter="data")
  return tmp_path


@pytest.fixture
def old_config(config):
  config.model.update(SIZES)
  config.data.buckets = (32, 84)
  config.train.update({"save_every": 2, "log_every": 1})
  return config


def test_they_transcribe_as_then(old_runs, clips):
  transcriber = mooer_jax.Transcriber.from_checkpoint(old_runs / "run")
  audio = [load_audio(clips[0].path)]
  [result] = transcriber.transcribe(audio)
  # Printed by commit 900609f: a mean probability of 0.65, so no rounding changes the token.
  assert result.tokens == [10] * 8
  bound = score_rounding(transcriber, audio) + 0.5e-5  # of the printed number
  assert_within(result.score, -0.42807, bound)
  with exceeds_the_bound():  # the start of the clip
    assert_within(transcriber.transcribe([audio[0][:16000]])[0].score, -0.42807, bound)


def test_they_are_verified_by_the_hash_of_their_weights(old_runs, capsys):
  """Sums of all files were not recorded then."""
  assert cli.main(["checkpoint", "verify", str(old_runs / "tuned")]) == 0
  steps = capsys.readouterr().out.splitlines()
  assert len(steps) == 2 and all("no sums recorded" in line for line in steps)  # and its base
  weights = next(path for path in (old_runs / "run").rglob("weights/d/*") if path.is_file())
  weights.write_bytes(weights.read_bytes()[:-1])
  assert cli.main(["checkpoint", "verify", str(old_runs / "tuned")]) == 1
  with pytest.raises(CheckpointError, match="weights: files were added, removed or changed"):
    mooer_jax.Transcriber.from_checkpoint(old_runs / "run")


def test_a_run_resumes(old_runs, old_config):
  old_config.workdir = str(old_runs / "run")
  old_config.train.steps = 4
  assert train(old_config).name == "step_00000004"
  lines = (old_runs / "run" / "metrics.jsonl").read_text().splitlines()
  assert len(lines) == 4  # the two of then, two new ones


def test_a_fine_tune_resumes_and_keeps_its_base(old_runs, old_config):
  base = old_runs / "run" / "step_00000002"
  old_config.workdir = str(old_runs / "tuned")
  old_config.init_from = str(base)
  old_config.trainable = ("connector/.*",)
  old_config.train.update({"steps": 4, "cmvn": ""})
  folder = train(old_config)
  then, now = (tree.flatten(checkpoint.load(path).params) for path in (base, folder))
  changed = {path for path in then if not np.array_equal(then[path], now[path])}
  assert changed and all(path.startswith("connector/") for path in changed)
