"""Speech LLMs in JAX and Flax: MooER and SALMONN, training, evaluation and transcription.

Public names load on demand, so that `import mooer_jax` stays cheap:

  Transcriber: a loaded checkpoint that transcribes audio files and arrays.
  Transcript: its result for one clip.
  SpeechResponder: a loaded checkpoint that answers audio with text and speech.
  load_model: a checkpoint's parameters, model config, tokenizer and generation options.
  SpeechLLMConfig: the model as a frozen dataclass; `mooer_jax.speech_llm` runs it.
  generate: decoding of a batch in one compiled program.
  make_mesh: a device mesh, for decoding on several devices.
  load_audio: an audio file as float32 samples.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_MODULES = {
  "Transcriber": "mooer_jax.transcribe.transcriber",
  "Transcript": "mooer_jax.transcribe.transcript",
  "SpeechResponder": "mooer_jax.transcribe.responder",
  "load_model": "mooer_jax.generation.loading",
  "SpeechLLMConfig": "mooer_jax.config",
  "generate": "mooer_jax.generation.generate",
  "make_mesh": "mooer_jax.sharding",
  "load_audio": "mooer_jax.audio.decode",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
  if name in _MODULES:
    return getattr(importlib.import_module(_MODULES[name]), name)
  raise AttributeError(f"module 'mooer_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
