"""Real speech through the vocoder of a model: the states are those of generation."""

import dataclasses

import numpy as np
import pytest
import soundfile

import mooer_jax
from demo.mini_s2s.resynthesize import resynthesize
from tests.transcribe.speaking import TOKENIZER, VOICE_N, make_config


@pytest.fixture
def voice(tmp_path):
  path = tmp_path / "voice.wav"
  soundfile.write(path, VOICE_N, 16000, subtype="FLOAT")
  return path


def test_the_answer_of_the_model_itself_is_spoken_as_generated(
  speaking_folder, save_speaking, clips, voice, tmp_path
):
  first = mooer_jax.SpeechResponder.from_checkpoint(speaking_folder, voice=voice).model
  config = make_config(start_token=first.speech.start_token)
  # The answer is cut off, so the state at its last token predicts eos, not audio.
  speech = dataclasses.replace(config.speech_output, drop_last=1)
  folder = save_speaking(config.replace(speech_output=speech))
  responder = mooer_jax.SpeechResponder.from_checkpoint(folder, voice=voice)
  found = responder(clips[0].path, task="s2s_chat")
  assert len(found.waveform_N)
  text = TOKENIZER.decode(found.tokens, skip_special=False).replace("\n", "\\n")
  (tmp_path / "wav.scp").write_text(f"a\t{clips[0].path}\n")
  (tmp_path / "labels").write_text(f"a\t{text}\n")
  out = tmp_path / "out"
  resynthesize(folder, "s2s_chat", tmp_path / "wav.scp", tmp_path / "labels", voice, out)
  wave_N, rate_hz = soundfile.read(out / "a.wav", dtype="float32")
  assert rate_hz == 16000 and len(wave_N) == len(found.waveform_N)
  # 16-bit samples, and float32 sums in another order.
  assert np.abs(wave_N - found.waveform_N).max() < 1e-3 < 1e-2 < np.abs(wave_N).max()


def test_an_input_without_a_label_is_an_error(speaking_folder, clips, voice, tmp_path):
  (tmp_path / "wav.scp").write_text(f"a {clips[0].path}\nb {clips[1].path}\n")
  (tmp_path / "labels").write_text("b text\n")
  with pytest.raises(ValueError, match="a: no label"):
    resynthesize(
      speaking_folder, "s2s_chat", tmp_path / "wav.scp", tmp_path / "labels", voice, tmp_path
    )
