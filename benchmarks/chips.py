"""TPU chips that programs are compiled for on a CPU machine, with the compiler in libtpu."""

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# Otherwise libtpu queries a cloud server for the chips of this machine, which takes seconds.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# It also locks the chips for one process, but there are none.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.experimental import topologies
from rich.table import Table

GIB = 2**30


class Memory(NamedTuple):
  """Memory of one chip: GiB, of which the compiler reserves a little, and GB/s (10^9 bytes)."""

  gib: int
  gb_per_s: int


# Source: https://docs.cloud.google.com/tpu/docs/v5e, and the same pages of v5p, v4 and v6e
MEMORY = {
  "TPU v5 lite": Memory(16, 819),
  "TPU v5": Memory(95, 2765),
  "TPU v4": Memory(32, 1228),
  "TPU v6 lite": Memory(32, 1640),
}


class Peaks(NamedTuple):
  """Published peaks of one chip.

  Attributes:
    tflop_per_s: bfloat16, 10^12 operations a second.
    link_gb_per_s: one link to a neighbour (ICI), one direction, GB/s.
    torus: number of chips from which an axis closes to a ring, with two links a chip.
    dcn_gb_per_s: a chip's share of the network between slices, GB/s.
  """

  tflop_per_s: float
  link_gb_per_s: float
  torus: int
  dcn_gb_per_s: float


# Sources, read in 2026:
# - v5e, https://docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, ICI 400 GB/s in both directions
#   over 4 ports, 2D torus of 16 x 16 in a pod, DCN 6.4 Tbit/s for a pod of 256 chips.
# - v5p, https://docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, ICI 1200 GB/s in both directions,
#   3D torus (6 ports) from 4 x 4 x 4 on, DCN 50 Gbit/s.
# - v6e, https://docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, ICI 800 GB/s in both directions
#   over 4 ports (an earlier version of the page: 3584 Gbit/s in one direction), DCN 25.6 Tbit/s for
#   a pod of 256 chips.
PEAKS = {
  "TPU v5 lite": Peaks(197, 400 / 2 / 4, 16, 6400 / 8 / 256),
  "TPU v5": Peaks(459, 1200 / 2 / 6, 4, 50 / 8),
  "TPU v6 lite": Peaks(918, 800 / 2 / 4, 16, 25600 / 8 / 256),
}


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
  """Return the chips of a named topology, such as "v5e:4x4", or of several slices of its shape."""
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "libtpu is not installed, which has the compiler for TPUs; install it with:"
      " pip install '.[tpu]' (Linux on x86-64)"
    )
  several = {"num_slices": slices} if slices > 1 else {}
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices
  except jax.errors.JaxRuntimeError as error:
    if "INVALID_ARGUMENT" not in str(error):
      raise
    raise ValueError(
      f"--topology={name}: {error}. Names are KIND:SHAPE, as in v5e:4x4, v6e:2x2, v5p:8x8x8"
    ) from error


def memory_of(compiled) -> dict[str, float]:
  """XLA's memory plan for one chip in GiB; peak = everything that is in use at once."""
  stats = compiled.memory_analysis()
  parts = {
    "arguments": stats.argument_size_in_bytes,
    "outputs": stats.output_size_in_bytes,
    "aliased": stats.alias_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "code": stats.generated_code_size_in_bytes,
  }
  alive = sum(parts.values()) - 2 * parts["aliased"]  # aliased outputs lie in their arguments
  return {name: round(size / GIB, 4) for name, size in {**parts, "peak": alive}.items()}


def kernels_of(compiled) -> dict[str, dict[str, int]]:
  """Pallas kernels of a compiled program: {name: calls, the largest VMEM of a call in bytes}.

  The body of a loop counts once.
  """
  found: dict[str, dict[str, int]] = {}
  for line in compiled.as_text().splitlines():
    if 'custom_call_target="tpu_custom_call"' not in line:
      continue
    name = re.search(r'op_name="[^"]*?(\w+)\)*/pallas_call"', line)
    scoped = re.search(
      r'"used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"', line
    )
    kernel = found.setdefault(name[1] if name else "unnamed", {"calls": 0, "vmem_bytes": 0})
    kernel["calls"] += 1
    kernel["vmem_bytes"] = max(kernel["vmem_bytes"], int(scoped[1]) if scoped else 0)
  return dict(sorted(found.items()))


def memory_table(program: str, result: Mapping[str, Any]) -> Table:
  """A table with the rows that all programs have: mesh, batch and memory."""
  rows = Table("", "one chip", title=f"{program} on {result['chips']} x {result['chip']}")
  rows.add_row("mesh", " x ".join(f"{k} {v}" for k, v in result["mesh"].items()))
  rows.add_row("batch", ", ".join(f"{k} {v:g}" for k, v in result["batch"].items()))
  calls = ", ".join(f"{name} {kernel['calls']}" for name, kernel in result["kernels"].items())
  rows.add_row("calls of Pallas kernels", calls or "none")
  for name, value in result["memory_gb_per_chip"].items():
    rows.add_row(f"memory: {name}", f"{value:.3f} GiB")
  rows.add_row("memory of a chip", f"{result['hbm_of_chip_gb']} GiB")
  return rows
