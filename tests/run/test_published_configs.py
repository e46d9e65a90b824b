"""The configs of SALMONN's published stages hold together, at their full sizes."""

import ast
import json
import re

import pytest

from configs import mooer_7b, salmonn, salmonn_activation
from mooer_jax.run.config import Run

STAGES = [(salmonn, ",1"), (salmonn, ",2"), (salmonn_activation, "")]


@pytest.mark.parametrize("module, stage", STAGES)
@pytest.mark.parametrize("size, width", [("7b", 4096), ("13b", 5120)])
def test_a_stage_is_read(module, stage, size, width, tmp_path):
  config = module.get_config(size + stage)
  config.data.shards = str(tmp_path / "train.json")
  run = Run.read(config)
  assert run.model.decoder.hidden_size == width
  assert run.model.decoder.lora_scale == 4.0
  if module is salmonn_activation:
    assert config.activation.task in dict(run.model.prompts)
    assert run.train.steps == config.activation.clips
    assert run.perplexity.every == 1 and len(run.perplexity.instructions) == 2
    assert config.activation.task in run.perplexity.instructions


def test_a_file_of_prompts_brings_its_tasks(tmp_path):
  config = salmonn.get_config("7b,1")
  config.data.shards = str(tmp_path / "train.json")
  own = dict(Run.read(config).model.prompts)
  added = "<Speech><SpeechHere></Speech> Which words are sung?"
  config.data.prompts = str(tmp_path / "prompts.json")
  (tmp_path / "prompts.json").write_text(
    json.dumps({"lyrics_recognition": [added, f"{added}!"], "asr": ["<SpeechHere> Write."]})
  )
  assert dict(Run.read(config).model.prompts) == {**own, "lyrics_recognition": added}


def _value(text):
  """Of a Python literal, or of dict(name=literal, …)."""
  node = ast.parse(text, mode="eval").body
  if isinstance(node, ast.Call):
    return {word.arg: ast.literal_eval(word.value) for word in node.keywords}
  return ast.literal_eval(node)


def test_the_documented_diff_is_that_of_the_two_configs(repo_root):
  page = (repo_root / "docs/salmonn.md").read_text("utf-8")
  [diff] = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
  configs = {"-": mooer_7b.get_config(), "+": salmonn.get_config()}
  told = {"-": set(), "+": set()}
  for sign, name, text in re.findall(r"^([-+]) config\.([\w.]+) = (.*)$", diff, re.MULTILINE):
    where = configs[sign]
    for part in name.split("."):
      where = where[part]
    told[sign].add(name)
    if text.endswith("…}"):
      text = text.removesuffix(", …}") + "}"
      assert _value(text).items() <= where.to_dict().items()
    else:
      assert _value(text) == (where.to_dict() if hasattr(where, "to_dict") else where), name
  config = configs["-"].to_dict(), configs["+"].to_dict()
  differ = {"trainable"} | {
    f"{section}.{name}"
    for section in ("model", "data")
    for name in config[0][section].keys() | config[1][section].keys()
    if config[0][section].get(name) != config[1][section].get(name)
  }
  left_out = {f"data.{name}" for name in ("answer_buckets", "batch_size", "min_s", "prompts")}
  assert told["+"] == differ - left_out and told["-"] <= told["+"]
