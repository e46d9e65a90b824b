"""A tiny model that answers with speech."""

import dataclasses
import string

import numpy as np

from mooer_jax.prompts import TASKS
from mooer_jax.text.tokenizer import QWEN2_SPECIALS, Tokenizer
from tests import tiny

TOKENIZER = Tokenizer.from_characters(
  string.ascii_letters + ".,'\\\n ", (*QWEN2_SPECIALS, "<|audio_start|>")
)
OPTIONS = {"max_new_tokens": 24}
VOICE_N = np.random.default_rng(0).normal(size=16000).astype(np.float32) * 0.1


def make_config(**speech):
  """A model that speaks with 16 samples a token, at 16 kHz."""
  vocoder = dataclasses.replace(tiny.SPEECH.vocoder, input_width=32)
  return tiny.answering_config(
    vocab_size=TOKENIZER.vocab_size,
    max_audio_s=6.0,
    prompts=tuple(TASKS.items()),
    speech_output=tiny.speech(vocoder=vocoder, drop_last=2, **speech),
  )
