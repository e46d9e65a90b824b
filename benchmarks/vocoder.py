"""Speed of the vocoder beside the same vocoder in PyTorch, in the same run.

  python -m benchmarks.vocoder --json out/vocoder.json

Both sides run the generator of MooER-omni in float32 on the same hidden states: 27.0 M parameters,
random weights, weight norm removed. PyTorch's side is the published structure in torch's
convolutions. Each side has a process of its own, and they take turns, so that the ratios hold on a
busy machine, too. "chunk" is what streaming runs again and again: a few new states, and those
around them that their samples depend on.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import versions, write_result

SOURCES = ("mooer_jax/vocoders", "mooer_jax/kernels/arrays.py", "benchmarks/vocoder.py")
NEW_STATES = 8  # of a chunk


class Case(NamedTuple):
  name: str
  rows: int
  states: int


def cases() -> list[Case]:
  from mooer_jax.vocoders import HiFiGANConfig

  chunk = NEW_STATES + 2 * HiFiGANConfig().context
  return [
    Case("5 s", 1, 108),
    Case("20 s", 1, 431),
    Case("4 x 5 s", 4, 108),
    Case("chunk", 1, chunk),
  ]


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
  """(states [rows, states, 3584], unit vectors of voices [rows, 512])."""
  rng = np.random.default_rng(0)
  states_BTD = rng.normal(size=(case.rows, case.states, 3584)).astype(np.float32)
  speaker_BE = rng.normal(size=(case.rows, 512)).astype(np.float32)
  return states_BTD, speaker_BE / np.linalg.norm(speaker_BE, axis=1, keepdims=True)


def random_weights():
  from mooer_jax.vocoders import HiFiGANConfig
  from tests.vocoders.torch_vocoder import generator_state

  return generator_state(HiFiGANConfig())


def load_ours() -> Callable[[Case], np.ndarray]:
  import jax

  from convert.parts.vocoder import GENERATOR
  from mooer_jax import tree
  from mooer_jax.vocoders import HiFiGANConfig
  from mooer_jax.vocoders.hifigan import fold

  leaves = {}
  for name, tensor in random_weights().items():
    path, layout = GENERATOR.to_jax(name) or ("", None)
    assert layout is not None, name
    leaves[path.removeprefix("vocoder/")] = np.ascontiguousarray(layout.to_jax(tensor.numpy()))
  params = jax.jit(fold)(tree.unflatten(leaves))
  module = HiFiGANConfig().module()
  run = jax.jit(lambda *inputs: module.apply({"params": params}, *inputs))

  def speak(case: Case) -> np.ndarray:
    states_BTD, speaker_BE = inputs(case)
    return np.asarray(run(states_BTD, np.full(case.rows, case.states), speaker_BE))

  return speak


def load_theirs() -> Callable[[Case], np.ndarray]:
  import torch

  from convert.verify.reference import vocoder as reference

  state = reference.without_weight_norm(random_weights())

  def speak(case: Case) -> np.ndarray:
    with torch.inference_mode():
      return reference.generate(state, *map(torch.from_numpy, inputs(case))).numpy()

  return speak


SIDES = {"mooer_jax": load_ours, "pytorch": load_theirs}


def serve(side: str, connection) -> None:
  """The process of a side: answers cases with (seconds, waveform)."""
  speak = SIDES[side]()
  while (case := connection.recv()) is not None:
    start = time.perf_counter()
    waveform_BN = speak(case)
    connection.send((time.perf_counter() - start, waveform_BN))


def measure(case: Case, sides: dict[str, Any], repeats: int) -> dict[str, Any]:
  """Times of a case, the sides in turns: the first call, and the median of the others."""

  def ask(side):
    sides[side].send(case)
    return sides[side].recv()

  first = {side: ask(side) for side in sides}
  times: dict[str, list[float]] = {side: [] for side in sides}
  for _ in range(repeats):
    for side in sides:
      times[side].append(ask(side)[0])
  medians = {side: statistics.median(values) for side, values in times.items()}
  ours_BN, theirs_BN = (first[side][1] for side in SIDES)
  audio_s = ours_BN.size / 22050
  return {
    "rows": case.rows,
    "states": case.states,
    "audio_s": round(audio_s, 2),
    "seconds": {side: round(value, 4) for side, value in medians.items()},
    "of_real_time": {side: round(value / audio_s, 3) for side, value in medians.items()},
    "first_call_s": {side: round(first[side][0], 2) for side in sides},
    "ratio": round(medians["pytorch"] / medians["mooer_jax"], 2),
    "largest_difference": float(np.abs(ours_BN - theirs_BN).max()),
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  context, sides, processes = multiprocessing.get_context("spawn"), {}, []
  for side in SIDES:
    sides[side], other = context.Pipe()
    processes.append(context.Process(target=serve, args=(side, other), daemon=True))
    processes[-1].start()
  found = {case.name: measure(case, sides, args.repeats) for case in cases()}
  for connection in sides.values():
    connection.send(None)
  for process in processes:
    process.join()
  rows = Table("case", "states", *(f"{side}, of real time" for side in SIDES), "PyTorch / JAX")
  for name, result in found.items():
    shares = [f"{result['of_real_time'][side]:.3f}" for side in SIDES]
    rows.add_row(name, str(result["states"]), *shares, f"{result['ratio']:.2f}")
  Console().print(rows)
  result = {"dtype": "float32", "cases": found, "versions": versions("jax", "jaxlib", "torch")}
  write_result(args.json, result, SOURCES)


if __name__ == "__main__":
  main()
