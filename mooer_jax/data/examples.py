"""From an utterance in a shard to features, prompt and labels."""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from mooer_jax.audio.decode import AudioError, load_audio
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.augment import Augmentation
from mooer_jax.data.config import DataConfig
from mooer_jax.data.feature_cache import DTYPE, EncodedCache, digest
from mooer_jax.data.labels import Labels
from mooer_jax.data.readers.entries import SPACE, RawUtterance, SkippedUtterance
from mooer_jax.data.targets import Segment, Targets
from mooer_jax.inputs import extract_features
from mooer_jax.prompts import (
  QUESTION,
  TEXT,
  check_prompt_suffix,
  encode_prompt,
  fill_template,
  fill_text_template,
  read_prompts,
  task_prompt,
)
from mooer_jax.speech_llm import num_speech_tokens, shortest_s
from mooer_jax.text.tokenizer import Tokenizer

PAUSE_S = 0.1  # silence between the clips of one utterance, as in SALMONN
_MARK = "\0"  # takes the place of a question where only that place matters


class PromptSampler:
  """Samples a prompt for each utterance and tokenizes it.

  Attributes: `tasks` in the order of the model's prompts, their `prompts`, `text_tasks` whose
  prompts take text instead of audio, `lengths` in tokens that prompts are padded to before and
  after the speech, `checksum` (CRC) of the template and prompts.
  """

  def __init__(self, config: DataConfig, tokenizer: Tokenizer, model: SpeechLLMConfig):
    """Tokenizes every prompt once, to check and measure it.

    Raises:
      ValueError: for a task without a prompt, a prompt that does not have exactly one place for
        the speech or the text, a task with prompts of both kinds, or prompts with questions or text
        if config.prompt_tokens is 0.
      FileNotFoundError: if the file of prompts does not exist.
    """
    own = dict(model.prompts)
    sampled = read_prompts(config.prompts) if config.prompts else {}
    if unknown := sorted(set(sampled) - set(own)):
      raise ValueError(f"{config.prompts}: tasks {unknown} are not among the model's {sorted(own)}")
    if config.task:
      task_prompt(config.task, own)  # or the error lists the model's tasks
    self.tasks = (config.task,) if config.task else tuple(own)
    self._config, self._tokenizer, self._template = config, tokenizer, model.chat_template
    self.prompts = {task: sampled.get(task, (own[task],)) for task in self.tasks}
    self.text_tasks = frozenset(task for task in self.tasks if TEXT in own[task])
    for task, prompts in self.prompts.items():
      if odd := [prompt for prompt in prompts if (TEXT in prompt) != (task in self.text_tasks)]:
        raise ValueError(
          f"{config.prompts}: the prompt {odd[0]!r} and the model's prompt {own[task]!r} are of the"
          f" task {task!r}, but one takes text and the other audio; give it a task of its own"
        )
    said = json.dumps([model.chat_template, self.prompts], sort_keys=True)
    self.checksum = zlib.crc32(said.encode())
    every = {prompt for prompts in self.prompts.values() for prompt in prompts}
    sides = [self._measure(prompt) for prompt in every]
    self.lengths = max((p for p, _ in sides), default=0), max((s for _, s in sides), default=0)

  def _measure(self, prompt: str) -> tuple[int, int]:
    """Padded lengths of a prompt's sides."""
    takes_question, takes_text = QUESTION in prompt, TEXT in prompt
    tokens = self._encode(prompt, "?" if takes_question else "")
    if (takes_question or takes_text) and not self._config.prompt_tokens:
      raise ValueError(
        f"the prompt {prompt!r} takes a {'text' if takes_text else 'question'}: set"
        " data.prompt_tokens to the length that prompts with one are padded to"
      )
    check_prompt_suffix(len(tokens[1]), prompt, self._template)
    if takes_text:
      return len(tokens[0]), max(len(tokens[1]), self._config.prompt_tokens)
    sides = fill_template(self._template, prompt, _MARK if takes_question else "")
    prefix, suffix = (
      max(len(side_S), self._config.prompt_tokens) if _MARK in side else len(side_S)
      for side, side_S in zip(sides, tokens, strict=True)
    )
    return prefix, suffix

  def __call__(
    self, raw: RawUtterance, reading: int | str
  ) -> tuple[str, np.ndarray, np.ndarray] | SkippedUtterance:
    """Returns (task, int32 tokens before the speech, after it), or why there are none.

    `reading` identifies this reading; with the key it determines the sampled prompt.
    """
    task = self._config.task or raw.task
    if task not in self.prompts:
      found = repr(task) if task else "no task"
      return raw.skip("unknown task", f"{found}; the model has {', '.join(self.tasks)}")
    prompts = self.prompts[task]
    uniform = _uniform("prompt", self._config.seed, reading, raw.key)
    prompt = prompts[int(len(prompts) * uniform)]
    if QUESTION not in prompt and TEXT not in prompt:
      return (task, *self._encode(prompt, ""))
    if not raw.question:
      of = "text, the field Q of the utterance" if TEXT in prompt else "one"
      return raw.skip("no question", f"the prompt of {task!r} takes {of}")
    try:
      tokens = self._encode(prompt, raw.question)
    except ValueError as error:
      return raw.skip("bad question", str(error))
    if any(len(side_S) > length for side_S, length in zip(tokens, self.lengths, strict=True)):
      longest, limit = max(map(len, tokens)), self._config.prompt_tokens
      return raw.skip("prompt too long", f"{longest} tokens > data.prompt_tokens={limit}")
    return (task, *tokens)

  def _encode(self, prompt: str, question: str) -> tuple[np.ndarray, np.ndarray]:
    if TEXT in prompt:
      filled = "", fill_text_template(self._template, prompt, question)
    else:
      filled = fill_template(self._template, prompt, question)
    prefix, suffix = encode_prompt(self._tokenizer, filled)
    return np.asarray(prefix, np.int32), np.asarray(suffix, np.int32)


def num_copies(task: str, weights: Mapping[str, float], *, seed: int, epoch: int, key: str) -> int:
  """Number of readings of an utterance in an epoch: its task's weight, rounded at random."""
  weight = weights.get(task, 1.0)
  return int(weight) + (_uniform("copies", seed, epoch, key) < weight - int(weight))


def _uniform(*values: str | int) -> float:
  """A number in [0, 1) that depends on all values; CRCs, being linear, would be correlated."""
  digest = hashlib.blake2b(" ".join(map(str, values)).encode(), digest_size=4).digest()
  return int.from_bytes(digest, "big") / 2**32


@dataclasses.dataclass(frozen=True)
class Example:
  """An utterance ready to be put into a batch."""

  key: str
  text: str
  # By encoder: float32 [T, F] before CMVN, or frames from a cache. Or one waveform, float32 [N].
  features: tuple[np.ndarray, ...]
  task: str  # of the prompt
  prefix_S: np.ndarray  # int32, tokens of the prompt before the speech
  suffix_S: np.ndarray  # int32, tokens of the prompt after the speech
  labels_S: np.ndarray  # int32, tokens of the transcript and eos
  seconds: float  # length of the audio, before truncation; 0 without audio
  target: Segment | None = None  # of the recording of the answer
  epoch: int = 0  # in which the stream read it
  place: tuple[int, int] = (0, 0)  # of its shard in the order of the epoch, and in the shard
  skipped: tuple[SkippedUtterance, ...] = ()  # since the previous example


@dataclasses.dataclass(frozen=True)
class Preprocessor:
  """Decodes utterances and applies the limits."""

  config: DataConfig
  tokenizer: Tokenizer
  model: SpeechLLMConfig
  sample_prompt: PromptSampler
  # Whether an utterance without a usable transcript is skipped (training) or kept without labels
  # (evaluation, where its text is only a reference).
  needs_labels: bool
  cache: EncodedCache | None = None  # frames of the encoders, which take the place of features
  labels: Labels | None = None  # texts that replace or join the transcripts
  augmentation: Augmentation = Augmentation()
  targets: Targets | None = None  # recordings of the answers

  def __call__(self, raw: RawUtterance, reading: int | str = 0) -> Example | SkippedUtterance:
    """Returns the example, or why there is none; `reading` is as in `PromptSampler`.

    Audio of an utterance whose prompt takes text is not read.
    """
    if self.labels is not None:
      joined = self.labels.join(raw, _uniform("label", self.config.seed, reading, raw.key))
      if isinstance(joined, SkippedUtterance):
        return joined
      raw = joined
    try:
      text = raw.transcript()
    except UnicodeDecodeError as error:
      return raw.skip("transcript not UTF-8", str(error))
    prompt = self.sample_prompt(raw, reading)
    if isinstance(prompt, SkippedUtterance):
      return prompt
    labels_S, problem = self._labels(text)
    if problem and self.needs_labels:
      return raw.skip(*problem)
    if prompt[0] in self.sample_prompt.text_tasks:
      found = self._no_features(raw, prompt[0])
    else:
      found = self._features(raw, reading)
    if isinstance(found, SkippedUtterance):
      return found
    features, seconds = found
    target = self._target(raw, labels_S, reading)
    if isinstance(target, SkippedUtterance):
      return target
    return Example(raw.key, text, features, *prompt, labels_S, seconds, target)

  def _target(
    self, raw: RawUtterance, labels_S: np.ndarray, reading: int | str
  ) -> Segment | SkippedUtterance | None:
    """A segment of the recording of the answer; None without data.target_audio."""
    if self.targets is None:
      return None
    place, voice_place = (
      _uniform(name, self.config.seed, reading, raw.key) for name in ("segment", "voice")
    )
    return self.targets(raw, labels_S, place=place, voice_place=voice_place)

  def _features(
    self, raw: RawUtterance, reading: int | str
  ) -> tuple[tuple[np.ndarray, ...], float] | SkippedUtterance:
    """The features, or frames from the cache, and the length in seconds, or why there are none."""
    loaded = raw.load()
    if isinstance(loaded, SkippedUtterance):
      return loaded
    raw = loaded
    cached = None if self.cache is None else self.cache.get(digest(raw))
    augmentation = self.augmentation.of(raw.key, reading)
    found = cached or load_features(raw, self.config, self.model, augmentation)
    if isinstance(found, SkippedUtterance):
      return found
    if self.cache is not None and cached is None:
      folder = self.cache.folder
      return raw.skip(
        "not cached",
        f"could not be decoded when {folder} was filled, or has changed since; remove"
        f" {folder / 'complete'} and start again",
      )
    features, seconds = found
    if not self._num_tokens(features, encoded=cached is not None):
      needed_s = shortest_s(self.model)
      return raw.skip("too short", f"{seconds:.3f} s; this model needs {needed_s:.3f} s")
    if problem := _exceeded_limit(seconds, self.config):
      return raw.skip(*problem)
    return found

  def _no_features(
    self, raw: RawUtterance, task: str
  ) -> tuple[tuple[np.ndarray, ...], float] | SkippedUtterance:
    """Those of an example without audio."""
    if not self.needs_labels:
      return raw.skip("no audio", f"the task {task!r} takes text, which only training supports")
    if self.cache is not None:
      return tuple(np.zeros((0, e.hidden_size), DTYPE) for e in self.model.encoders), 0.0
    if self.model.compute.features == "device":
      return (np.zeros(0, np.float32),), 0.0
    return tuple(np.zeros((0, f.width), np.float32) for f in self.model.frontends), 0.0

  def _num_tokens(self, features: Sequence[np.ndarray], *, encoded: bool) -> int:
    if features[0].ndim == 1:
      return num_speech_tokens(len(features[0]), self.model)
    streams = zip(features, self.model.encoders, strict=True)
    return self.model.connector.num_tokens(
      max(len(x_TF) if encoded else encoder.num_outputs(len(x_TF)) for x_TF, encoder in streams)
    )

  def _labels(self, text: str) -> tuple[np.ndarray, tuple[str, str] | None]:
    none_S = np.zeros(0, np.int32)
    if not text:
      return none_S, ("empty transcript", "")
    try:
      tokens = [*self.tokenizer.encode(text.replace(SPACE, " ")), self.tokenizer.eos_id]
    except ValueError as error:
      return none_S, ("unknown character", str(error))
    longest = self.config.answer_buckets[-1]
    if len(tokens) > longest:
      detail = f"{len(tokens)} tokens > data.answer_buckets[-1]={longest}"
      return none_S, ("answer too long", detail)
    return np.asarray(tokens, np.int32), None


def load_features(
  raw: RawUtterance,
  config: DataConfig,
  model: SpeechLLMConfig,
  augmentation: Augmentation = Augmentation(),
) -> tuple[tuple[np.ndarray, ...], float] | SkippedUtterance:
  """Decodes the clips of an utterance, joins and augments them and extracts the features.

  Returns:
    (features, or the waveform, as from `inputs.extract_features`; length of the audio in seconds,
    after the change of speed and before data.truncate), or why there are none.
  """
  rate_hz, name = model.sample_rate_hz, f"{raw.key}.{raw.suffix}"
  pause = np.zeros(round(PAUSE_S * rate_hz), np.float32)
  parts: list[np.ndarray] = []
  try:
    for clip in (raw.audio, *raw.more):
      waveform_N = load_audio(clip, sample_rate_hz=rate_hz, channel=model.channel, name=name)
      parts += [pause, waveform_N] if parts else [waveform_N]
    joined_N = np.concatenate(parts)
    seconds = augmentation.num_samples(len(joined_N)) / rate_hz
    if problem := _exceeded_limit(seconds, config):
      return raw.skip(*problem)
    joined_N = augmentation.change_speed(joined_N)
    if config.truncate:
      joined_N = joined_N[: round(config.max_s * rate_hz)]
    joined_N = model.pad_to_min_duration(augmentation(joined_N))
    if not all(frontend.num_frames(len(joined_N)) for frontend in model.frontends):
      return raw.skip("too short", f"{seconds:.3f} s make no feature")
    masks = augmentation.masks(len(joined_N), model.frontends[0])
    return extract_features(joined_N, model, masks=masks), seconds
  except AudioError as error:
    return raw.skip(error.cause, str(error))


def _exceeded_limit(seconds: float, config: DataConfig) -> tuple[str, str] | None:
  """The limit of length that a clip exceeds, as (cause, detail)."""
  if seconds < config.min_s:
    return "too short", f"{seconds:.3f} s < data.min_s={config.min_s:g}"
  if seconds > config.max_s and not config.truncate:
    return "too long", f"{seconds:.1f} s > data.max_s={config.max_s}"
  return None
