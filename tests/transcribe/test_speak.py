"""`mooer-jax speak`: the files that it writes, bad input, interruptions."""

import shutil

import numpy as np
import pytest
import soundfile

import mooer_jax
from mooer_jax import cli
from tests.transcribe.speaking import VOICE_N, make_config


@pytest.fixture
def speak(speaking_folder, tmp_path, clips, capsys):
  """Runs the command on the named files of tmp_path; returns (status, stdout, stderr)."""
  for clip, name in zip(clips, ("a.wav", "b.wav"), strict=False):
    shutil.copy(clip.path, tmp_path / name)
  soundfile.write(tmp_path / "voice.wav", VOICE_N, 16000, subtype="FLOAT")

  def run(
    *names, checkpoint=speaking_folder, voice="voice.wav", out="out", task="s2s_chat", **more
  ):
    flags = {"checkpoint": checkpoint, "task": task, "out": tmp_path / out, **more}
    if voice:
      flags["voice"] = tmp_path / voice
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    status = cli.main(["speak", *given, *(str(tmp_path / name) for name in names)])
    return status, *capsys.readouterr()

  return run


def files(folder):
  return sorted(path.name for path in folder.iterdir())


def test_each_file_becomes_a_wav_and_a_text(speak, speaking_folder, tmp_path):
  status, out, err = speak("a.wav", "b.wav")
  assert status == 0 and files(tmp_path / "out") == ["a.txt", "a.wav", "b.txt", "b.wav"]
  responder = mooer_jax.SpeechResponder.from_checkpoint(
    speaking_folder, voice=tmp_path / "voice.wav"
  )
  for name, line in zip("ab", out.splitlines(), strict=True):
    expected = responder(tmp_path / f"{name}.wav", task="s2s_chat")
    waveform_N, rate_hz = soundfile.read(tmp_path / f"out/{name}.wav", dtype="float32")
    assert rate_hz == 16000
    np.testing.assert_allclose(waveform_N, expected.waveform_N, rtol=0, atol=1e-4)
    assert (tmp_path / f"out/{name}.txt").read_text("utf-8") == expected.text + "\n"
    assert line == f"{tmp_path / name}.wav\t{' '.join(expected.text.split())}"
  assert err.count("truncated at max_new_tokens=24") == 2


def test_speech_is_resampled(speak, tmp_path):
  assert speak("a.wav")[0] == speak("a.wav", out="low", **{"sample-rate-hz": 8000})[0] == 0
  high, low = (soundfile.info(tmp_path / folder / "a.wav") for folder in ("out", "low"))
  assert (high.samplerate, low.samplerate) == (16000, 8000)
  assert abs(high.duration - low.duration) <= 1 / 8000
  status, _, err = speak("a.wav", out="x", **{"sample-rate-hz": 100})
  assert status == 2 and "--sample-rate-hz 100: must be from 8000 to 192000 Hz" in err


def test_an_interrupted_run_resumes(speak, tmp_path, monkeypatch):
  """Finished files stay; an unfinished one leaves nothing behind, and is made again."""
  write = soundfile.write

  def interrupt(file, *args, **more):
    write(file, *args, **more)
    if ".b.wav" in str(file):
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(soundfile, "write", interrupt)
    assert speak("a.wav", "b.wav")[0] == 130
  assert files(tmp_path / "out") == ["a.txt", "a.wav"]
  before = (tmp_path / "out/a.wav").stat().st_mtime_ns
  (tmp_path / "out/b.wav").write_bytes(b"without a text: not finished")
  status, out, err = speak("a.wav", "b.wav")
  assert status == 0 and f"a.wav: skipped, {tmp_path}/out/a.txt exists; delete it" in err
  assert len(out.splitlines()) == 1
  assert files(tmp_path / "out") == ["a.txt", "a.wav", "b.txt", "b.wav"]
  assert (tmp_path / "out/a.wav").stat().st_mtime_ns == before
  assert soundfile.info(tmp_path / "out/b.wav").frames
  assert speak("a.wav", "b.wav", checkpoint="not/even/loaded")[:2] == (0, "")


def test_a_bad_clip_does_not_stop_the_others(speak, tmp_path):
  (tmp_path / "bad.wav").write_bytes(b"no audio")
  status, _, err = speak("bad.wav", "missing.wav", "a.wav")
  assert status == 1 and files(tmp_path / "out") == ["a.txt", "a.wav"]
  lines = [line for line in err.splitlines() if line.startswith("not answered: ")]
  assert [name in line for name, line in zip(("bad", "missing"), lines, strict=True)] == [True] * 2


def test_an_answer_without_speech_is_text(speak, save_speaking, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out/a.wav").touch()  # of an earlier run
  status, out, err = speak("a.wav", checkpoint=save_speaking(make_config()))
  assert status == 0 and files(tmp_path / "out") == ["a.txt"]
  assert (tmp_path / "out/a.txt").read_text("utf-8").split() == out.split() != []
  assert "a.wav: no speech: the model did not generate '<|audio_start|>'" in err


def test_bad_arguments_are_errors(speak, tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "sub").mkdir()
  (tmp_path / "voices").mkdir()
  shutil.copy(tmp_path / "voice.wav", tmp_path / "voices/a.wav")
  shutil.copy(tmp_path / "a.wav", tmp_path / "sub/a.flac")
  soundfile.write(tmp_path / "short.wav", VOICE_N[:1600], 16000)
  for names, options, message in (
    (["a.wav"], dict(task="s2s"), "task='s2s': the model has ['asr',"),
    (["a.wav"], dict(voice=None), "no voice: the checkpoint has no prompt.wav"),
    (["a.wav"], dict(voice="short.wav"), "short.wav: 0.10 s is too short for a voice"),
    (["a.wav"], dict(voice="none.wav"), "none.wav"),
    (["a.wav"], dict(seed=1), "seed has no effect without sampling"),
    (["a.wav", "sub/a.flac"], {}, "a.wav and " + str(tmp_path / "sub/a.flac") + " would both"),
    (["a.wav"], dict(out="."), "a.wav is one of the input files; name another folder"),
    (["a.wav"], dict(voice="voices/a.wav", out="voices"), "voices/a.wav is one of the input files"),
    (["a.wav"], dict(out="file"), "file: is a file; name a folder"),
    (["a.wav"], dict(out="file/out"), "Not a directory"),
    (["a.wav"], dict(checkpoint=tmp_path / "sub"), "sub: neither a checkpoint"),
  ):
    status, out, err = speak(*names, **options)
    assert status == 2 and out == "" and message in err and len(err.splitlines()) == 1, err
  assert not [*(tmp_path / "out").glob("*")]


def test_nothing_is_written_into_a_checkpoint(speak, speaking_folder):
  status, _, err = speak("a.wav", out=speaking_folder / "out")
  assert status == 2 and f"is in the checkpoint {speaking_folder}" in err


def test_a_folder_that_is_not_writable_is_an_error(speak, monkeypatch, tmp_path):
  (tmp_path / "out").mkdir(mode=0o500)
  real = type(tmp_path).touch

  def touch(path, *args, **more):
    if path.parent == tmp_path / "out":  # root may write everywhere
      raise PermissionError(13, "Permission denied", str(path))
    real(path, *args, **more)

  monkeypatch.setattr(type(tmp_path), "touch", touch)
  status, _, err = speak("a.wav", checkpoint="not/even/loaded")
  assert status == 2 and "Permission denied" in err
