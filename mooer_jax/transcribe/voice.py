"""Voices that speech is generated in: recordings to speaker vectors."""

import functools
import hashlib
import os

import jax
import numpy as np

from mooer_jax import speech_llm
from mooer_jax.audio.decode import SILENCE, AudioError, check_samples, load_audio, read_file
from mooer_jax.audio.speaker_mel import SAMPLE_RATE_HZ, speaker_mel
from mooer_jax.config import SpeechLLMConfig

SHORTEST_S = 0.5
Voice = str | os.PathLike | bytes | np.ndarray


class Voices:
  """Speaker vectors of recordings, each computed once for its content."""

  def __init__(self, params: dict, config: SpeechLLMConfig):
    """Takes params["speaker"] and a config with speech output."""
    self._params = {"speaker": params["speaker"]}
    self._config = config
    self._vectors: dict[bytes, np.ndarray] = {}

  def vector(self, voice: Voice) -> np.ndarray:
    """The speaker vector of a recording, float32 [1, E].

    Args:
      voice: path or bytes of an audio file, or a float array [samples] at 16 kHz.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it cannot be decoded, is silent or shorter than 0.5 s.
    """
    name = "voice"
    if isinstance(voice, (str, os.PathLike)):
      name = f"voice {os.fsdecode(voice)}"
      voice = read_file(voice)
    if not isinstance(voice, (bytes, np.ndarray)):
      raise ValueError(
        f"{name}: {type(voice).__name__}; give a path, the bytes of a file, or an array of floats"
      )
    key = hashlib.sha256(voice.tobytes() if isinstance(voice, np.ndarray) else voice).digest()
    if key not in self._vectors:
      mel_TF = speaker_mel(_read(voice, name), name=name)
      vector_BE = np.asarray(_vector(self._params, mel_TF[None], self._config))
      if not np.isfinite(vector_BE).all():
        raise ValueError(
          f"{name}: its vector is not finite; the weights of the speaker encoder are damaged"
        )
      self._vectors[key] = vector_BE
    return self._vectors[key]


_vector = functools.partial(jax.jit, static_argnames="config")(speech_llm.speaker_vector)


def _read(voice, name: str) -> np.ndarray:
  """Float32 [samples] at 16 kHz, which are checked."""
  if isinstance(voice, np.ndarray):
    if voice.ndim != 1 or not np.issubdtype(voice.dtype, np.floating):
      raise ValueError(
        f"{name}: {voice.dtype} array of shape {voice.shape}; give floats [samples] in [-1, 1] at"
        f" {SAMPLE_RATE_HZ} Hz"
      )
    check_samples(voice, name)
    waveform_N = voice.astype(np.float32)
  else:
    waveform_N = load_audio(voice, sample_rate_hz=SAMPLE_RATE_HZ, name=name)
  if (seconds := len(waveform_N) / SAMPLE_RATE_HZ) < SHORTEST_S:
    raise AudioError(
      f"{name}: {seconds:.2f} s is too short for a voice; give at least {SHORTEST_S:g} s, better a"
      " few seconds",
      "too short",
    )
  if np.abs(waveform_N).max() < SILENCE:
    raise AudioError(f"{name}: silent (no sample above {SILENCE}); give a recording", "silent")
  return waveform_N
