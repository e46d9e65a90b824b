"""Audio in, text and speech out: the class behind `mooer-jax speak`."""

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mooer_jax import checkpoint
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation import GenerationConfig
from mooer_jax.generation.loading import DEFAULT_VOICE, load_model, load_speech
from mooer_jax.generation.speech_stream import CHUNK_FRAMES
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.prompts import SPEECH_TASKS, TEXT
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.transcribe.clips import Audio
from mooer_jax.transcribe.response import SpeechChunk, SpeechResponse
from mooer_jax.transcribe.session import Session, SpeakingModel
from mooer_jax.transcribe.transcriber import input_buckets
from mooer_jax.transcribe.voice import Voice, Voices


class SpeechResponder:
  """A loaded checkpoint that answers audio with text and speech.

  responder = mooer_jax.SpeechResponder.from_checkpoint("CKPT", voice="prompt.wav")
  response = responder("question.wav", task="s2s_chat")
  soundfile.write("answer.wav", response.waveform_N, response.sample_rate_hz)
  """

  def __init__(
    self,
    params: dict,
    config: SpeechLLMConfig,
    tokenizer: Tokenizer,
    options: GenerationConfig = GenerationConfig(),
    *,
    voice: Voice | None = None,
  ):
    """Takes params with folded "vocoder" and "speaker"; most users call `from_checkpoint`.

    Raises:
      ValueError: if the tokenizer has no start token, or the voice cannot be used.
    """
    assert config.speech_output is not None
    start_token = config.speech_output.start_token
    if start_token not in tokenizer.vocabulary():
      raise ValueError(
        f"the tokenizer of the LLM has no token {start_token!r}, after which audio tokens follow;"
        " use an LLM with audio tokens, or correct speech_output.start_token in config.json"
      )
    eos = options.eos_token_id or (tokenizer.eos_id,)
    self.model = SpeakingModel(
      params,
      config.with_compute(scan=False),
      tokenizer,
      dataclasses.replace(options, eos_token_id=eos),
      input_buckets(config),
    )
    self._voices = Voices(params, config)
    self._voice = voice
    if voice is not None:
      self._voices.vector(voice)

  @classmethod
  def from_checkpoint(
    cls,
    path: str | Path,
    *,
    voice: Voice | None = None,
    dtype: str | None = None,
    base_checkpoint: str | Path | None = None,
    quantization: Literal["none", "int8"] = "none",
  ) -> "SpeechResponder":
    """Loads a checkpoint folder, or the newest checkpoint of a training workdir.

    Args:
      path, base_checkpoint: as in `load_model`, and raises as it does.
      voice: path or bytes of a recording, or floats [samples] at 16 kHz, of the voice to speak in;
        default: `prompt.wav` of the checkpoint, if it has one.
      dtype: "float32" or "bfloat16"; default: float32 on CPU, bfloat16 on accelerators. Vocoder and
        speaker encoder run in float32.
      quantization: "int8" rounds the matrices of the LLM to 8 bits: half the memory of bfloat16.

    Raises:
      ValueError: for a checkpoint without speech output, or whose tokenizer has no start token; for
        a voice that cannot be used.
    """
    folder = checkpoint.find(path)
    speech = load_speech(folder, base_checkpoint=base_checkpoint)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    compute = ExecutionConfig(dtype=dtype, quantization=quantization)
    loaded = load_model(folder, compute, base_checkpoint=base_checkpoint)
    return cls(
      {**loaded.params, **speech.params},
      loaded.model.replace(speech_output=speech.config),
      loaded.tokenizer,
      loaded.generation,
      voice=speech.voice if voice is None else voice,
    )

  @property
  def sample_rate_hz(self) -> int:
    """Sample rate of the speech."""
    return self.model.speech.vocoder.sample_rate_hz

  def speaker_vector(self, voice: Voice | None = None) -> np.ndarray:
    """The speaker vector of a voice, float32 [1, E]; default: the voice of `from_checkpoint`.

    Computed once for each recording. Raises OSError or ValueError for a voice that cannot be used,
    and without one.
    """
    voice = self._voice if voice is None else voice
    if voice is None:
      raise ValueError(
        f"no voice: the checkpoint has no {DEFAULT_VOICE}; give a recording of a few seconds with"
        " --voice (voice=...)"
      )
    return self._voices.vector(voice)

  def default_task(self) -> str:
    """The only task of the checkpoint that asks for speech, or its only task that takes audio.

    Raises ValueError if there is none, or there are several.
    """
    tasks = [task for task, prompt in self.model.config.prompts if TEXT not in prompt]
    spoken = [task for task in tasks if task in SPEECH_TASKS] or tasks
    if len(spoken) != 1:
      raise ValueError(f"name a task; the model has {sorted(tasks)}")
    return spoken[0]

  def __call__(
    self,
    audio: Audio,
    *,
    task: str | None = None,
    voice: Voice | None = None,
    seed: int | None = None,
    **generation: Any,
  ) -> SpeechResponse:
    """Answers one clip with text and speech.

    Args:
      audio: path or bytes of an audio file, or floats [samples] in [-1, 1] at the model's rate.
      task: a task of the model; default: its only task that asks for speech.
      voice: as in `from_checkpoint`; default: the voice given there. Speaker vectors are cached.
      seed: seed of sampling, 0 to 2**32 - 1; default: 0.
      generation: fields of `GenerationConfig` that override the checkpoint's, such as num_beams=1.

    Raises:
      OSError, ValueError: for a clip or voice that cannot be used; without a voice; for an unknown
        task; for an option out of range or without effect; if the model's scores are not finite.
    """
    return self.session(task=task, voice=voice)(audio, seed=seed, **generation)

  def stream(
    self,
    audio: Audio,
    *,
    task: str | None = None,
    voice: Voice | None = None,
    seed: int | None = None,
    chunk_frames: int = CHUNK_FRAMES,
    **generation: Any,
  ) -> Generator[SpeechChunk]:
    """Answers one clip; yields text as it is decoded, then samples while the LLM still decodes.

    Args:
      audio, task, voice, seed, generation: as in a call, but with one beam (the default here).
      chunk_frames: audio tokens per chunk of samples.

    Raises:
      OSError, ValueError: as a call, before anything is decoded; for num_beams above 1.
    """
    session = self.session(task=task, voice=voice)
    return session.stream(audio, seed=seed, chunk_frames=chunk_frames, **generation)

  def session(self, *, task: str | None = None, voice: Voice | None = None) -> "Session":
    """Begins a dialogue of several turns; arguments as in a call."""
    task = self.default_task() if task is None else task
    return Session(self.model, task=task, speaker_BE=self.speaker_vector(voice))
