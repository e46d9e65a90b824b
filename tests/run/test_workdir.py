"""The folder of a run: one process trains in it, and the base of a fine-tune stays there."""

import json
import shutil
from pathlib import Path

import pytest

import mooer_jax
from mooer_jax import checkpoint
from mooer_jax.checkpoint import CheckpointError
from mooer_jax.files import lock_folder
from tests.run.programs import train


@pytest.fixture
def trained(config):
  """The checkpoint of a run of two steps."""
  config.train.update({"steps": 2, "save_every": 2})
  return train(config)


def fine_tune(config, base, workdir):
  config.update({"init_from": str(base), "workdir": str(workdir), "trainable": ("connector/.*",)})
  config.train.cmvn = ""


def test_a_second_run_in_the_workdir_is_refused(config):
  with lock_folder(config.workdir):
    with pytest.raises(ValueError, match="run is in use by process"):
      train(config)
  assert not list(Path(config.workdir).glob("step_*"))


def test_a_base_outlives_the_run_that_made_it(config, trained, tmp_path):
  first = config.copy_and_resolve_references()
  fine_tune(config, trained, tmp_path / "tuned")
  tuned = train(config)
  first.train.update({"steps": 8, "keep": 1})
  train(first)
  assert [p.name for p in checkpoint.all_steps(first.workdir)] == ["step_00000002", "step_00000008"]
  assert checkpoint.load(tuned).base == trained


def test_a_base_is_marked_before_the_first_checkpoint(config, trained, tmp_path, monkeypatch):
  """Training takes hours until it saves, in which the run of the base may go on."""
  fine_tune(config, trained, tmp_path / "tuned")
  monkeypatch.setattr(
    "mooer_jax.run.saving.Saver.start", lambda *_, **__: pytest.fail("marked too late")
  )
  config.train.steps = 1
  with pytest.raises(pytest.fail.Exception):
    train(config)
  (mark,) = (trained / "kept_by").iterdir()
  assert mark.read_text() == f"{tmp_path / 'tuned'}\n"


def change_config(folder, layers):
  """Another number of layers of the LLM in config.json."""
  file = folder / "config.json"
  model = json.loads(file.read_text())
  model["decoder"]["layers"] = layers
  file.write_text(json.dumps(model))


def test_weights_that_config_json_does_not_describe_are_refused(config, trained, tmp_path):
  """Once they were dropped, or missing ones made at random, and the transcripts were wrong."""
  for layers, message in (
    (2, r"decoder/layers_1/.* is missing from the weights"),
    (0, r"."),  # the config itself refuses it
  ):
    folder = tmp_path / f"with_{layers}"
    shutil.copytree(trained, folder)
    change_config(folder, layers)
    with pytest.raises(ValueError, match=message):
      mooer_jax.Transcriber.from_checkpoint(folder)
  config.init_from, config.train.cmvn = str(tmp_path / "with_2"), ""
  config.workdir = str(tmp_path / "tuned")
  config.model.llm.layers = 2
  with pytest.raises(CheckpointError, match="layers_1/.* is missing .*; restore the config.json"):
    train(config)


def test_leaves_that_no_layer_takes_are_refused(config, tmp_path):
  config.model.llm.layers = 2
  config.train.update({"steps": 2, "save_every": 2})
  folder = train(config)
  change_config(folder, 1)
  with pytest.raises(CheckpointError, match="layers_1/.* is not a parameter of that model"):
    mooer_jax.Transcriber.from_checkpoint(folder)
