"""Sizes, timing and results of the comparison of LLMs, for both frameworks."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from mooer_jax.decoders.llm import LLMConfig

LR = 1e-3  # high enough for the loss on one batch to fall within a few updates
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the three workloads: forward pass, train step, greedy decoding."""

  llm: LLMConfig = dataclasses.replace(LLMConfig.SIZES["qwen2_7b"], lora_rank=64)  # as in MooER
  rows: int = 8
  tokens: int = 512  # of forward pass and train step
  answer: int = 64  # the last of these tokens, which have logits
  prompt: int = 128  # tokens before decoding
  new: int = 64  # decoded tokens
  repeats: int = 5  # timed calls after the first one

  def with_token_rate(self, result: dict[str, Any]) -> dict[str, Any]:
    """Add the speed of greedy decoding to its time."""
    return {**result, "tokens_per_second": self.rows * self.new / result["seconds"]}


FULL = Sizes()
SMALL_LLM = LLMConfig(
  vocab_size=512, hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate_size=128,
  lora_rank=4,
)  # fmt: skip
DRY = Sizes(SMALL_LLM, rows=2, tokens=32, answer=8, prompt=8, new=4, repeats=2)


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
  """Median time of a call that waits for the device, after one call to warm up."""
  times = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return statistics.median(times[1:])


def with_falling_losses(result: dict[str, Any], losses: list[float]) -> dict[str, Any]:
  """Add the losses of train steps on one batch, which must fall, to their time."""
  if not losses[-1] < losses[0]:
    raise FloatingPointError(f"the loss on one batch did not fall: {losses}")
  return {**result, "losses": losses}
