"""The commands of the mini SALMONN fit its configs and its data."""

import importlib
import types
from pathlib import Path

import pytest

from configs import mini_salmonn
from demo.mini.plan import SpeechConfig
from demo.mini.recipe import QUICK, STAGES, Recipe, config_of, share_beyond_digits
from demo.mini.speech import entries_of, entry, write_annotations
from demo.stages import fingerprint, packaged
from mooer_jax.config import build
from mooer_jax.data.config import DataConfig
from mooer_jax.prompts import read_prompts


@pytest.mark.parametrize("stage", STAGES)
def test_the_settings_of_a_stage_are_those_of_its_config_elsewhere(stage):
  config = config_of(stage)
  for setting in Recipe(Path("out/mini")).settings(stage)[1:]:
    name, value = setting.removeprefix("--config.").split("=")
    where = config
    for part in name.split("."):
      where = where[part]
    assert where == value, name


def test_the_quick_recipe_stays_apart(monkeypatch):
  recipe = importlib.import_module("demo.mini.recipe")
  called = [QUICK.settings(stage) for stage in STAGES]
  assert "--config.train.steps=60" in QUICK.settings("tasks")
  monkeypatch.setattr(recipe, "call", lambda *words: called.append([*map(str, words)]))
  monkeypatch.setattr(recipe, "_train", lambda *_: None)
  monkeypatch.setattr(recipe.checkpoint, "find", lambda path: path)
  recipe._tune(None, QUICK)
  assert [words[-2] for words in called[len(STAGES) :]] == [
    "--instructions=story,reply",
    "--mode=lora-sweep",
  ]
  for words in called:
    assert not any("out/mini/" in word for word in words), words
    if "eval.py" in words:  # the configs' own set is that of the full recipe
      assert any(word.startswith("--config.eval.shards=") for word in words), words


def test_an_unknown_stage_is_refused():
  with pytest.raises(ValueError, match="digits, tasks, real, sentences"):
    mini_salmonn.get_config("letters")


def test_every_task_of_the_data_has_a_prompt_and_every_weight_a_task():
  config = config_of("tasks")
  prompts = read_prompts(mini_salmonn.PROMPTS)
  trained = {line["task"] for line in entries_of(SpeechConfig(), "train")["train_tasks.json"]}
  tested = {
    line["task"] for entries in entries_of(SpeechConfig(), "test").values() for line in entries
  }
  assert tested == {*prompts}
  assert {*config.data.task_weights} == trained
  assert isinstance(build(DataConfig, dict(config.data), "data"), DataConfig)


def test_a_missing_package_of_weights_is_named():
  with pytest.raises(ModuleNotFoundError, match="no_such_package_of_weights is not installed"):
    packaged("no_such_package_of_weights", "model")


def test_a_transcript_is_no_story(tmp_path):
  tasks = ["asr", "story", "story", "story"]
  write_annotations(
    tmp_path / "some.json", [entry(f"{i}.flac", t, "x") for i, t in enumerate(tasks)]
  )
  answers = ["One two.", "Two two", "Two men met.", ""]
  lines = [f"{i:07d}-{i}\t{answer}\n" for i, answer in enumerate(answers)]
  (tmp_path / "text").write_text("".join(lines), "utf-8")
  shares = share_beyond_digits(tmp_path / "some.json", tmp_path / "text")
  assert shares == {"asr": 0.0, "story": 1 / 3}


def test_recordings_of_people_are_scored_greedily_and_as_published(monkeypatch, tmp_path):
  recipe = importlib.import_module("demo.mini.recipe")
  scored = []
  for name in ("_module", "_train"):
    monkeypatch.setattr(recipe, name, lambda *_: None)
  monkeypatch.setattr(recipe, "packaged", lambda *_: (tmp_path, tmp_path))
  monkeypatch.setattr(recipe.Stages, "run", lambda *_, **__: 0.0)
  monkeypatch.setattr(recipe, "_score", lambda _, model, test, beams: scored.append(beams) or {})
  with pytest.raises(FileNotFoundError, match="no {digit}_{speaker}_{n}.wav in it or in its"):
    recipe.run(Recipe(tmp_path), fsdd=tmp_path)  # at once
  (tmp_path / "recordings").mkdir()
  (tmp_path / "recordings/0_theo_0.wav").touch()
  results = recipe.run(Recipe(tmp_path), fsdd=tmp_path)
  assert [*results] == [
    "tasks: tasks",
    "tasks: theo",
    "tasks: theo, beam 4",
    "real: theo",
    "real: theo, beam 4",
  ]
  assert scored == [1, 1, 4, 1, 4]
  assert {"num_beams", "max_new_tokens"} <= {*config_of("activation").generation}  # flags need them


def test_before_and_after_tuning_answers_may_be_as_long(monkeypatch, tmp_path):
  recipe = importlib.import_module("demo.mini.recipe")
  called = []
  monkeypatch.setattr(recipe, "call", lambda *words: called.append(words[-1]))
  monkeypatch.setattr(recipe, "share_beyond_digits", lambda *_: {})
  for model in ("tasks", "activation"):
    for test in ("probe", "test_tasks"):
      (tmp_path / f"eval/{model}-{test}-beam1").mkdir(parents=True)
      (tmp_path / f"eval/{model}-{test}-beam1/tasks.json").write_text("{}")
      recipe._score(Recipe(tmp_path), model, Path(f"{test}.json"), 1)
  limit = "--config.generation.max_new_tokens="
  assert called == [f"{limit}256", f"{limit}32"] * 2


def test_a_stage_is_trained_anew_for_other_recordings_and_settings_and_not_for_other_tests(
  monkeypatch, tmp_path
):
  recipe = importlib.import_module("demo.mini.recipe")
  monkeypatch.setattr(recipe.checkpoint, "find", lambda path: path)
  clip = tmp_path / "recordings/train_real/ann.flac"
  clip.parent.mkdir(parents=True)
  lines = [entry("train_real/ann.flac", "asr", "one")]
  write_annotations(tmp_path / "recordings/train_real.json", lines)
  config = config_of("real")
  monkeypatch.setattr(recipe.mini_salmonn, "get_config", lambda _: config)
  prints = []
  stages = types.SimpleNamespace(
    run=lambda *_, inputs, files, **__: prints.append(fingerprint(inputs, files))
  )
  for recording, clip_at, rows in ((b"a", 1.0, 1), (b"b", 1.0, 1), (b"b", 1.0, 4), (b"b", 0.5, 4)):
    clip.write_bytes(recording)
    config.optimizer.max_grad_norm, config.eval.batch_size = clip_at, rows
    recipe._train(stages, Recipe(tmp_path), "real")
  first, other, same, set_otherwise = prints
  assert other == same and len({first, other, set_otherwise}) == 3
