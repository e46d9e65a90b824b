"""A tiny checkpoint that is loaded for transcription, and a long clip."""

import numpy as np
import pytest

import mooer_jax
from mooer_jax import checkpoint
from mooer_jax.audio.decode import load_audio
from mooer_jax.config import to_json
from mooer_jax.text.tokenizer import Tokenizer
from tests import tiny

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
