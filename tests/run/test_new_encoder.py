"""An encoder of one file and one entry in KINDS trains, resumes, transcribes and converts."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import mooer_jax
from configs import tiny
from convert import kinds
from convert.core.kind import Kind, Part
from convert.main import main
from mooer_jax import checkpoint, encoders, tree
from mooer_jax.checkpoint import LazyArray
from mooer_jax.config import from_json
from mooer_jax.text.tokenizer import Tokenizer
from tests.encoders.toy import ToyConfig
from tests.run.programs import train

TOKENS = ("<|transcribe|>", "<|end|>")  # of configs/tiny.py
LEAVES = {
  "frontend/toy/shift": (56,),
  "frontend/toy/scale": (56,),
  "encoders/toy/up/kernel": (56, 32),
  "encoders/toy/up/bias": (32,),
  "encoders/toy/down/kernel": (32, 48),
  "encoders/toy/down/bias": (48,),
}


def open_toy(src, options, problems):
  rng = np.random.default_rng(0)
  arrays = {p: rng.normal(size=shape).astype(np.float32) for p, shape in LEAVES.items()}
  leaves = {p: LazyArray(x.shape, x.dtype, lambda x=x: x) for p, x in arrays.items()}
  size = ToyConfig.SIZES["toy_large"]
  tokenizer = Tokenizer.from_characters(tiny.DIGITS, TOKENS, eos=TOKENS[-1])
  tokenizer = tokenizer.save
  part = Part(config=size, leaves=leaves, style={}, frontend=size.frontend(), tokenizer=tokenizer)
  return part.alone()


KIND = Kind(name="toy", open=open_toy)


@pytest.fixture
def toy_config(config, monkeypatch):
  monkeypatch.setattr(encoders, "KINDS", (*encoders.KINDS, ToyConfig))
  config.model.encoders = ("toy_large",)
  del config.model.sanm
  config.model.toy = {"gain": 0.5}
  return config


def test_it_trains_resumes_and_transcribes(toy_config, clips):
  toy_config.train.steps = 4
  assert train(toy_config).name == "step_00000004"
  toy_config.train.steps = 6
  folder = train(toy_config)
  rows = (folder.parent / "metrics.jsonl").read_text().splitlines()
  losses = [json.loads(row)["loss"] for row in rows]
  assert len(losses) == 6 and losses[-1] < losses[0]
  about = checkpoint.load(folder)
  assert from_json(about.config).encoders == (
    dataclasses.replace(ToyConfig.SIZES["toy_large"], gain=0.5),
  )
  assert {p: x.shape for p, x in tree.flatten(about.params).items() if "toy" in p} == LEAVES
  [result] = mooer_jax.Transcriber.from_checkpoint(folder).transcribe([clips[0].path])
  assert result.seconds > 0 and set(result.text) <= set("0123456789")


def test_it_is_imported_and_fine_tuned(toy_config, tmp_path, monkeypatch):
  """A run may change RUN_FIELDS, here `gain`, but no size."""

  monkeypatch.setitem(kinds.KINDS, "toy", f"{__name__}:KIND")
  assert main(["import", "toy", str(tmp_path), str(tmp_path / "encoder")]) == 0
  imported = checkpoint.load(tmp_path / "encoder").params
  toy_config.init_from = str(tmp_path / "encoder")
  toy_config.trainable = ("connector/.*", "decoder/.*")
  toy_config.train.update({"steps": 4, "cmvn": ""})
  tuned = checkpoint.load(train(toy_config)).params
  jax.tree.map(np.testing.assert_array_equal, imported["encoders"], tuned["encoders"])
  toy_config.workdir = str(tmp_path / "other")
  toy_config.model.encoders = ("toy_small",)
  with pytest.raises(ValueError, match="encoders/0/hidden_size is 48, in the config 24"):
    train(toy_config)
