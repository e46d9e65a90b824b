"""Speed of a matrix product with few rows on a CPU, by the form in which the weights are stored.

    python -m benchmarks.cpu_products --json out/cpu_products.json    # on an idle machine
    taskset -c 0 python -m benchmarks.cpu_products --json out/cpu_products_one_core.json

A decode step multiplies 1 to 16 rows by every weight of the LLM, so it is bound by reading them.
Each form computes x [rows, in] times the same matrices, larger together than the caches; all forms
take turns, and the best time of each counts. On one core it is the time of the CPU, which other
programs change less. Also recorded: the matrices that the compiled program writes in another dtype
before the product.
"""

import argparse
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.provenance import versions, write_result
from mooer_jax.generation.weights import quantized_kernel
from mooer_jax.nn.layers import times_int8

SOURCES = ("benchmarks/cpu_products.py", "mooer_jax/nn", "mooer_jax/generation/weights.py")
BASE = "PyTorch, float32"
HIGHEST = jax.lax.Precision.HIGHEST


class Sizes(NamedTuple):
  """Sizes: rows of x, matrices of [inputs, outputs] (those of an MLP of Qwen2-0.5B), repeats."""

  rows: tuple[int, ...] = (1, 3, 16)
  matrices: int = 16
  inputs: int = 896
  outputs: int = 4864
  repeats: int = 15


class Form(NamedTuple):
  """A way to store the weights: name, their arrays, the product with one of them."""

  name: str
  weights: list
  times: Callable[[jax.Array, Any], jax.Array]


def forms(kernels: list[np.ndarray]) -> list[Form]:
  """The forms of float32 kernels [in, out] in JAX; each product returns [rows, out]."""

  def transposed(x, weight_OI):  # as `nn.layers.Dense`
    y_OR = jnp.matmul(weight_OI, x.T, precision=HIGHEST)
    return jax.lax.optimization_barrier(y_OR).T

  def dequantized(x, weight):
    rounded_IO, scale_O = weight
    return jnp.matmul(x, rounded_IO.astype(jnp.float32), precision=HIGHEST) * scale_O

  def by_int8(x, weight):
    rounded_OI, scale_O = weight
    return times_int8(x, rounded_OI) * scale_O

  kernels = [jnp.asarray(kernel_IO) for kernel_IO in kernels]
  rounded = [quantized_kernel(kernel_IO) for kernel_IO in kernels]
  turned = [(rounded_IO.T, scale_O) for rounded_IO, scale_O in rounded]
  return [
    Form("float32 [in, out]", kernels, lambda x, w: jnp.matmul(x, w, precision=HIGHEST)),
    Form("float32 [out, in]", [kernel_IO.T for kernel_IO in kernels], transposed),
    Form("int8, dequantized in the program", rounded, dequantized),
    Form("int8 by int8, inputs of 16 bits", turned, by_int8),
  ]


def cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0))


def written(program: str, shape: tuple[int, int]) -> int:
  """Number of float32 matrices of this shape, or transposed, that a compiled program converts."""
  sizes = rf"f32\[(?:{shape[0]},{shape[1]}|{shape[1]},{shape[0]})\]"
  body = program[program.index("ENTRY") :]  # what a fusion computes inside is not written
  return len(re.findall(rf"= {sizes}\S* (?:fusion|convert|call)\(", body))


def measure(sizes: Sizes) -> dict[str, Any]:
  """Seconds, bytes per second and the ratio to PyTorch of each form, for each number of rows."""
  rng = np.random.default_rng(0)
  shape = sizes.inputs, sizes.outputs
  kernels = [rng.normal(size=shape).astype(np.float32) for _ in range(sizes.matrices)]
  weights = [torch.from_numpy(np.ascontiguousarray(kernel_IO.T)) for kernel_IO in kernels]
  ours, result = forms(kernels), {}
  for rows in sizes.rows:
    x = rng.normal(size=(rows, sizes.inputs)).astype(np.float32)
    theirs, exact = torch.from_numpy(x), x.astype(np.float64) @ kernels[-1]
    calls: dict[str, Callable] = {
      BASE: lambda theirs=theirs: [torch.nn.functional.linear(theirs, w) for w in weights],
      "NumPy, float32": lambda x=x: [x @ kernel_IO for kernel_IO in kernels],
    }
    size, converted = {name: sum(w.nbytes for w in kernels) for name in calls}, {}
    for name, arrays, times in ours:
      product = jax.jit(lambda x, ws, times=times: [times(x, w) for w in ws])
      compiled = product.lower(x, arrays).compile()
      calls[name] = lambda f=compiled, x=x, ws=arrays: jax.block_until_ready(f(x, ws))
      size[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
      converted[name] = written(compiled.as_text(), shape)
    seconds = best_seconds(calls, sizes.repeats)
    result[str(rows)] = {
      name: {
        "seconds": seconds[name],
        "gb_per_second": size[name] / seconds[name] / 1e9,
        "speed": seconds[BASE] / seconds[name],
        "relative_error": float(np.abs(np.asarray(call()[-1]) - exact).max() / exact.std()),
        "matrices_converted": converted.get(name, 0),
      }
      for name, call in calls.items()
    }
  return result


def best_seconds(calls: dict[str, Callable], repeats: int) -> dict[str, float]:
  """The shortest time of each call after one to warm up; the calls take turns."""
  clock = time.process_time if cores() == 1 else time.perf_counter
  times: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(repeats + 1):
    for name, call in calls.items():
      start = clock()
      call()
      times[name].append(clock() - start)
  return {name: min(found[1:]) for name, found in times.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  if jax.default_backend() != "cpu":
    raise SystemExit("this benchmark is for CPUs; set JAX_PLATFORMS=cpu")
  sizes = Sizes()
  result = measure(sizes)
  table = Table("rows", "weights", f"speed, {BASE} = 1", "GB/s", "error")
  for rows, found in result.items():
    for name, row in found.items():
      figures = row["speed"], row["gb_per_second"], row["relative_error"]
      table.add_row(rows, escape(name), *(f"{x:.2g}" for x in figures))
  Console().print(table)
  about = {"sizes": sizes._asdict(), "cores": cores(), "rows": result}
  write_result(args.json, {**about, "versions": versions("jax", "jaxlib", "torch")}, SOURCES)


if __name__ == "__main__":
  main()
