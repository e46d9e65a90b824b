"""Recordings of the answers, from which segments are taken to train a vocoder."""

import dataclasses
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from mooer_jax import storage
from mooer_jax.audio import speaker_mel
from mooer_jax.audio.decode import AudioError, load_audio
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.labels import LabelFile
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.vocoders import SpeechTarget

TOLERANCE = 1  # audio tokens by which a label may differ from its recording


class Segment(NamedTuple):
  """A segment of a recording; a row of `SpeechTarget`."""

  waveform_N: np.ndarray
  first: int
  frames: int
  voice_TF: np.ndarray


@dataclasses.dataclass(frozen=True)
class Targets:
  """Takes a segment of the recording of an utterance's answer.

  Attributes:
    file: `KEY path` lines.
    start_id: id of the token after which the audio tokens of a label begin.
    samples_per_frame, sample_rate_hz: of the vocoder; an audio token is one frame.
    frames: length of a segment, in frames.
    voice_samples: length of the part that gives the voice, at 16 kHz.
  """

  file: LabelFile
  start_id: int
  samples_per_frame: int
  sample_rate_hz: int
  frames: int
  voice_samples: int

  @classmethod
  def load(cls, config: DataConfig, tokenizer: Tokenizer, model: SpeechLLMConfig) -> "Targets":
    """Reads data.target_audio.

    Raises:
      ValueError: if the model has no vocoder, its tokenizer no start token, or the file is empty.
      FileNotFoundError: if there is no such file.
    """
    speech = model.speech_output
    if speech is None:
      raise ValueError(
        f"data.target_audio={config.target_audio!r} trains a vocoder, but the model has none; set"
        " model.speech_output"
      )
    try:
      start_id = tokenizer.token_id(speech.start_token)
    except ValueError as error:
      raise ValueError(
        f"model.speech_output.start_token: {error}; name the token before the audio tokens"
      ) from error
    per_frame, rate_hz = speech.vocoder.samples_per_frame, speech.vocoder.sample_rate_hz
    return cls(
      LabelFile(config.target_audio),
      start_id,
      per_frame,
      rate_hz,
      segment_frames(config, model),
      _voice_samples(config),
    )

  def __call__(
    self, raw: RawUtterance, labels_S: np.ndarray, *, place: float, voice_place: float
  ) -> Segment | SkippedUtterance:
    """The segment, or why there is none.

    Args:
      labels_S: tokens of the answer and eos.
      place, voice_place: in [0, 1): where the segment is, and the part that gives the voice.
    """
    starts = np.flatnonzero(labels_S == self.start_id)
    tokens = len(labels_S) - starts[0] - 2 if len(starts) == 1 else 0  # without start and eos
    if tokens < 1:
      return raw.skip(
        "no audio tokens", f"{len(starts)} start tokens in the label; it needs one, then the tokens"
      )
    path = self._find(raw)
    if isinstance(path, SkippedUtterance):
      return path
    try:
      content = storage.read_bytes(path)
      samples_N = load_audio(content, sample_rate_hz=self.sample_rate_hz, name=path)
      voice_N = samples_N
      if self.sample_rate_hz != speaker_mel.SAMPLE_RATE_HZ:
        voice_N = load_audio(content, sample_rate_hz=speaker_mel.SAMPLE_RATE_HZ, name=path)
    except OSError as error:
      return raw.skip("no target", f"{path}: {error.strerror or error}")
    except AudioError as error:
      return raw.skip("bad target", str(error))
    needed = -(-len(samples_N) // self.samples_per_frame)
    if abs(needed - tokens) > TOLERANCE:
      return raw.skip(
        "bad target",
        f"{path}: {len(samples_N)} samples at {self.sample_rate_hz} Hz are {needed} audio tokens,"
        f" but the label has {tokens}",
      )
    frames = min(tokens, self.frames)
    start = int((tokens - frames + 1) * place)
    waveform_N = np.zeros(self.frames * self.samples_per_frame, np.float32)
    part_N = samples_N[start * self.samples_per_frame :][: frames * self.samples_per_frame]
    waveform_N[: len(part_N)] = part_N
    voice_TF = speaker_mel.speaker_mel(_part(voice_N, self.voice_samples, voice_place), name=path)
    return Segment(waveform_N, int(starts[0]) + 1 + start, frames, voice_TF)

  def _find(self, raw: RawUtterance) -> str | SkippedUtterance:
    """The path of the recording."""
    found = self.file.find(raw.key)
    if len(found) != 1:
      lines = " and ".join(str(number) for number, _ in found)
      detail = f"has the key on the lines {lines}; remove all but one" if lines else "lacks the key"
      return raw.skip("no target", f"{self.file.path} {detail}")
    [(number, path)] = found
    if not path.strip():
      return raw.skip("no target", f"{self.file.path}:{number} has no path")
    return os.fsdecode(path.strip())


def collate(segments: Sequence[Segment], shapes: SpeechTarget) -> SpeechTarget:
  """The segments as arrays of these shapes (`target_shapes`); missing rows are padding."""
  target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  for row, one in enumerate(segments):
    target.waveform_BN[row], target.voice_BTF[row] = one.waveform_N, one.voice_TF
    target.first_B[row], target.frames_B[row] = one.first, one.frames
  return target


def target_shapes(config: DataConfig, model: SpeechLLMConfig, *, rows: int) -> SpeechTarget:
  """The shapes of a batch's segments, as `ShapeDtypeStruct`s."""
  assert model.speech_output is not None

  def sized(dtype, *sizes):
    return jax.ShapeDtypeStruct((rows, *sizes), dtype)

  samples = segment_frames(config, model) * model.speech_output.vocoder.samples_per_frame
  return SpeechTarget(
    waveform_BN=sized(np.float32, samples),
    first_B=sized(np.int32),
    frames_B=sized(np.int32),
    voice_BTF=sized(np.float32, 1 + _voice_samples(config) // speaker_mel.HOP, speaker_mel.BINS),
  )


def segment_frames(config: DataConfig, model: SpeechLLMConfig) -> int:
  """Length of the segments, in frames of the model's vocoder."""
  assert model.speech_output is not None
  vocoder = model.speech_output.vocoder
  return max(1, round(config.target_s * vocoder.sample_rate_hz / vocoder.samples_per_frame))


def _voice_samples(config: DataConfig) -> int:
  return round(config.voice_s * speaker_mel.SAMPLE_RATE_HZ)


def describe(config: DataConfig) -> str:
  """The file as it is now, and the lengths of the segments; "" without one."""
  if not (path := config.target_audio):
    return ""
  size = storage.sizes([path]).get(path)
  return f"{os.path.basename(path)} ({size} bytes), {config.target_s:g} s, {config.voice_s:g} s"


def _part(waveform_N: np.ndarray, samples: int, place: float) -> np.ndarray:
  """A part of this length; a shorter waveform is repeated."""
  if len(waveform_N) <= samples:
    return np.resize(waveform_N, samples)
  start = int((len(waveform_N) - samples + 1) * place)
  return waveform_N[start : start + samples]
