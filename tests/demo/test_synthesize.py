"""The demo's speech: what is held out stays held out, and one seed decides every sample."""

import dataclasses

import numpy as np
import pytest
import soundfile

from demo.espeak import Manner, synthesizer
from demo.synthesize import (
  RANDOM_VARIANTS,
  SAMPLE_RATE_HZ,
  TEST_VARIANTS,
  TRAIN_VARIANTS,
  SpeechConfig,
  is_held_out,
  plan,
  random_voice,
  render,
  write_split,
)


@pytest.fixture(scope="module")
def plans():
  return {split: plan(SpeechConfig(), split) for split in ("train", "test")}


def _variants(utterances):
  return {utterance.manner.voice.partition("+")[2] for utterance in utterances}


def test_no_voice_and_no_string_is_in_both_splits(plans):
  assert _variants(plans["train"]) == {*TRAIN_VARIANTS, *RANDOM_VARIANTS}
  assert _variants(plans["test"]) == set(TEST_VARIANTS)
  assert not {*TRAIN_VARIANTS, *RANDOM_VARIANTS} & set(TEST_VARIANTS)
  digits = {split: {u.digits for u in utterances} for split, utterances in plans.items()}
  assert not digits["train"] & digits["test"]


def test_the_splits_have_the_promised_size(plans):
  assert len(plans["train"]) == 12000
  assert len(plans["test"]) >= 200
  assert {len(u.digits) for u in plans["train"]} == {1, 2, 3, 4, 5, 6}
  assert {len(u.digits) for u in plans["test"]} == {2, 3, 4, 5, 6}
  assert len({u.key for utterances in plans.values() for u in utterances}) == 12300


def test_about_a_fifth_of_the_strings_is_held_out_but_no_single_digit():
  share = np.mean([is_held_out(f"{n:04d}") for n in range(10000)])
  assert 0.15 < share < 0.25
  assert not any(is_held_out(str(n)) for n in range(10))


def test_another_seed_makes_another_plan():
  config = SpeechConfig(train_clips=20)
  assert plan(config, "train") == plan(config, "train")
  assert plan(config, "train") != plan(dataclasses.replace(config, seed=1), "train")


@pytest.mark.parametrize(
  "split, config, message",
  [("dev", SpeechConfig(), "'train' and 'test'"), ("test", SpeechConfig(max_digits=1), "2 to 12")],
)
def test_a_bad_plan_is_refused(split, config, message):
  with pytest.raises(ValueError, match=message):
    plan(config, split)


def test_a_rendered_clip_is_audible_speech_of_plausible_length(plans):
  for utterance in plans["test"][:15]:
    speech = render(utterance)
    seconds = len(speech) / SAMPLE_RATE_HZ
    assert speech.dtype == np.float32 and np.isfinite(speech).all()
    assert np.abs(speech).max() <= 1
    assert 0.01 < np.sqrt(np.mean(speech**2)) < 0.2
    assert 0.15 * len(utterance.digits) < seconds < 0.85 * len(utterance.digits) + 0.6


def test_every_voice_exists():
  for variant in (*TRAIN_VARIANTS, *TEST_VARIANTS):
    assert len(synthesizer().say("one", Manner(f"en-us+{variant}"))) > 2000


def test_an_unknown_voice_is_refused_by_name():
  with pytest.raises(ValueError, match="xx-nowhere"):
    synthesizer().say("one", Manner("xx-nowhere"))


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
  monkeypatch.setattr("demo.synthesize.LANE_CLIPS", 5)
  utterances = plan(SpeechConfig(train_clips=15), "train")
  for processes in (1, 2):
    write_split(utterances, tmp_path / str(processes), processes=processes)
  clips = sorted((tmp_path / "1" / "wav").iterdir())
  assert {clip.stem for clip in clips} == {u.key for u in utterances}
  for clip in clips:
    assert clip.read_bytes() == (tmp_path / "2" / "wav" / clip.name).read_bytes()
  assert soundfile.info(clips[0]).samplerate == SAMPLE_RATE_HZ
  rows = (tmp_path / "1" / "text").read_text().splitlines()
  assert rows == [f"{u.key} {u.digits}" for u in utterances]


def test_the_committed_clips_are_short_speech(clips):
  assert len(clips) == 6
  for clip in clips:
    speech, rate_hz = soundfile.read(clip.path)
    assert rate_hz == SAMPLE_RATE_HZ and speech.ndim == 1
    assert 0.3 < len(speech) / rate_hz <= 1.2
    assert np.sqrt(np.mean(speech**2)) > 0.01
    assert clip.text.isdigit()


def test_random_voices_differ_and_are_not_the_accents_own():
  engine = synthesizer()
  plain = engine.say("one two", Manner("en"))
  spoken = []
  for name in RANDOM_VARIANTS[:4]:
    engine.define(name, random_voice(name))
    spoken.append(engine.say("one two", Manner(f"en+{name}")))
  everyone = [plain, *spoken]
  for first in range(len(everyone)):
    for second in range(first):
      assert not np.array_equal(everyone[first], everyone[second])
