"""Curves of cost: memory of an encoder by length of audio, time of a step by batch and beams.

    python -m benchmarks.curves --json out/curves.json --png out/curves.png

Memory is XLA's plan of SAN-M (MooER's encoder, bfloat16) for one TPU v5e, compiled without one,
with attention by the Pallas kernel and by XLA. Times are of decode steps of random LLMs in float32
on this machine's CPU, relative to one clip with one beam.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.chips import memory_of, topology_devices  # isort: skip  (before jax)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.provenance import MODEL, versions, write_result
from mooer_jax import speech_llm, tree
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.generation import GenerationConfig, generate_from, weights
from mooer_jax.nn.compute import ExecutionConfig

SOURCES = (*MODEL, "mooer_jax/generation", "benchmarks/curves.py")
SECONDS = (5, 15, 30, 60, 120, 300, 600, 1800)
FRAME_S = 0.06  # of SAN-M, after stacking
ROWS = ((1, 1), (4, 1), (16, 1), (1, 4), (1, 8))  # clips, beams
SIZES = ("smollm2_135m", "qwen2_0.5b")
_PROMPT, _NEW, _ROUNDS = 64, 9, 3


def encoder_memory(seconds: float, attention: str, chip) -> float | None:
  """GiB that the encoder needs on a chip for one clip; None if it does not fit."""
  encoder = SANMConfig()
  compute = ExecutionConfig(dtype="bfloat16", scan=True, attention=attention, platform="tpu")
  module = encoder.module(compute)
  sharding = NamedSharding(Mesh(np.array([chip]), ("x",)), PartitionSpec())

  def shape(x, dtype=None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

  x_BTF = jax.ShapeDtypeStruct((1, round(seconds / FRAME_S), encoder.input_width), jnp.bfloat16)
  valid_BT = jax.ShapeDtypeStruct(x_BTF.shape[:2], jnp.bool_)
  params = jax.eval_shape(module.init, jax.random.key(0), x_BTF, valid_BT)
  params = jax.tree.map(lambda x: shape(x, jnp.bfloat16), params)
  lowered = jax.jit(module.apply).lower(params, shape(x_BTF), shape(valid_BT))
  try:
    return memory_of(lowered.compile())["peak"]
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None


def step_seconds(params, config: SpeechLLMConfig, clips: int, beams: int) -> float:
  """Median time of a decode step: that of a long answer minus that of one token."""
  inputs_BSD = jnp.ones((clips, _PROMPT, config.decoder.hidden_size))
  valid_BS = jnp.ones((clips, _PROMPT), bool)

  def answer(tokens):
    options = GenerationConfig(
      max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=(0,), num_beams=beams
    )
    run = jax.jit(lambda params, x, valid: generate_from(params, x, valid, config, options))
    jax.block_until_ready(run(params, inputs_BSD, valid_BS))
    times = []
    for _ in range(_ROUNDS):
      start = time.perf_counter()
      jax.block_until_ready(run(params, inputs_BSD, valid_BS))
      times.append(time.perf_counter() - start)
    return statistics.median(times)

  return (answer(_NEW) - answer(1)) / (_NEW - 1)


def random_llm(size: str) -> tuple[dict, SpeechLLMConfig]:
  config = SpeechLLMConfig(decoder=LLMConfig.SIZES[size])
  shapes = speech_llm.param_shapes(config)["decoder"]
  rng = np.random.default_rng(0)
  flat = {
    path: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))
    for path, x in tree.flatten({"decoder": shapes}).items()
  }
  params = {"encoders": {}, **tree.unflatten(flat)}
  return weights.lay_out(params, config), config


def measure() -> dict[str, Any]:
  """The content of the JSON file; prints each figure once it is there."""
  chip = topology_devices("v5e:2x2")[0]
  memory: dict[str, dict[str, float | None]] = {"mosaic": {}, "xla": {}}
  for seconds, attention in itertools.product(SECONDS, memory):
    gib = memory[attention][str(seconds)] = encoder_memory(seconds, attention, chip)
    told = "does not fit" if gib is None else f"{gib:.2f} GiB"
    print(f"encoder, attention={attention}, {seconds} s of audio: {told}", flush=True)
  steps: dict[str, dict[str, float]] = {}
  for size in SIZES:
    params, config = random_llm(size)
    steps[size], one = {}, None
    for clips, beams in ROWS:
      seconds = step_seconds(params, config, clips, beams)
      one = one or seconds
      ratio = steps[size][f"{clips}x{beams}"] = round(seconds / one, 3)
      print(f"step of {size}, {clips} clips x {beams} beams: {ratio} of 1 x 1", flush=True)
    del params
  return {
    "encoder_gib_by_seconds": memory,
    "encoder": dataclasses.asdict(SANMConfig()),
    "chip": chip.device_kind,
    "step_relative_to_1x1_by_clips_x_beams": steps,
    "versions": versions("jax", "jaxlib", "libtpu", "flax"),
  }


def draw(result: dict[str, Any], path: Path) -> None:
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
  for attention, label in (("mosaic", "Pallas kernel"), ("xla", "XLA")):
    memory = result["encoder_gib_by_seconds"][attention]
    points = [(float(s), gib) for s, gib in memory.items() if gib is not None]
    left.plot(*zip(*points), marker="o", label=label)
  left.set(xscale="log", yscale="log", xlabel="audio, seconds", ylabel="GiB on a TPU v5e (plan)")
  left.set_title("SAN-M encoder, one clip")
  left.axhline(16, color="gray", linestyle=":", label="the chip")
  left.legend()
  for size, steps in result["step_relative_to_1x1_by_clips_x_beams"].items():
    for kind, style in (("clips", "-"), ("beams", "--")):
      cases = [tuple(map(int, case.split("x"))) for case in steps]
      chosen = [c for c in cases if c[kind == "clips"] == 1]
      chosen.sort()
      numbers = [c[kind == "beams"] for c in chosen]
      times = [steps[f"{a}x{b}"] for a, b in chosen]
      right.plot(numbers, times, style, marker="o", label=f"{size}, {kind}")
  right.set(xlabel="clips (one beam), or beams (one clip)", ylabel="time / that of 1 clip, 1 beam")
  right.set_title("a decode step on the CPU")
  right.legend()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--json", type=Path, help="file to write")
  parser.add_argument("--png", type=Path, help="picture to write")
  args = parser.parse_args()
  result = measure()
  write_result(args.json, result, SOURCES)
  if args.png:
    draw(result, args.png)


if __name__ == "__main__":
  main()
