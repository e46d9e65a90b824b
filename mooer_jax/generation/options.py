"""Decoding options, named as in `transformers.generate`."""

import dataclasses
import math
from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np


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
    least_1 = ("max_new_tokens", "num_beams", "num_return_sequences")
    for name in (*least_1, "top_k", "min_length", "min_new_tokens", "no_repeat_ngram_size"):
      least = 1 if name in least_1 else 0
      value = getattr(self, name)
      if value is not None and value < least:
        raise ValueError(f"generation.{name}={value}: must be at least {least}")
    if self.min_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
      raise ValueError(
        f"generation.min_new_tokens={self.min_new_tokens} exceeds max_new_tokens="
        f"{self.max_new_tokens}"
      )
    float32 = np.finfo(np.float32)  # logits are divided in float32, where a smaller number is 0
    if not float32.tiny <= self.temperature <= float32.max:
      raise ValueError(
        f"generation.temperature={self.temperature}: must be a number from {float32.tiny:.2g} to"
        f" {float32.max:.2g}; for greedy decoding set do_sample=False"
      )
    if not 0 < self.top_p <= 1:
      raise ValueError(f"generation.top_p={self.top_p}: must be in (0, 1]")
    if not 0 < self.repetition_penalty < math.inf:
      raise ValueError(
        f"generation.repetition_penalty={self.repetition_penalty}: must be a number above 0; 1 is"
        " no penalty"
      )
    if not math.isfinite(self.length_penalty):
      raise ValueError(f"generation.length_penalty={self.length_penalty}: must be a finite number")
    if not all(math.isfinite(value) for _, value in self.sequence_bias):
      raise ValueError(f"generation.sequence_bias={self.sequence_bias}: values must be finite")
    if self.early_stopping not in (True, False, "never"):
      raise ValueError(f"generation.early_stopping={self.early_stopping!r}: True, False or 'never'")
    biased = [token for token, _ in self.sequence_bias]
    if len(set(biased)) < len(biased) or min(biased, default=0) < 0:
      raise ValueError(
        f"generation.sequence_bias={self.sequence_bias}: (token, value) pairs, each token once"
      )
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
      if name in ("length_penalty", "early_stopping") and self.num_beams == 1:
        raise ValueError(
          f"{name} has no effect with one beam; raise num_beams (--num-beams) or leave it out"
        )

  @property
  def width(self) -> int:
    """Hypotheses per utterance that run side by side: beams, or independent samples."""
    return self.num_beams if self.num_beams > 1 else self.num_return_sequences
