"""The stages of configs/mooer_omni.py: read at full size, and trained one after another, tiny."""

import json

import jax
import numpy as np
import pytest

from configs import mooer_omni
from mooer_jax import checkpoint, speech_llm, tree
from mooer_jax.config import to_json
from mooer_jax.run.config import Run
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.units.add_tokens import token_names
from mooer_jax.units.token_vectors import UnitEncoder
from tests.run.programs import train

SOURCES = {"1": ["audio_text"], "2": ["audio_text", "text_audio"]}
SOURCES["3"] = [*SOURCES["2"], "audio_audio"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyzATY0123456789 .\n"


@pytest.mark.parametrize("stage", "123")
def test_a_stage_is_read(stage):
  config = mooer_omni.get_config(stage)
  assert {*config.data.mixture} == {*SOURCES[stage]}
  run = Run.read(config)
  weights = {name: of.weight for name, of in run.data.mixture.items()}
  expected = dict(zip(("audio_text", "text_audio", "audio_audio"), (0.3, 0.3, 0.4)))
  assert weights == {name: expected[name] for name in SOURCES[stage]}
  assert {name for name, of in run.data.mixture.items() if of.labels} == {
    name for name in SOURCES[stage] if name.endswith("_audio")
  }
  before = "base" if stage == "1" else f"{int(stage) - 1}/step_{run.train.steps:08d}"
  assert str(run.init_from) == f"out/omni/{before}"
  assert {of.task for of in run.data.mixture.values()} == {*dict(run.model.prompts)}
  # The rows that `units add-tokens --count 1000` gives Qwen2's 151,646 tokens.
  assert run.model.decoder.vocab_size == -(-(151_646 + 1001) // 128) * 128
  assert run.generation["max_new_tokens"] >= run.data.answer_buckets[-1]


def test_another_stage_is_refused():
  with pytest.raises(ValueError, match=r"mooer_omni\.py:4: must be one of 1, 2, 3"):
    mooer_omni.get_config("4")


@pytest.fixture(scope="module")
def data(clips, tmp_path_factory):
  """Folder with a raw list of the clips, one of questions in text, and labels with speech."""
  folder = tmp_path_factory.mktemp("omni")
  audio = [{"key": c.key, "wav": str(c.path), "txt": c.text} for c in clips]
  text = [{"key": c.key, "Q": f"say {c.text}", "txt": c.text} for c in clips]
  for name, lines in (("audio.jsonl", audio), ("text.jsonl", text)):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
  labels = "".join(f"{c.key}\t{c.text}<|audio_start|><A_0><A_2><A_1>\n" for c in clips)
  (folder / "labels").write_text(labels)
  return folder


def _tiny(stage, data, workdir, init_from):
  config = mooer_omni.get_config(stage)
  config.workdir, config.init_from = str(workdir), str(init_from)
  config.model.sanm = dict(hidden_size=16, layers=2, heads=2, intermediate_size=16)
  config.model.linear = dict(hidden_size=16)
  config.model.llm.update(
    vocab_size=64, hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, intermediate_size=16,
    lora_rank=2,
  )  # fmt: skip
  for name, source in config.data.mixture.items():
    source.shards = str(data / ("text.jsonl" if name == "text_audio" else "audio.jsonl"))
    source.labels = "" if name == "audio_text" else str(data / "labels")
  config.data.batch_size, config.data.shuffle_buffer_size, config.data.workers = 10, 10, 0
  config.data.buckets, config.data.answer_buckets, config.data.max_s = (40,), (8,), 2.0
  config.compute.dtype, config.compute.remat = "float32", "none"
  config.optimizer.warmup, config.optimizer.warmup_steps = "linear", 1
  config.train.steps = config.train.save_every = 2
  config.train.gradient_accumulation_steps = 1
  if stage != "1":
    config.data.prompt_tokens = 180  # characters
  return config


@pytest.fixture(scope="module")
def base(data):
  """Joined parts of random values, without a connector; the LLM has three audio tokens."""
  config = _tiny("1", data, data / "run", "")
  config.model.llm.lora_rank = 0
  model = Run.read(config).model.with_compute(scan=False)
  params = jax.jit(lambda key: speech_llm.init(key, model))(jax.random.key(0))
  tokenizer = Tokenizer.from_characters(CHARACTERS)
  tokenizer = tokenizer.with_special_tokens(token_names(3, "<|audio_start|>"))
  checkpoint.save(
    data / "base",
    params={name: part for name, part in params.items() if name != "connector"},
    config_json={name: to_json(model)[name] for name in ("encoders", "frontends", "decoder")},
    tokenizer=tokenizer.save,
    generation={},
  )
  return data / "base"


def test_each_stage_trains_and_the_next_one_starts_from_it(base, data, tmp_path):
  start, before = base, None
  for stage in "123":
    start = train(_tiny(stage, data, tmp_path / stage, start))
    rows = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").open()]
    assert len(rows) == 2
    assert np.isfinite([[row["loss"], row["grad_norm"]] for row in rows]).all()
    assert not (tmp_path / stage / "skipped.jsonl").exists()
    if stage == "1":
      assert all(row["audio_s"] > 0 for row in rows)
    tasks = {task for row in rows for task in row["tasks"]}
    assert tasks == {*dict(Run.read(_tiny(stage, data, tmp_path / stage, start)).model.prompts)}
    after = tree.flatten(checkpoint.load(start).params)
    if before is not None:
      moved = {path for path, x in after.items() if (np.asarray(x) != before[path]).any()}
      assert "decoder/embed/embedding" in moved and "decoder/head/kernel" in moved
      assert not any(path.startswith("encoders/") for path in moved)
    before = {path: np.asarray(x) for path, x in after.items()}
  first, last = (UnitEncoder.load(tmp_path / stage).hash for stage in "13")
  assert first == last  # so the audio tokens of stage 1 are those of stage 3
