"""Decoding options, named as in `transformers.generate`."""

import dataclasses
import math
import typing
from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np

from mooer_jax.config import convert

LONGEST = 2**17  # new tokens; the cache has a slot for each, and memory for far more would run out


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
  """Decoding options, named and meant as in `transformers.generate` called with embeddings.

  Attributes:
    max_new_tokens: maximum number of generated tokens, including the eos.
    eos_token_id: ids of the tokens that end generation.
    do_sample: sample instead of greedy decoding.
    temperature: sampling temperature, above 0.
    top_k: sample from the k most probable tokens; 0 is all.
    top_p: nucleus (top-p) sampling threshold, in (0, 1].
    num_beams: number of beams; 1 is greedy decoding or plain sampling.
    length_penalty: exponent of the length in beam scores, summed log-probability / length ** it.
    early_stopping: True stops as soon as num_beams hypotheses are finished; False when no open
      beam would beat them at its present length; "never" when none could at any length.
    num_return_sequences: hypotheses returned per utterance, best first; with one beam, samples.
    min_length: minimum length of prompt and generated tokens together.
    min_new_tokens: minimum number of generated tokens; replaces min_length if given.
    repetition_penalty: penalty on tokens generated before (not those of the prompt); 1 is none.
    no_repeat_ngram_size: forbid repeating any n-gram of this size; 0 allows all.
    sequence_bias: (token, value) pairs; the value is added to the token's score at every step.
      Only transformers' sequences of one token.
    return_hidden: also return the last hidden state at each generated token.
  """

  RENAMED: ClassVar = {"eos_ids": "eos_token_id"}
  max_new_tokens: int = 200
  eos_token_id: tuple[int, ...] = ()
  do_sample: bool = False
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  num_beams: int = 1
  length_penalty: float = 1.0
  early_stopping: bool | Literal["never"] = False
  num_return_sequences: int = 1
  min_length: int = 0
  min_new_tokens: int | None = None
  repetition_penalty: float = 1.0
  no_repeat_ngram_size: int = 0
  sequence_bias: tuple[tuple[int, float], ...] = ()
  return_hidden: bool = False

  def __post_init__(self):
    """Raises ValueError for a value of another type, or outside its range."""
    for name, hint in typing.get_type_hints(GenerationConfig).items():
      if name != "RENAMED":
        value = convert(hint, getattr(self, name), f"generation.{name}")
        object.__setattr__(self, name, value)

    def require(name: str, is_valid: bool, allowed: str):
      if not is_valid:
        raise ValueError(f"generation.{name}={getattr(self, name)!r}: must be {allowed}")

    for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
      require(name, getattr(self, name) >= 1, "at least 1")
    require("max_new_tokens", self.max_new_tokens <= LONGEST, f"at most {LONGEST}")
    for name in ("top_k", "min_length", "min_new_tokens", "no_repeat_ngram_size"):
      require(name, (getattr(self, name) or 0) >= 0, "at least 0")
    is_valid = (self.min_new_tokens or 0) <= self.max_new_tokens
    require("min_new_tokens", is_valid, f"at most max_new_tokens={self.max_new_tokens}")
    tiny, largest = np.finfo(np.float32).tiny, np.finfo(np.float32).max  # logits are float32
    limits = f"a number from {tiny:.2g} to {largest:.2g}; for greedy decoding set do_sample=False"
    require("temperature", tiny <= self.temperature <= largest, limits)
    require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
    is_valid = 0 < self.repetition_penalty < math.inf
    require("repetition_penalty", is_valid, "a number above 0; 1 is no penalty")
    # Scores are divided by length ** length_penalty in float32.
    limit = math.log(1e30) / math.log(max(2, self.max_new_tokens))
    is_valid = abs(self.length_penalty) <= limit
    require("length_penalty", is_valid, f"from {-limit:.3g} to {limit:.3g} (1 is the default)")
    require("early_stopping", self.early_stopping in (True, False, "never"), "a bool or 'never'")
    require("eos_token_id", min(self.eos_token_id, default=0) >= 0, "ids of at least 0")
    biases = dict(self.sequence_bias)
    is_valid = len(biases) == len(self.sequence_bias) and min(biases, default=0) >= 0
    is_valid &= all(map(math.isfinite, biases.values()))
    require("sequence_bias", is_valid, "(token, finite value) pairs, each token once")
    if self.num_return_sequences > self.num_beams and not (self.do_sample and self.num_beams == 1):
      raise ValueError(
        f"generation.num_return_sequences={self.num_return_sequences} exceeds"
        f" num_beams={self.num_beams}; raise num_beams, or sample with do_sample=True and one beam"
      )

  def check_effect(self, given: Iterable[str]) -> None:
    """Raises ValueError if one of the options that the user gave (or the seed) has no effect."""
    for name in given:
      if name in ("temperature", "top_k", "top_p", "seed") and not self.do_sample:
        raise ValueError(
          f"{name} has no effect without sampling; add do_sample=True (--do-sample) or leave it out"
        )
      if name == "min_length" and self.min_new_tokens is not None:
        raise ValueError("min_length has no effect beside min_new_tokens; leave one of them out")
      if name in ("length_penalty", "early_stopping") and self.num_beams == 1:
        raise ValueError(
          f"{name} has no effect with one beam; raise num_beams (--num-beams) or leave it out"
        )

  @property
  def width(self) -> int:
    """Hypotheses per utterance that run side by side: beams, or independent samples."""
    return self.num_beams if self.num_beams > 1 else self.num_return_sequences
