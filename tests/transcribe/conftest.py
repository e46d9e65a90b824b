"""A tiny checkpoint that is loaded for transcription, and a long clip."""

import numpy as np
import pytest

import mooer_jax
from mooer_jax import checkpoint, tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.config import to_json
from mooer_jax.text.tokenizer import Tokenizer
from tests import tiny
from tests.transcribe.speaking import OPTIONS, TOKENIZER, VOICE_N, make_config

PROMPTS = (("asr", "<|transcribe|>"), ("ast", "<|end|>"), ("asr_ast_mtl", "0"), ("QA", "{}0"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint of a tiny random model, whose answers depend on what it hears."""
  tokenizer = Tokenizer.from_characters("0123456789", ("<|transcribe|>", "<|end|>"), eos="<|end|>")
  config = tiny.answering_config(
    vocab_size=12, chat_template="bare", max_audio_s=6.0, prompts=PROMPTS
  )
  return checkpoint.save(
    tmp_path_factory.mktemp("run") / "step_00000001",
    params=tiny.answering_params(config),
    config_json=to_json(config),
    tokenizer=tokenizer.save,
    generation={"max_new_tokens": 6},
  )


@pytest.fixture(scope="module")
def transcriber(folder):
  return mooer_jax.Transcriber.from_checkpoint(folder)


@pytest.fixture(scope="module")
def long_clip(clips):
  """18 seconds of speech, 7 of silence, speech again."""
  spoken = np.concatenate([load_audio(clip.path) for clip in clips])
  spoken = np.resize(spoken, 18 * 16000)
  return np.concatenate([spoken, np.zeros(7 * 16000, np.float32), spoken[: 2 * 16000]])


@pytest.fixture(scope="session")
def speaking_params():
  """Random parameters; the layers of the vocoder keep the magnitude of their inputs."""
  made = tiny.answering_params(make_config())
  vocoder = tree.flatten(made["vocoder"])
  vocoder = {path: np.ones_like(x) if path.endswith("/g") else x for path, x in vocoder.items()}
  return {**made, "vocoder": tree.unflatten(vocoder)}


@pytest.fixture(scope="session")
def save_speaking(speaking_params, tmp_path_factory):
  """Saves a checkpoint of the model; its config, tokenizer and source may be others."""

  def run(config, *, params=speaking_params, tokenizer=TOKENIZER, generation=OPTIONS, source=None):
    return checkpoint.save(
      tmp_path_factory.mktemp("run") / "step_00000001",
      params=params,
      config_json=to_json(config),
      tokenizer=tokenizer.save,
      generation=generation,
      source=source,
    )

  return run


@pytest.fixture(scope="session")
def speaking_folder(save_speaking, clips):
  """A checkpoint whose start token is one that it generates for a clip."""
  quiet = save_speaking(make_config())
  found = mooer_jax.SpeechResponder.from_checkpoint(quiet, voice=VOICE_N)(
    clips[0].path, task="s2s_chat"
  )
  assert found.no_speech and not len(found.waveform_N)
  first = [n for n, token in enumerate(found.tokens) if token not in found.tokens[:n]]
  start_id = found.tokens[next(n for n in first if n >= 2)]
  return save_speaking(make_config(start_token=TOKENIZER.decode([start_id], skip_special=False)))
