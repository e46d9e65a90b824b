"""A small SALMONN from two joined parts: mixed tasks, cached frames, evaluation of each task."""

import json

import jax
import numpy as np
import pytest

from convert.joining import join
from mooer_jax import checkpoint, speech_llm
from mooer_jax.config import part_to_json
from mooer_jax.run.defaults import default_config
from mooer_jax.run.evaluate import evaluate
from mooer_jax.run.setup import read_model
from mooer_jax.run.train import train
from mooer_jax.text.tokenizer import Tokenizer

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 ?\n"


@pytest.fixture(scope="module")
def settings(clips, tmp_path_factory):
  """A config whose init_from are joined parts, and annotations of the committed clips."""
  folder = tmp_path_factory.mktemp("mixed")
  entries = []
  for clip in clips:
    entries.append({"path": str(clip.path), "text": clip.text, "task": "asr"})
    entries.append({"path": str(clip.path), "text": "yes", "task": "keyword", "Q": clip.text[0]})
  (folder / "train.json").write_text(json.dumps({"annotation": entries}))
  config = default_config()
  config.workdir = str(folder / "run")
  config.init_from = str(folder / "base")
  config.trainable = ("encoder_norms/.*", "connector/.*", "decoder/.*/lora_[ab]")
  config.model.encoders = ("whisper_tiny",)
  config.model.encoder_norm = True
  config.model.connector = "qformer"
  config.model.decoder = "smollm2_135m"
  config.model.template = "chatml"
  config.model.prompts = {
    "asr": "<SpeechHere> write", "keyword": "<SpeechHere> is {} said?",
  }  # fmt: skip
  config.model.max_audio_s = 4.0
  config.model.whisper = dict(
    width=32, layers=2, heads=2, mlp_width=48, positions=200, context=200, trim=True
  )
  config.model.qformer = dict(window=17, width=32, layers=1, heads=2, mlp_width=48, edge="pad")
  config.model.llm = dict(
    vocab=48, width=32, layers=2, heads=2, kv_heads=1, head_width=16, mlp_width=48, lora_rank=2,
    lora_targets=("q", "v"),
  )  # fmt: skip
  config.data.shards = str(folder / "train.json")
  config.data.task = ""
  config.data.prompt_tokens = 60
  config.data.batch_size, config.data.window = 8, 8
  config.data.buckets, config.data.answer_buckets = (400,), (6,)
  config.data.max_s = 4.0
  config.optimizer.warmup = "linear"
  config.optimizer.warmup_steps = 1
  config.optimizer.decay = "constant"
  config.train.steps = 3
  config.generation.max_new_tokens = 6
  config.eval.shards = config.data.shards
  config.eval.task, config.eval.batch_size = "", 4
  return folder, config


@pytest.fixture(scope="module")
def base(settings):
  """The joined checkpoint, of random parts."""
  folder, config = settings
  model = read_model(config, scan=False)
  params = speech_llm.init(jax.random.key(0), model)
  tokenizer = Tokenizer.from_characters(CHARACTERS, SPECIALS, eos="<|im_end|>")
  heard = checkpoint.save(
    folder / "whisper",
    params={"encoders": params["encoders"]},
    config_json={
      "encoders": [part_to_json(e) for e in model.encoders],
      "frontends": [part_to_json(f) for f in model.frontends],
    },
    tokenizer=lambda out: None,
    generation={},
  )
  layers = jax.tree_util.tree_map_with_path(
    lambda path, x: None if "lora" in jax.tree_util.keystr(path) else x, params["decoder"]
  )
  plain = {**part_to_json(model.decoder), "lora_rank": 0}
  llm = checkpoint.save(
    folder / "llm",
    params={"decoder": _without_none(layers)},
    config_json={"decoder": plain},
    tokenizer=tokenizer.save,
    generation={},
  )
  join(folder / "base", [heard, llm])
  return folder / "base"


def _without_none(node):
  if not isinstance(node, dict):
    return node
  return {key: _without_none(value) for key, value in node.items() if value is not None}


def _metrics(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_cached_frames_train_alike_and_each_task_is_scored(settings, base, tmp_path, capsys):
  _, config = settings
  rows = {}
  for name, cache in (("plain", ""), ("cached", str(tmp_path / "cache"))):
    config.workdir, config.data.cache_features = str(tmp_path / name), cache
    saved = train(config)
    rows[name] = _metrics(tmp_path / name)
  for plain, cached in zip(rows["plain"], rows["cached"], strict=True):
    # Frames are rounded to float16; nothing else differs.
    np.testing.assert_allclose(cached["loss"], plain["loss"], rtol=1e-3)
    assert cached["tasks"].keys() == plain["tasks"].keys() <= {"asr", "keyword"}
  tokens = sum(task["tokens"] for row in rows["plain"] for task in row["tasks"].values())
  assert tokens == sum(row["tokens"] for row in rows["plain"])

  # The second time nothing is encoded, and a run goes on.
  (index,) = (tmp_path / "cache").glob("*/index.jsonl")
  assert len(index.read_text().splitlines()) == 6  # clips, not utterances
  config.train.steps = 4
  assert checkpoint.step_of(train(config)) == 4
  assert len(index.read_text().splitlines()) == 6

  config.eval.out = str(tmp_path / "scored")
  evaluate(config, str(saved))
  scores = json.loads((tmp_path / "scored/tasks.json").read_text())
  assert {task: s["count"] for task, s in scores.items()} == {"asr": 6, "keyword": 6}
  assert "keyword" in capsys.readouterr().out


def test_a_trained_encoder_cannot_be_cached(settings, base, tmp_path):
  _, config = settings
  config = config.copy_and_resolve_references()
  config.workdir, config.data.cache_features = str(tmp_path / "a"), str(tmp_path / "cache")
  config.trainable = (*config.trainable, "encoders/.*")
  with pytest.raises(ValueError, match="encoders/whisper/.* is trained; leave the encoders out"):
    train(config)


def test_parts_of_another_size_are_refused_by_name(settings, base, tmp_path):
  _, config = settings
  config = config.copy_and_resolve_references()
  config.workdir, config.data.cache_features = str(tmp_path / "a"), ""
  config.model.llm.mlp_width = 64
  with pytest.raises(ValueError, match="decoder/mlp_width is 48, the config says 64"):
    train(config)
