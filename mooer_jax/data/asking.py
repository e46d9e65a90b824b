"""What the model is asked about an utterance."""

import hashlib
import json
import zlib
from collections.abc import Mapping

import numpy as np

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.shards import RawUtterance, Skip
from mooer_jax.prompts import (
  QUESTION,
  check_goes_on,
  encode_prompt,
  fill_template,
  read_prompts,
  task_prompt,
)
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
    self._tokenizer, self._template, self._seed = tokenizer, model.template, config.seed
    self._prompts = {task: drawn.get(task, (own[task],)) for task in self.tasks}
    said = json.dumps([model.template, self._prompts], sort_keys=True)
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
      check_goes_on(len(after_S), prompt, model.template)
      sides = fill_template(model.template, prompt, _MARK if asks else "")
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
