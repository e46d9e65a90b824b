"""The programs with compute.features="device": the losses and texts of features from NumPy."""

import contextlib
import copy
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.data.dataset import train_batches
from mooer_jax.evaluation.text_files import read_text
from mooer_jax.run import start
from mooer_jax.run.config import Run
from tests.numerics import assert_within, exceeds_the_bound, log_energy_rounding, rounding
from tests.run.programs import evaluate, train


@pytest.fixture
def no_numpy_features(monkeypatch):
  """Makes features in NumPy fail, once it is called."""

  def fail(*_, **__):
    raise AssertionError("features were computed in NumPy")

  return lambda: monkeypatch.setattr(FrontendConfig, "features", fail)


def losses(workdir) -> list[float]:
  lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["loss"] for line in lines]


def test_training_resumes_and_evaluates_on_the_device(
  config, tmp_path, no_numpy_features, capsys, monkeypatch
):
  monkeypatch.setattr(start, "CMVN_BATCHES", 2)
  config.data.max_s = config.eval.max_s = 1.5
  config.data.buckets = (25,)
  config.train.steps, config.train.save_every = 4, 2
  on_device = copy.deepcopy(config)
  on_device.compute.features, on_device.workdir = "device", str(tmp_path / "other")
  config.eval.out, on_device.eval.out = str(tmp_path / "host"), str(tmp_path / "device")
  train(config)
  evaluate(config, config.workdir)
  assert "25 frames, 8 answer tokens" in capsys.readouterr().err

  shutil.copytree(config.workdir, on_device.workdir)
  shutil.rmtree(tmp_path / "other/step_00000004")
  no_numpy_features()
  train(on_device)
  assert "24399 samples, 8 answer tokens" in capsys.readouterr().err
  expected, found = losses(config.workdir), losses(on_device.workdir)
  assert found[:2] == expected[:2]
  # The longest sums are over the features, after those over a frame's samples, in each of three
  # layers and two steps.
  bound = rounding((512 + 560 * 3) * 2, max(expected))
  assert_within(found, expected, bound)
  with exceeds_the_bound():  # a step without the update before
    assert_within([*found[:3], found[2]], expected, bound)
  evaluate(on_device, config.workdir)
  texts = [read_text(Path(c.eval.out) / "text") for c in (config, on_device)]
  assert texts[0] == texts[1] and len(texts[0]) == 24


def test_cmvn_is_estimated_from_waveforms(config, no_numpy_features, monkeypatch):
  monkeypatch.setattr(start, "CMVN_BATCHES", 3)
  cmvn = {"sanm": {"shift": jnp.zeros(560), "scale": jnp.ones(560)}}
  runs = []
  for place in ("host", "device"):
    config.compute.features = place
    run = Run.read(config)
    runs.append((run, train_batches(run.data, start.read_tokenizer(run), run.model)))
  (on_host, dataset), (on_device, of_waveforms) = runs
  expected = start.measure_cmvn(on_host, dataset, cmvn)["sanm"]
  with contextlib.closing(iter(dataset)) as batches:
    inputs = [next(batches).batch for _ in range(start.CMVN_BATCHES)]
  rows = [x for b in inputs for x in zip(b.features[0], b.frames[0], strict=True)]
  exact_TF = np.concatenate([x_TF[:n] for x_TF, n in rows])
  # Each value is off by this, the mean by its mean, and a deviation by its root mean square.
  off_TF = log_energy_rounding(exact_TF, terms=512, share=2.0**-8)
  scale_F = np.asarray(expected["scale"])
  bound = {
    "shift": off_TF.mean(0) + rounding(1, np.abs(exact_TF).mean(0)),
    "scale": scale_F**2 * np.sqrt((off_TF**2).mean(0)) + rounding(2, scale_F),
  }
  no_numpy_features()
  found = start.measure_cmvn(on_device, of_waveforms, cmvn)["sanm"]
  assert_within(found, expected, bound)
  for name in ("shift", "scale"):
    with exceeds_the_bound():  # of the neighbouring feature
      assert_within(np.roll(found[name], 1), expected[name], bound[name])


def test_a_cache_of_encoder_frames_takes_no_features(config):
  config.compute.features, config.data.cache_features = "device", "cache"
  with pytest.raises(ValueError, match=r"features='device' has no effect .*cache_features='cache'"):
    train(config)
