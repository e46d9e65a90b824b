"""Run folders written by version 0.1 load, resume and transcribe.

`runs_of_version_0.1.tar.xz` holds two runs of two steps each, trained by commit 900609f with the
model of `SIZES`: `run` is a whole model, `tuned` trains its connector only and points to `run`.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

import mooer_jax
from mooer_jax import checkpoint, tree
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
  config.train.update({"save_every": 2, "log_every": 1})
  return config


def test_they_transcribe_as_then(old_runs, clips):
  transcriber = mooer_jax.Transcriber.from_checkpoint(old_runs / "run")
  [result] = transcriber.transcribe([clips[0].path])
  # Printed by commit 900609f: a mean probability of 0.65, so no rounding changes the token.
  assert result.tokens == [10] * 8
  assert result.score == pytest.approx(-0.42807, abs=1e-3)


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
