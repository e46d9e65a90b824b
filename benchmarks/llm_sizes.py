"""Sizes and timing of the comparison of LLMs, for both frameworks."""

import dataclasses
import statistics
import time
from collections.abc import Callable

from mooer_jax.decoders.llm import LLMConfig

LR = 1e-3  # high enough for the loss on one batch to fall within a few updates


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the three workloads.

  Attributes:
    llm: the model, with LoRA as in MooER.
    rows, tokens, answer: of forward pass and train step, with logits at the last `answer` tokens.
    prompt, new: tokens of greedy decoding, with the same number of rows.
    repeats: number of timed calls after the first one.
  """

  llm: LLMConfig
  rows: int
  tokens: int
  answer: int
  prompt: int
  new: int
  repeats: int


FULL = Sizes(
  llm=dataclasses.replace(LLMConfig.SIZES["qwen2_7b"], lora_rank=64),
  rows=8,
  tokens=512,
  answer=64,
  prompt=128,
  new=64,
  repeats=5,
)
DRY = Sizes(
  llm=LLMConfig(
    vocab_size=512,
    hidden_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    lora_rank=4,
  ),
  rows=2,
  tokens=32,
  answer=8,
  prompt=8,
  new=4,
  repeats=2,
)


def median_seconds(call: Callable[[], None], repeats: int) -> float:
  """Median time of a call that waits for the device, after one call to warm up."""
  times = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return statistics.median(times[1:])
