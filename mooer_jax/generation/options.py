"""How an answer is searched for: the options of `transformers.generate`, by their names."""

import dataclasses
import math
from typing import ClassVar, Literal


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
  """Decoding options, named and meant as in `transformers.generate` called with embeddings.

  Attributes:
    max_new_tokens: upper bound on generated tokens, eos included.
    eos_token_id: tokens that end an answer.
    do_sample: False takes the most probable, True draws.
    temperature: divides the scores before drawing, > 0.
    top_k: draws from the k most probable tokens only; 0 = all.
    top_p: draws from the smallest set of most probable tokens that holds this much mass.
    num_beams: answers followed side by side; 1 is greedy decoding or plain sampling.
    length_penalty: an answer's score is its summed log-probability / length ** length_penalty.
    early_stopping: True stops as soon as num_beams answers are complete; False when no open beam
      would beat them at its present length; "never" when none could at any length.
    num_return_sequences: answers returned for each utterance, best first; with one beam, draws.
    min_length: eos is barred until prompt and answer together have this many tokens.
    min_new_tokens: eos is barred until the answer has this many; given, it replaces min_length.
    repetition_penalty: divides positive scores of tokens that the answer holds already, multiplies
      negative ones; 1 does nothing. The prompt does not count.
    no_repeat_ngram_size: no n tokens in a row come twice in an answer; 0 = no such rule.
    sequence_bias: (token, value) pairs; the value is added to the token's score at every step.
      Of transformers' sequence_bias, the sequences of one token.
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
    for name, least in (
      ("max_new_tokens", 1),
      ("num_beams", 1),
      ("num_return_sequences", 1),
      ("top_k", 0),
      ("min_length", 0),
      ("min_new_tokens", 0),
      ("no_repeat_ngram_size", 0),
    ):
      value = getattr(self, name)
      if value is not None and value < least:
        raise ValueError(f"generation.{name}={value}: at least {least}")
    if self.min_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
      raise ValueError(
        f"generation.min_new_tokens={self.min_new_tokens} exceeds max_new_tokens="
        f"{self.max_new_tokens}"
      )
    if not 0 < self.temperature < math.inf:
      raise ValueError(
        f"generation.temperature={self.temperature}: must be a number above 0; for greedy decoding"
        " set do_sample=False"
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
        f"generation.num_return_sequences={self.num_return_sequences} answers cannot come out of"
        f" num_beams={self.num_beams}; raise num_beams, or draw with do_sample=True and one beam"
      )

  @property
  def width(self) -> int:
    """Hypotheses followed side by side for each utterance: beams, or independent draws."""
    return self.num_beams if self.num_beams > 1 else self.num_return_sequences
