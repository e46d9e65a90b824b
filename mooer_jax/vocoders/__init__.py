"""Speech output: hidden states of the LLM to a waveform, in the voice of a recording."""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mooer_jax.vocoders.hifigan import HiFiGANConfig
from mooer_jax.vocoders.speaker import SpeakerConfig

# States after those of a vocoder that is trained here: at the last audio token and at the end.
TRAINED_DROP_LAST = 2
PARTS = ("vocoder", "speaker")  # their names in the parameters
DISCRIMINATORS = "discriminators"  # in the parameters of a vocoder's training only


@dataclasses.dataclass(frozen=True)
class SpeechOutputConfig:
  """The parts of a speech LLM that make speech, and the states that they take.

  The vocoder takes the LLM's last hidden states, from that at the start token on.

  Attributes:
    vocoder: config of the vocoder; its input width is the width of the LLM.
    speaker: config of the speaker encoder.
    start_token: the token after the text of an answer; audio tokens follow.
    drop_last: number of last states, that of the end of the answer included, which the vocoder
      does not take.
  """

  SHARDING: ClassVar[tuple[tuple[str, P], ...]] = (("(vocoder|speaker|discriminators)/.*", P()),)
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ("start_token", "drop_last")
  vocoder: HiFiGANConfig = HiFiGANConfig()
  speaker: SpeakerConfig = SpeakerConfig()
  start_token: str = "<|audio_start|>"
  drop_last: int = 6

  def __post_init__(self):
    if self.drop_last < 0:
      raise ValueError(f"speech_output.drop_last={self.drop_last} must not be negative")
    if not self.start_token:
      raise ValueError("speech_output.start_token must not be empty; name a token of the LLM")
    if self.vocoder.speaker_width != self.speaker.output_width:
      raise ValueError(
        f"speech_output: vocoder.speaker_width={self.vocoder.speaker_width}, but"
        f" speaker.output_width={self.speaker.output_width}; they must be equal"
      )


def segment(hidden_BSD: jax.Array, first_B: jax.Array, length: int) -> jax.Array:
  """The states of `length` positions from `first_B` on, [B, length, D]; the last is repeated."""
  position_BT = jnp.minimum(first_B[:, None] + jnp.arange(length), hidden_BSD.shape[1] - 1)
  return jnp.take_along_axis(hidden_BSD, position_BT[..., None], axis=1)


@flax.struct.dataclass
class SpeechTarget:
  """Segments of recordings that a batch of answers is trained to speak, all of the same length.

  Attributes:
    waveform_BN: float32, at the rate of the vocoder, with zeros after the end of the recording.
    first_B: int32, place in the labels of the first audio token of the segment.
    frames_B: int32, audio tokens of the segment, fewer than its length for a short recording and 0
      for a padding row.
    voice_BTF: float32, `audio.speaker_mel` of a part of the same recording.
  """

  waveform_BN: Any
  first_B: Any
  frames_B: Any
  voice_BTF: Any
