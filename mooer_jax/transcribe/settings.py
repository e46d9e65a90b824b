"""Arguments of `transcribe`, checked before anything is read."""

import dataclasses
import io
import itertools
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mooer_jax.config import SpeechLLMConfig, build
from mooer_jax.generation import GenerationConfig
from mooer_jax.generation.adapters import Adapters
from mooer_jax.prompts import (
  check_prompt_suffix,
  check_question,
  encode_prompt,
  fill_template,
  task_prompt,
)
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.transcribe.clips import chunk_lengths

FREE = "prompt"  # the task in results for which only a prompt is given
_WINDOW = 8  # batches whose clips are read and sorted by length together
_END = object()


class Settings(NamedTuple):
  """Arguments of `transcribe`: `sides` are the tokens of the prompt before and after the speech."""

  task: str
  sides: tuple[list[int], list[int]]
  options: GenerationConfig
  batch_size: int
  chunk_length_s: float | None
  seed: int

  @property
  def reading_options(self) -> dict[str, Any]:
    """Arguments of `read_windows`."""
    # Of long recordings, a window is only a batch.
    size = self.batch_size * (_WINDOW if self.chunk_length_s is None else 1)
    return {"size": size, "task": self.task, "chunk_length_s": self.chunk_length_s}


def make_settings(
  config: SpeechLLMConfig,
  tokenizer: Tokenizer,
  defaults: GenerationConfig,
  *,
  task: str | None = None,
  prompt: str | None = None,
  question: str | None = None,
  chat_template: str | None = None,
  chunk_length_s: float | None = None,
  batch_size: int = 8,
  seed: int | None = None,
  **generation: Any,
) -> Settings:
  """The arguments of `transcribe`, checked; `defaults` are the options of the checkpoint."""
  check_types(numbers.Real, "a number", chunk_length_s=chunk_length_s)
  check_batch_size(batch_size)
  texts = dict(task=task, prompt=prompt, question=question, chat_template=chat_template)
  task, sides = prompt_sides(config, tokenizer, **texts)
  options, seed = sampling_options(defaults, generation, seed)
  chunk_lengths(chunk_length_s, config)
  return Settings(task, sides, options, batch_size, chunk_length_s, seed)


def sampling_options(
  defaults: GenerationConfig, generation: Mapping[str, Any], seed: int | None
) -> tuple[GenerationConfig, int]:
  """`decoding_options`, and the seed or its default, 0.

  Raises ValueError for a bad option, or a seed without effect.
  """
  check_types(numbers.Integral, "an int", seed=seed)
  options = decoding_options(defaults, generation)
  if seed is not None and not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed}: must be between 0 and 2**32 - 1")
  options.check_effect([*generation, *([] if seed is None else ["seed"])])
  return options, seed or 0


def decoding_options(defaults: GenerationConfig, generation: Mapping[str, Any]) -> GenerationConfig:
  """The checkpoint's options, overridden; raises ValueError for those that have no effect."""
  options = build(GenerationConfig, {**dataclasses.asdict(defaults), **generation}, "generation")
  if options.num_return_sequences > 1:
    raise ValueError(
      f"generation.num_return_sequences={options.num_return_sequences}: there is one"
      " result per clip; call mooer_jax.generate for more"
    )
  if generation.get("return_hidden"):
    raise ValueError("return_hidden=True has no effect here; call mooer_jax.generate")
  return options


def prompt_sides(
  config: SpeechLLMConfig,
  tokenizer: Tokenizer,
  *,
  task: str | None,
  prompt: str | None,
  question: str | None,
  chat_template: str | None,
) -> tuple[str, tuple[list[int], list[int]]]:
  """(task, tokens before and after the speech); arguments as in `transcribe`."""
  check_types(
    str, "a str", task=task, prompt=prompt, question=question, chat_template=chat_template
  )
  prompts = dict(config.prompts)
  if task is None:
    own = next(iter(prompts)) if len(prompts) == 1 else "asr"
    task = own if prompt is None else FREE
  prompt = task_prompt(task, prompts) if prompt is None else prompt
  check_question(prompt, question, task)
  template = config.chat_template if chat_template is None else chat_template
  sides = encode_prompt(tokenizer, fill_template(template, prompt, question or ""))
  check_prompt_suffix(len(sides[1]), prompt, template)
  return task, sides


def with_adapters(
  audio: Iterable, adapter: str | Iterable[str | None] | None, adapters: Adapters | None
) -> Iterator[tuple[Any, str | None]]:
  """Clips, each with the name of its adapter.

  Args:
    audio, adapter: as in `transcribe`.
    adapters: those that were loaded.

  Raises:
    ValueError: at once for the single name of all clips, or for a list of names if there is no
      such adapter; while iterating for names that do not come from a list, and if their number is
      not that of the clips.
  """
  if adapter is not None and adapters is None:
    raise ValueError(
      f"adapter={adapter!r} has no effect: no adapter was loaded; pass"
      " adapters={name: folder} to from_checkpoint"
    )
  if adapter is None or isinstance(adapter, str):
    _check_adapter(adapter, adapters)
    return zip(audio, itertools.repeat(adapter))
  if not isinstance(adapter, Iterable):
    kind = type(adapter).__name__
    raise ValueError(f"adapter={adapter!r} ({kind}): must be a name, or a list of one per clip")
  if isinstance(adapter, (list, tuple)):
    for name in adapter:
      _check_adapter(name, adapters)
  return _pairs(audio, adapter, adapters)


def _pairs(audio: Iterable, names: Iterable[str | None], adapters: Adapters | None):
  for number, (clip, name) in enumerate(itertools.zip_longest(audio, names, fillvalue=_END)):
    if clip is _END or name is _END:
      fewer, more = ("clips", "names") if clip is _END else ("names", "clips")
      raise ValueError(
        f"adapter: {number} {fewer}, but more {more}; give one name for all clips, or one per clip"
      )
    _check_adapter(name, adapters)
    yield clip, name


def _check_adapter(name: Any, adapters: Adapters | None) -> None:
  check_types(str, "the name of an adapter", adapter=name)
  if adapters is not None:
    adapters.scale([name])


def check_audio(audio: Any) -> None:
  single = str, os.PathLike, bytes, np.ndarray, jax.Array, io.IOBase
  if isinstance(audio, single) or not isinstance(audio, Iterable):
    raise ValueError(f"audio: {type(audio).__name__}; give a list of clips, as in [clip]")


def check_batch_size(batch_size: int) -> None:
  check_types(numbers.Integral, "an int", batch_size=batch_size)
  if batch_size is None or batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: must be at least 1")


def check_types(kind: type, name: str, **values: Any) -> None:
  for argument, value in values.items():
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
      raise ValueError(f"{argument}={value!r} ({type(value).__name__}): must be {name}")
