"""The corpus of the mini speech-to-speech model has no held-out combination in training."""

import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import mini_s2s
from demo.asterisk import LANGUAGES
from demo.mini_s2s import corpus, recipe
from demo.mini_s2s.corpus import SPLITS, TOKEN_SAMPLES, CorpusConfig, Voice, plan
from demo.mini_s2s.numbers import NUMBERS, Utterance, prompts_of, sequence, sequences, sums
from demo.mini_s2s.recipe import FULL, QUICK, failures
from mooer_jax.evaluation.text_files import read_text, write_text
from mooer_jax.run.config import Run
from mooer_jax.speech_llm import param_shapes
from mooer_jax.vocoders import PARTS

# Prompts of whole numbers, as in the packages: es has all below 30, it those with an elision.
RECORDED = {
  "es": {*range(31)},
  "it": {*range(21), *(tens + ones for tens in range(20, 100, 10) for ones in (1, 8))},
}


def _recorded(language):
  numbers = RECORDED.get(language, {*range(21)}) | {*range(0, 100, 10)}
  others = {"letters/plus", "digits/minus", "digits/and", "vm-and"}
  return {f"digits/{n}" for n in numbers} | others


@pytest.mark.parametrize(
  "language, number, prompts",
  [
    ("en", 42, "40 2"),
    ("en", -7, "minus 7"),
    ("es", 29, "29"),
    ("es", 31, "30 and 1"),
    ("fr", 21, "20 vm-and 1"),
    ("fr", 22, "20 2"),
    ("fr", 71, "60 vm-and 11"),
    ("fr", 81, "80 1"),
    ("fr", 99, "80 19"),
    ("it", 48, "48"),
    ("it", 47, "40 7"),
    ("ru", 90, "90"),
  ],
)
def test_a_number_is_said_as_in_its_language(language, number, prompts):
  names = [n.removeprefix("digits/") for n in _names(number, language)]
  assert " ".join(names) == prompts


def _names(number, language):
  return prompts_of(number, language, _recorded(language).__contains__)


@pytest.mark.parametrize("language", LANGUAGES)
def test_different_numbers_are_said_differently_with_recorded_prompts(language):
  said = {n: tuple(_names(n, language)) for n in range(-99, 100)}
  assert len({*said.values()}) == len(said)
  assert {name for names in said.values() for name in names} <= _recorded(language)


def test_the_text_separates_numbers_and_has_the_sign():
  texts = {name: name.rpartition("/")[2].upper() for name in _recorded("en")}
  assert sequence(42, 7).text("en", texts) == "40 2, 7"
  assert Utterance((3, 12), (0, -1)).text("en", texts) == "3 minus 12"


def test_names_differ_where_utterances_do():
  said = [*sums(), *(sequence(a, b) for a in NUMBERS for b in NUMBERS), sequence(-3), sequence(3)]
  assert len({u.name for u in said}) == len(said)
  assert all(u.name.replace("_", "").isalnum() and u.name.isascii() for u in said)


@pytest.mark.parametrize("task", ["trans", "sums"])
def test_no_combination_is_in_both_splits(task):
  train, test = ({c.utterance for c in plan(CorpusConfig(), task, split)} for split in SPLITS)
  assert train and test and not train & test
  assert all(u.held_out for u in test) and not any(u.held_out for u in train)
  if task == "trans":  # nor is the target
    assert not {c.answer for c in plan(CorpusConfig(), "trans", "train")} & test
  else:
    operands = {n for u in train for n in u.numbers}
    assert {n for u in test for n in u.numbers} <= operands


def test_keys_are_unique_and_the_plan_is_repeatable():
  clips = [c for task in ("trans", "sums") for s in SPLITS for c in plan(CorpusConfig(), task, s)]
  assert len({c.key for c in clips}) == len(clips)
  assert len({c.seed for c in clips if c.key.startswith("trans")}) == sum(
    c.key.startswith("trans") for c in clips
  )
  assert plan(CorpusConfig(), "trans", "train") == plan(CorpusConfig(), "trans", "train")
  assert plan(CorpusConfig(seed=1), "trans", "test") != plan(CorpusConfig(), "trans", "test")


def test_every_number_is_in_training():
  drawn = sequences(150, held_out=False, seed=0)
  assert {n for u in drawn for n in u.numbers} == {*NUMBERS}
  assert len({*drawn}) == 150


class _Prompt(types.SimpleNamespace):
  def samples(self):
    """A tone after 0.1 s of silence, as long as the name is."""
    n = 1000 * len(self.text) + 123
    tone = np.sin(np.arange(n) * len(self.text) / 40)
    return np.concatenate([np.zeros(1600), 0.5 * tone]).astype(np.float32)


@pytest.fixture
def recordings(monkeypatch):
  def read(_, language):
    return {name: _Prompt(text=name.rpartition("/")[2]) for name in _recorded(language)}

  monkeypatch.setattr(corpus, "read_prompts", read)
  monkeypatch.setattr(corpus, "download", lambda *_: None)


def test_words_of_the_target_start_on_the_grid_of_tokens(recordings):
  voice = Voice(Path(), "en")
  one, other = voice.target(sequence(42, 7)), voice.target(sequence(42))
  assert one.dtype == np.float32 and len(one) % TOKEN_SAMPLES == 0
  edge = corpus.EDGE_TOKENS * TOKEN_SAMPLES
  # The same words have the same samples, so the same tokens, whatever follows.
  assert np.array_equal(one[: len(other) - edge], other[:-edge])
  tail = voice.target(sequence(7))[edge:]
  assert np.array_equal(one[-len(tail) :], tail)


def test_an_input_varies_in_training_only(recordings):
  voice = Voice(Path(), "es")

  def spoken(seed, vary):
    return voice.input(sequence(31, 7), np.random.default_rng(seed), vary=vary)

  assert np.array_equal(spoken(0, True), spoken(0, True))
  assert not np.array_equal(spoken(0, True), spoken(1, True))
  assert spoken(0, False).dtype == np.float32 and np.abs(spoken(0, False)).max() <= 1


def test_the_lists_of_the_corpus_fit_together(recordings, monkeypatch, tmp_path):
  monkeypatch.setattr(corpus, "shared_names", lambda _: ["vm-and", "digits/7"])
  held_out = next(u for u in sums() if u.held_out)
  some = {u: sums()[u] for u in (Utterance((3, 8), (0, 1)), held_out)}
  monkeypatch.setattr(corpus, "sums", lambda: some)
  config = CorpusConfig(sequences=3, test_sequences=2, versions=1)
  corpus.make_corpus(config, tmp_path, tmp_path / "data")
  for task in ("trans", "sums", "parallel"):
    for split in SPLITS:
      folder = tmp_path / "data" / task / split
      lists = [read_text(folder / name) for name in ("wav.scp", "text", "labels", "targets")]
      assert len({tuple(each) for each in lists}) == 1, (task, split)
      if task != "parallel":
        assert lists[0]
        english = read_text(tmp_path / "data" / "english" / split / "text")
        for key, target in lists[3].items():
          assert english[Path(target).stem] == lists[2][key]
      assert all(Path(path).is_file() for each in (lists[0], lists[3]) for path in each.values())
  written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
  first = next(iter(written))
  first.unlink()
  corpus.make_corpus(config, tmp_path, tmp_path / "data")  # as after an interruption
  now = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
  assert {p for p in now if now[p] != written[p]} == {first}
  with pytest.raises(ValueError, match=r"corpus\.json has other settings"):
    corpus.make_corpus(CorpusConfig(), tmp_path, tmp_path / "data")


def test_prompts_that_numbers_are_made_of_are_not_held_out():
  names = [f"prompt-{n}" for n in range(200)]
  assert 0 < sum(map(corpus.is_held_out, names)) < 60
  assert not any(corpus.is_held_out(f"digits/{n}") for n in NUMBERS)


@pytest.mark.parametrize("stage", mini_s2s.STEPS)
def test_a_stage_is_read(stage):
  config = mini_s2s.get_config(stage)
  run = Run.read(config)
  tasks = {source.task for source in run.data.mixture.values()} - {""}
  assert tasks <= {*dict(run.model.prompts)}
  assert len(config.characters) + len(config.specials) <= run.model.decoder.vocab_size
  assert len({*config.characters}) == len(config.characters)
  if stage == "vocoder":
    speech = run.model.speech_output
    assert speech.vocoder.samples_per_frame == TOKEN_SAMPLES
    assert speech.start_token in config.specials
    assert tasks == {*recipe.TASKS.values()}  # all that is spoken
    shapes = param_shapes(run.model)
    sizes = [leaf.size for part in PARTS for leaf in jax.tree.leaves(shapes[part])]
    assert sum(sizes) <= 2_000_000


def test_the_quick_recipe_stays_apart():
  for stage in mini_s2s.STEPS:
    words = QUICK.settings(stage)
    assert "--config.train.steps=40" in words
    assert not any("out/mini-s2s/" in word for word in words)
    moved = {w.partition("=")[0] for w in words if "out/mini-s2s-quick/" in w}
    assert {"--config.workdir", "--config.data.mixture.trans.shards"} <= moved
  assert FULL.settings("asr") == ["--config=configs/mini_s2s.py:asr"]


def test_an_answer_without_audio_tokens_is_named(tmp_path, monkeypatch):
  data, labels = tmp_path / "data", tmp_path / "labels"
  write_text(labels.parent / "encoded", {"a": "one<|audio_start|><A_1>"})
  for task in recipe.TASKS:
    write_text(
      data / task / "train" / "targets", {f"{task}-1": "x/a.flac", f"{task}-2": "x/b.flac"}
    )

  def encode(*words):
    shutil.copy(tmp_path / "encoded", str(words[-1]).removeprefix("--out="))

  monkeypatch.setattr(recipe, "call", encode)
  with pytest.raises(RuntimeError, match="no audio tokens of x/b.flac and 0 others"):
    recipe._label(data, tmp_path, tmp_path, tmp_path, labels)


def test_a_missed_goal_is_named():
  scores = {"trans": {"error_rate": 0.1}, "sums": {"error_rate": 0.2}}
  [message] = failures({"scores": scores, "goal_wer": 0.15})
  assert message.startswith("sums: WER of the speech is 20.0 %")
