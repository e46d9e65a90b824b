"""From an utterance as it lies in a shard to features and answer tokens."""

import dataclasses

import numpy as np

from mooer_jax.audio.decode import AudioError, load_audio
from mooer_jax.audio.frontend import FrontendConfig, features
from mooer_jax.data.kaldi import SPACE
from mooer_jax.data.shards import RawUtterance, Skip
from mooer_jax.text.tokenizer import Tokenizer

_AUDIO_CAUSES = {"empty": "empty audio"}


@dataclasses.dataclass(frozen=True)
class Example:
  """An utterance ready to be put into a batch.

  Attributes:
    features: for each encoder float32 [T, F], before CMVN.
    answer_S: int32, tokens of the transcript and eos.
    seconds: of audio.
    epoch: of the stream it was read in.
    skipped: what was left out between the utterance before and this one.
  """

  key: str
  text: str
  features: tuple[np.ndarray, ...]
  answer_S: np.ndarray
  seconds: float
  epoch: int = 0
  skipped: tuple[Skip, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reader:
  """Decodes utterances and applies the limits.

  Attributes:
    needs_answer: whether an utterance without a usable answer is skipped (training) or kept with
      no answer tokens (evaluation, where its text is only a reference).
    max_answer: tokens, eos included.
  """

  frontends: tuple[FrontendConfig, ...]
  tokenizer: Tokenizer
  min_s: float
  max_s: float
  max_answer: int
  needs_answer: bool

  def __post_init__(self):
    rates = {f.fbank.sample_rate_hz for f in self.frontends}
    if len(rates) != 1:
      raise ValueError(f"frontends want sample rates {sorted(rates)}; they must share one")

  @property
  def sample_rate_hz(self) -> int:
    return self.frontends[0].fbank.sample_rate_hz

  def __call__(self, raw: RawUtterance) -> Example | Skip:
    """Returns the example, or why there is none."""

    text = ""

    def skip(cause, detail=""):
      return Skip(cause, raw.key, raw.shard, detail, text)

    try:
      text = raw.text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
      return skip("transcript not UTF-8", str(error))
    answer, problem = self._answer(text)
    if problem and self.needs_answer:
      return skip(*problem)
    try:
      waveform_N = load_audio(
        raw.audio, sample_rate_hz=self.sample_rate_hz, name=f"{raw.key}.{raw.suffix}"
      )
      seconds = len(waveform_N) / self.sample_rate_hz
      if seconds < self.min_s:
        return skip("too short", f"{seconds:.3f} s < data.min_s={self.min_s}")
      if seconds > self.max_s:
        return skip("too long", f"{seconds:.1f} s > data.max_s={self.max_s}")
      made = tuple(features(waveform_N, frontend) for frontend in self.frontends)
    except AudioError as error:
      return skip(_AUDIO_CAUSES.get(error.cause, error.cause), str(error))
    return Example(raw.key, text, made, answer, seconds)

  def _answer(self, text):
    none = np.zeros(0, np.int32)
    if not text:
      return none, ("empty transcript", "")
    try:
      tokens = [*self.tokenizer.encode(text.replace(SPACE, " ")), self.tokenizer.eos_id]
    except ValueError as error:
      return none, ("unknown character", str(error))
    if len(tokens) > self.max_answer:
      return none, (
        "answer too long",
        f"{len(tokens)} tokens > data.answer_buckets[-1]={self.max_answer}",
      )
    return np.asarray(tokens, np.int32), None
