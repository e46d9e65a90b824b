"""From an utterance as it lies in a shard to features and answer tokens."""

import dataclasses

import numpy as np

from mooer_jax.audio.decode import AudioError, load_audio
from mooer_jax.audio.frontend import features, num_frames
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.asking import Asker
from mooer_jax.data.cache import EncodedCache, digest
from mooer_jax.data.config import DataConfig
from mooer_jax.data.shards import SPACE, RawUtterance, Skip
from mooer_jax.speech_llm import shortest_s
from mooer_jax.text.tokenizer import Tokenizer

PAUSE_S = 0.1  # between the clips of one utterance, as SALMONN has it


@dataclasses.dataclass(frozen=True)
class Example:
  """An utterance ready to be put into a batch.

  Attributes:
    features: for each encoder float32 [T, F], before CMVN; or its output frames, from a cache.
    task: what the model is asked, in the words before_S and after_S, int32 tokens.
    answer_S: int32, tokens of the transcript and eos.
    seconds: of audio, before it is cut.
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
    kept = None if self.cache is None else self.cache.get(digest(raw))
    heard = hear(raw, self.config, self.model) if kept is None else kept
    if isinstance(heard, Skip):
      return dataclasses.replace(heard, text=text)
    if self.cache is not None and kept is None:
      return skip(
        "not cached",
        f"could not be heard when {self.cache.folder} was filled, or changed since; remove"
        f" {self.cache.folder / 'complete'} and start anew",
      )
    made, seconds = heard
    if not self._tokens(made, encoded=kept is not None):
      return skip("too short", f"{seconds:.3f} s; this model needs {shortest_s(self.model):.3f} s")
    if problem := _beyond(seconds, self.config):
      return skip(*problem)
    return Example(raw.key, text, made, *asked, answer, seconds)

  def _tokens(self, made, *, encoded: bool) -> int:
    streams = zip(made, self.model.encoders, strict=True)
    return self.model.connector.num_tokens(
      max(len(x_TF) if encoded else encoder.num_outputs(len(x_TF)) for x_TF, encoder in streams)
    )

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


def hear(
  raw: RawUtterance, config: DataConfig, model: SpeechLLMConfig
) -> tuple[tuple[np.ndarray, ...], float] | Skip:
  """What the encoders take of an utterance, whatever is asked about it.

  Args:
    raw: the utterance; its clips are joined.
    config: limits of length.
    model: what features its encoders take.

  Returns:
    (float32 [T, F] for each encoder, before CMVN; length of the whole in seconds, though
    data.cut_longer may cut what is heard of it), or why there are none.
  """
  try:
    waveform_N, seconds = _waveform(raw, config, model)
    if problem := _beyond(seconds, config):
      return Skip(problem[0], raw.key, raw.shard, problem[1])
    if not all(num_frames(len(waveform_N), frontend) for frontend in model.frontends):
      return Skip("too short", raw.key, raw.shard, f"{seconds:.3f} s make no feature")
    return tuple(features(waveform_N, frontend) for frontend in model.frontends), seconds
  except AudioError as error:
    return Skip(error.cause, raw.key, raw.shard, str(error))


def _beyond(seconds: float, config: DataConfig) -> tuple[str, str] | None:
  """Which limit of length a clip is beyond, as (cause, detail)."""
  if seconds < config.min_s:
    return "too short", f"{seconds:.3f} s < data.min_s={config.min_s:g}"
  if seconds > config.max_s and not config.cut_longer:
    return "too long", f"{seconds:.1f} s > data.max_s={config.max_s}"
  return None


def _waveform(
  raw: RawUtterance, config: DataConfig, model: SpeechLLMConfig
) -> tuple[np.ndarray, float]:
  """What is heard of an utterance, its clips joined, and how long all of it is, seconds."""
  rate_hz, name = model.frontends[0].sample_rate_hz, f"{raw.key}.{raw.suffix}"
  pause = np.zeros(round(PAUSE_S * rate_hz), np.float32)
  parts: list[np.ndarray] = []
  for clip in (raw.audio, *raw.more):
    waveform_N = load_audio(clip, sample_rate_hz=rate_hz, channel=model.channel, name=name)
    parts += [pause, waveform_N] if parts else [waveform_N]
  joined_N = np.concatenate(parts)
  seconds = len(joined_N) / rate_hz
  if config.cut_longer:
    joined_N = joined_N[: round(config.max_s * rate_hz)]
  return model.filled_up(joined_N), seconds
