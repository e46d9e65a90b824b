"""From an utterance as it lies in a shard to features and answer tokens."""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping

import numpy as np

from mooer_jax.audio.decode import AudioError, load_audio
from mooer_jax.audio.frontend import features, num_frames
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.feature_cache import EncodedCache, digest
from mooer_jax.data.shards import SPACE, RawUtterance, Skip
from mooer_jax.prompts import (
  QUESTION,
  check_goes_on,
  encode_prompt,
  fill_template,
  read_prompts,
  task_prompt,
)
from mooer_jax.speech_llm import shortest_s
from mooer_jax.text.tokenizer import Tokenizer

_MARK = "\0"  # stands for a question where only its place matters


class Asker:
  """Chooses a prompt for each utterance and cuts it into tokens.

  Attributes:
    tasks: all that may come, in the order of the model's prompts.
    before, after: tokens that the two sides of the speech are padded to.
    checksum: of the template and all prompts.
  """

  def __init__(self, config: DataConfig, tokenizer: Tokenizer, model: SpeechLLMConfig):
    """Cuts every prompt that takes no question once.

    Args:
      config: task, file of prompts, tokens for questions.
      tokenizer: of the language model.
      model: its template and prompts.

    Raises:
      ValueError: for a task without a prompt, a prompt without its one place for the speech, or
        prompts with questions where config.prompt_tokens is 0.
      FileNotFoundError: if the file of prompts does not exist.
    """
    own = dict(model.prompts)
    drawn = read_prompts(config.prompts) if config.prompts else {}
    if unknown := sorted(set(drawn) - set(own)):
      raise ValueError(f"{config.prompts}: tasks {unknown} are not among the model's {sorted(own)}")
    if config.task:
      task_prompt(config.task, own)  # or the error says what the model knows
    self.tasks = (config.task,) if config.task else tuple(own)
    self._fixed, self._longest = config.task, config.prompt_tokens
    self._tokenizer, self._template, self._seed = tokenizer, model.chat_template, config.seed
    self._prompts = {task: drawn.get(task, (own[task],)) for task in self.tasks}
    said = json.dumps([model.chat_template, self._prompts], sort_keys=True)
    self.checksum = zlib.crc32(said.encode())
    self._cut: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    self.before = self.after = 0
    for prompt in {prompt for prompts in self._prompts.values() for prompt in prompts}:
      asks = QUESTION in prompt
      before_S, after_S = self._encode(prompt, "?" if asks else "")
      if not asks:
        self._cut[prompt] = before_S, after_S
      elif not config.prompt_tokens:
        raise ValueError(
          f"the prompt {prompt!r} takes a question: set data.prompt_tokens to the length that"
          " prompts with one are padded to"
        )
      check_goes_on(len(after_S), prompt, model.chat_template)
      sides = fill_template(model.chat_template, prompt, _MARK if asks else "")
      before, after = (
        max(len(tokens_S), config.prompt_tokens) if _MARK in side else len(tokens_S)
        for side, tokens_S in zip(sides, (before_S, after_S), strict=True)
      )
      self.before, self.after = max(self.before, before), max(self.after, after)

  def __call__(self, raw: RawUtterance, draw: int) -> tuple[str, np.ndarray, np.ndarray] | Skip:
    """Returns (task, int32 tokens before the speech, after it), or why there are none.

    Args:
      raw: the utterance.
      draw: number of the reading; with the key it decides which of several prompts is taken.
    """
    task = self._fixed or raw.task
    if task not in self._prompts:
      known = ", ".join(self.tasks)
      found = repr(task) if task else "no task"
      return Skip("unknown task", raw.key, raw.shard, f"{found}; the model has {known}")
    prompts = self._prompts[task]
    prompt = prompts[int(len(prompts) * _chance("prompt", self._seed, draw, raw.key))]
    if prompt in self._cut:
      return (task, *self._cut[prompt])
    if not raw.question:
      return Skip("no question", raw.key, raw.shard, f"the prompt of {task!r} takes one")
    try:
      before_S, after_S = self._encode(prompt, raw.question)
    except ValueError as error:
      return Skip("bad question", raw.key, raw.shard, str(error))
    if len(before_S) > self.before or len(after_S) > self.after:
      longest = max(len(before_S), len(after_S))
      found = f"{longest} tokens > data.prompt_tokens={self._longest}"
      return Skip("prompt too long", raw.key, raw.shard, found)
    return task, before_S, after_S

  def _encode(self, prompt: str, question: str) -> tuple[np.ndarray, np.ndarray]:
    filled = fill_template(self._template, prompt, question)
    before, after = encode_prompt(self._tokenizer, filled)
    return np.asarray(before, np.int32), np.asarray(after, np.int32)


def copies(task: str, weights: Mapping[str, float], seed: int, draw: int, key: str) -> int:
  """How often an utterance of a task is read in an epoch: its weight, rounded at random."""
  weight = weights.get(task, 1.0)
  whole = int(weight)
  return whole + (_chance("copies", seed, draw, key) < weight - whole)


def _chance(*of: str | int) -> float:
  """A number in [0, 1), for each value by itself; a CRC, being linear, would move them together."""
  digest = hashlib.blake2b(" ".join(map(str, of)).encode(), digest_size=4).digest()
  return int.from_bytes(digest, "big") / 2**32


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
    data.truncate may cut what is heard of it), or why there are none.
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
  if seconds > config.max_s and not config.truncate:
    return "too long", f"{seconds:.1f} s > data.max_s={config.max_s}"
  return None


def _waveform(
  raw: RawUtterance, config: DataConfig, model: SpeechLLMConfig
) -> tuple[np.ndarray, float]:
  """What is heard of an utterance, its clips joined, and how long all of it is, seconds."""
  rate_hz, name = model.sample_rate_hz, f"{raw.key}.{raw.suffix}"
  pause = np.zeros(round(PAUSE_S * rate_hz), np.float32)
  parts: list[np.ndarray] = []
  for clip in (raw.audio, *raw.more):
    waveform_N = load_audio(clip, sample_rate_hz=rate_hz, channel=model.channel, name=name)
    parts += [pause, waveform_N] if parts else [waveform_N]
  joined_N = np.concatenate(parts)
  seconds = len(joined_N) / rate_hz
  if config.truncate:
    joined_N = joined_N[: round(config.max_s * rate_hz)]
  return model.pad_to_min_duration(joined_N), seconds
