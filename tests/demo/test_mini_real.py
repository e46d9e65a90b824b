"""Real recordings as annotation files: whose they are, and what is said."""

import json

import numpy as np
import pytest
import soundfile

from demo.mini.real import copy_sentences, join_digits, read_transcripts
from demo.real_speech import join_varied
from demo.synthesize import SAMPLE_RATE_HZ, WORDS


def _voice(hz):
  tone = np.sin(2 * np.pi * hz * np.arange(4000) / SAMPLE_RATE_HZ).astype(np.float32)
  return {str(digit): [tone] for digit in range(10)}


def test_strings_are_of_every_speaker_and_the_same_each_time(tmp_path):
  voices = {"ann": _voice(300), "bob": _voice(500)}
  for run in ("1", "2"):
    (tmp_path / run).mkdir()
    join_digits(voices, tmp_path / run / "some.json", 24, seed=3, vary=True)
  entries = json.loads((tmp_path / "1" / "some.json").read_text("utf-8"))["annotation"]
  assert len({line["path"] for line in entries}) == 24
  assert {line["path"].split("/")[1].split("-")[0] for line in entries} == {"ann", "bob"}
  assert {len(line["text"].split()) for line in entries} == {1, 2, 3, 4, 5, 6}
  for line in entries:
    assert line["task"] == "asr" and set(line["text"].split()) <= set(WORDS)
    paths = [tmp_path / run / line["path"] for run in ("1", "2")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    # Each of the joined recordings is a quarter of a second.
    words = len(line["text"].split())
    assert 0.25 / 1.3 * words < soundfile.info(paths[0]).duration < 0.25 / 0.77 * words + 2.2


def test_a_hesitation_stands_between_two_digits():
  voice, longest = _voice(300), 0
  for seed in range(8):
    plain = join_varied(voice, "42", np.random.default_rng(seed))
    assert _longest_pause_s(plain) < 0.6
    hesitant = join_varied(voice, "42", np.random.default_rng(seed), hesitation_s=1.5)
    longest += _longest_pause_s(hesitant) > 1.4
  assert longest >= 6  # in a loud room it cannot be heard
  alone = join_varied(voice, "4", np.random.default_rng(0), hesitation_s=1.5)
  assert len(alone) < 1.2 * SAMPLE_RATE_HZ


def _longest_pause_s(speech):
  frames = speech[: len(speech) // 160 * 160].reshape(-1, 160)
  level = np.sqrt(np.mean(frames**2, axis=1))
  quiet = "".join("q" if value < 0.3 * level.max() else " " for value in level)
  return max(map(len, quiet.split())) / 100


def _corpus(folder, names):
  folder.mkdir()
  for name in names:
    soundfile.write(folder / f"{name}.wav", np.zeros(8000), 8000)
  (folder / "transcription").write_text("<s> one fish </s> (a-1)\n<s> two fish  </s> (b)\n")
  return folder


def test_sentences_are_copied_at_16_khz_with_their_words(tmp_path):
  _corpus(tmp_path / "fish", ["a-1", "b"])
  copy_sentences(tmp_path, tmp_path / "out.json")
  entries = json.loads((tmp_path / "out.json").read_text("utf-8"))["annotation"]
  assert [line["text"] for line in entries] == ["one fish", "two fish"]
  info = soundfile.info(tmp_path / entries[0]["path"])
  assert info.samplerate == SAMPLE_RATE_HZ and info.duration == 1.0


def test_a_missing_recording_or_transcript_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="no transcription file"):
    read_transcripts(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"b\.wav"):
    read_transcripts(_corpus(tmp_path / "fish", ["a-1"]).parent)
