"""MooER and SALMONN, speech LLMs in JAX: what hears, what connects, what answers."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Transcriber"]


def __getattr__(name: str) -> Any:
  if name == "Transcriber":  # decoding audio and tokenizers load only when someone transcribes
    from mooer_jax.transcribe import Transcriber

    return Transcriber
  raise AttributeError(f"module 'mooer_jax' has no attribute {name!r}")
