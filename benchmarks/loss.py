"""The loss over a large vocabulary, a block of positions at a time and with all logits at once.

    python -m benchmarks.loss --json benchmarks/results/loss.json

Memory is XLA's plan for one TPU v5e, compiled without one: the loss of 8 answers of 256 tokens over
Qwen2-7B's vocabulary in bfloat16, with its gradient of the hidden states (the head is frozen, as
with LoRA). The time is that of both at the size of Qwen2-0.5B on this machine, in turns.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any

from benchmarks.chips import memory_of, topology_devices  # isort: skip  (before jax)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.provenance import run_benchmark, versions
from mooer_jax import speech_llm, tree
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.nn.compute import ExecutionConfig

SOURCES = ("mooer_jax/speech_llm.py", "benchmarks/loss.py")
WAYS = {"blocks": "dots", "whole": "none"}  # values of compute.remat
PLANNED = ("qwen2_7b", 8, 256, "bfloat16")
TIMED = ("qwen2_0.5b", 4, 128, "float32")
_ROUNDS = 5


def program(size: str, rows: int, tokens: int, dtype: str, way: str):
  """(function of params, hidden states and targets, their shapes)."""
  compute = ExecutionConfig(dtype=dtype, remat=WAYS[way])  # type: ignore[arg-type]
  config = SpeechLLMConfig(decoder=dataclasses.replace(LLMConfig.SIZES[size], layers=1))
  config = config.with_compute(**dataclasses.asdict(compute))

  def loss(params, hidden_BAD, target_BA):
    nats_BA, is_best_BA = speech_llm.token_losses(params, hidden_BAD, target_BA, config)
    return nats_BA.sum(), is_best_BA.sum()

  head = {
    path: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype))
    for path, x in tree.flatten(speech_llm.param_shapes(config)).items()
    if path.startswith(("decoder/head", "decoder/embed"))
  }
  hidden = jax.ShapeDtypeStruct((rows, tokens, config.decoder.hidden_size), jnp.dtype(dtype))
  target = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
  return jax.value_and_grad(loss, 1, has_aux=True), (tree.unflatten(head), hidden, target)


def planned(way: str) -> dict[str, float]:
  """GiB that a chip needs, by kind."""
  function, shapes = program(*PLANNED, way)
  chip = topology_devices("v5e:2x2")[0]
  sharding = NamedSharding(Mesh(np.array([chip]), ("x",)), PartitionSpec())
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
  return memory_of(jax.jit(function).lower(*shapes).compile())


def seconds() -> dict[str, float]:
  """Median time of each way; the ways take turns."""
  rng = np.random.default_rng(0)

  def draw(x):
    if x.dtype == jnp.int32:
      return jnp.asarray(rng.integers(0, LLMConfig.SIZES[TIMED[0]].vocab_size, x.shape), x.dtype)
    return jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))

  run = {}
  for way in WAYS:
    function, shapes = program(*TIMED, way)
    run[way] = functools.partial(jax.jit(function), *jax.tree.map(draw, shapes))
    jax.block_until_ready(run[way]())  # compiles
  times: dict[str, list[float]] = {way: [] for way in WAYS}
  for _ in range(_ROUNDS):
    for way, call in run.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      times[way].append(time.perf_counter() - start)
  return {way: statistics.median(values) for way, values in times.items()}


def measure() -> dict[str, Any]:
  fields = ("size", "rows", "tokens", "dtype")
  memory = {way: planned(way) for way in WAYS}
  times = seconds()
  result = {
    "planned": dict(zip(fields, PLANNED)),
    "gib": memory,
    "timed": dict(zip(fields, TIMED)),
    "time_of_blocks_relative_to_whole": round(times["blocks"] / times["whole"], 3),
    "device": jax.devices()[0].device_kind,
    "versions": versions("jax", "jaxlib", "libtpu"),
  }
  for way, plan in memory.items():
    print(f"{way}: {plan['temporaries']:.2f} GiB besides arguments and results")
  print(f"time of blocks / whole: {result['time_of_blocks_relative_to_whole']}")
  return result


if __name__ == "__main__":
  run_benchmark(__doc__, measure, SOURCES)
