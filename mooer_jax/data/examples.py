"""From an utterance as it lies in a shard to features and answer tokens."""

import dataclasses

import numpy as np

from mooer_jax.audio.decode import AudioError, load_audio
from mooer_jax.audio.frontend import features
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.asking import Asker
from mooer_jax.data.cache import EncodedCache, digest
from mooer_jax.data.config import DataConfig
from mooer_jax.data.kaldi import SPACE
from mooer_jax.data.shards import RawUtterance, Skip
from mooer_jax.speech_llm import num_speech_tokens
from mooer_jax.text.tokenizer import Tokenizer

_AUDIO_CAUSES = {"empty": "empty audio"}
PAUSE_S = 0.1  # between the clips of one utterance, as SALMONN has it


@dataclasses.dataclass(frozen=True)
class Example:
  """An utterance ready to be put into a batch.

  Attributes:
    features: for each encoder float32 [T, F], before CMVN; or its output frames, from a cache.
    task: what the model is asked, in the words before_S and after_S, int32 tokens.
    answer_S: int32, tokens of the transcript and eos.
    seconds: of audio.
    digest: of the audio, where a cache is read or made.
    epoch: of the stream it was read in.
    skipped: what was left out between the utterance before and this one.
  """

  key: str
  text: str
  features: tuple[np.ndarray, ...]
  task: str
  before_S: np.ndarray
  after_S: np.ndarray
  answer_S: np.ndarray
  seconds: float
  digest: str = ""
  epoch: int = 0
  skipped: tuple[Skip, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reader:
  """Decodes utterances and applies the limits.

  Attributes:
    config: limits of length.
    tokenizer: of the language model.
    model: what features its encoders take.
    asker: gives each utterance its prompt.
    needs_answer: whether an utterance without a usable answer is skipped (training) or kept with
      no answer tokens (evaluation, where its text is only a reference).
    cache: of the encoders' frames, which then stand in for the features.
  """

  config: DataConfig
  tokenizer: Tokenizer
  model: SpeechLLMConfig
  asker: Asker
  needs_answer: bool
  cache: EncodedCache | None = None

  def __call__(self, raw: RawUtterance, draw: int = 0) -> Example | Skip:
    """Returns the example, or why there is none; `draw` is as of `Asker`."""

    text = ""

    def skip(cause, detail=""):
      return Skip(cause, raw.key, raw.shard, detail, text)

    try:
      text = raw.text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
      return skip("transcript not UTF-8", str(error))
    asked = self.asker(raw, draw)
    if isinstance(asked, Skip):
      return dataclasses.replace(asked, text=text)
    answer, problem = self._answer(text)
    if problem and self.needs_answer:
      return skip(*problem)
    name = "" if self.cache is None else digest(raw)
    if self.cache is not None and name in self.cache:
      frames, seconds = self.cache.read(name)
      if problem := self._beyond(seconds):
        return skip(*problem)
      return Example(raw.key, text, frames, *asked, answer, seconds, name)
    try:
      waveform_N, seconds = self._waveform(raw)
      if problem := self._beyond(seconds):
        return skip(*problem)
      if not num_speech_tokens(len(waveform_N), self.model):
        return skip("too short", f"{seconds:.3f} s make no speech token")
      made = tuple(features(waveform_N, frontend) for frontend in self.model.frontends)
    except AudioError as error:
      return skip(_AUDIO_CAUSES.get(error.cause, error.cause), str(error))
    if self.cache is not None:
      return skip("not cached", f"changed since {self.cache.folder} was made")
    return Example(raw.key, text, made, *asked, answer, seconds)

  def _beyond(self, seconds: float) -> tuple[str, str] | None:
    """Which limit of length a clip is beyond, as (cause, detail)."""
    if seconds < self.config.min_s:
      return "too short", f"{seconds:.3f} s < data.min_s={self.config.min_s}"
    if seconds > self.config.max_s:
      return "too long", f"{seconds:.1f} s > data.max_s={self.config.max_s}"
    return None

  def _waveform(self, raw: RawUtterance) -> tuple[np.ndarray, float]:
    """All clips of an utterance, joined, and how long they are, seconds."""
    rate_hz, name = self.model.frontends[0].sample_rate_hz, f"{raw.key}.{raw.suffix}"
    pause = np.zeros(round(PAUSE_S * rate_hz), np.float32)
    parts: list[np.ndarray] = []
    for clip in (raw.audio, *raw.more):
      waveform_N = load_audio(clip, sample_rate_hz=rate_hz, channel=self.model.channel, name=name)
      parts += [pause, waveform_N] if parts else [waveform_N]
    joined_N = np.concatenate(parts)
    if self.config.cut_longer:
      joined_N = joined_N[: round(self.config.max_s * rate_hz)]
    seconds = len(joined_N) / rate_hz
    return self.model.filled_up(joined_N), seconds

  def _answer(self, text):
    none = np.zeros(0, np.int32)
    if not text:
      return none, ("empty transcript", "")
    try:
      tokens = [*self.tokenizer.encode(text.replace(SPACE, " ")), self.tokenizer.eos_id]
    except ValueError as error:
      return none, ("unknown character", str(error))
    longest = self.config.answer_buckets[-1]
    if len(tokens) > longest:
      return none, (
        "answer too long",
        f"{len(tokens)} tokens > data.answer_buckets[-1]={longest}",
      )
    return np.asarray(tokens, np.int32), None


@dataclasses.dataclass(frozen=True)
class UncachedReader:
  """Reads each clip once whose frames a cache lacks; to fill it.

  Attributes:
    reader: makes the examples.
    seen: digests of what the cache has; those of what is read are added.
  """

  reader: Reader
  seen: set[str]

  def __call__(self, raw: RawUtterance, draw: int = 0) -> Example | Skip:
    name = digest(raw)
    if name in self.seen:
      return Skip("cached", raw.key, raw.shard)
    made = self.reader(raw, draw)
    if isinstance(made, Skip):
      return made
    self.seen.add(name)
    return dataclasses.replace(made, digest=name)
