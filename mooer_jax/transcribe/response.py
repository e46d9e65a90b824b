"""Answers with speech, whole or as a stream."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class SpeechResponse:
  """Answer to one clip.

  Attributes:
    text: text of the answer.
    waveform_N: float32 [samples] in [-1, 1]; empty without speech.
    sample_rate_hz: its sample rate.
    task: task that the model was prompted with.
    tokens: generated ids: text, start token, audio tokens, eos.
    finished: False if generation stopped at max_new_tokens.
    no_speech: why there is no speech; None if there is.
    first_audio_s: of a stream, seconds from the call to the first samples; else None.
  """

  text: str
  waveform_N: np.ndarray
  sample_rate_hz: int
  task: str
  tokens: list[int]
  finished: bool
  no_speech: str | None
  first_audio_s: float | None = None

  def warnings(self) -> list[str]:
    """Warnings about the answer: no speech, no text, or stopped at max_new_tokens."""
    told = [] if self.no_speech is None else [self.no_speech]
    if not self.text.strip():
      told.append("the text is empty")
    if not self.finished:
      told.append(f"the answer was truncated at max_new_tokens={len(self.tokens)}")
    return told


@dataclasses.dataclass(frozen=True, eq=False)
class SpeechChunk:
  """What a stream has added since its last chunk.

  Attributes:
    text: new text.
    waveform_N: float32, new samples at the rate of `SpeechResponder.sample_rate_hz`.
    elapsed_s: seconds since the call.
    response: the whole answer, in the last chunk; None in the others.
  """

  text: str
  waveform_N: np.ndarray
  elapsed_s: float
  response: SpeechResponse | None = None
