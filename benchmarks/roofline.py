"""Estimate of the time of a step from the plan of its program: the slowest of four bounds.

The bounds are matrix products, HBM, the links inside a slice (ICI) and the network between slices
(DCN). Each runs at its published peak and overlaps the others perfectly; a real step is slower.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from benchmarks import traffic
from benchmarks.chips import MEMORY, PEAKS
from benchmarks.hlo import Program
from benchmarks.traffic import Collective

T = TypeVar("T")
K = TypeVar("K")
LISTED = 12  # collectives in the JSON file, those that move most
# Parts of the path of an operation that name no place in the model.
_LOOPS = {"", "train_step", "while", "body", "closed_call", "checkpoint", "rematted_computation",
          "dot_general"}  # fmt: skip


def estimate(
  program: Program,
  devices: Sequence,
  *,
  slices: int = 1,
  flops: float,
  flops_needed: float,
  llm_bytes: int,
) -> dict[str, Any]:
  """Traffic of a program and its estimated time, per chip.

  Args:
    devices: chips in the order of the mesh.
    slices: number of slices, which the first axis of the mesh splits.
    flops: matrix products of a chip, with recomputation.
    flops_needed: the same without recomputation.
    llm_bytes: all weights of the LLM, for the share of the largest gather.
  """
  kind = devices[0].device_kind
  places = np.array([device.coords for device in devices[: len(devices) // slices]])
  torus = PEAKS[kind].torus if kind in PEAKS else math.inf
  collectives, transfers = traffic.collectives(program), traffic.transfers(program)
  hbm = traffic.hbm_bytes(program)
  found: dict[str, Any] = {
    "hbm_bytes_per_chip": hbm,
    "hbm_bytes_mean": (
      "operands and results in HBM of every instruction of the compiled program, loop bodies once"
      " per iteration, slices with their own size; a Pallas kernel reads each operand once"
    ),
    "collectives": _summed(collectives, lambda c: c.kind),
    "collectives_mean": (
      "of one chip and one step, loop bodies once per iteration; bytes: what a chip must receive"
    ),
    "collectives_that_move_most": _listed(collectives),
    "between_slices": {
      name: {"calls": sum(t.calls for t in of), "bytes": sum(t.calls * t.bytes for t in of)}
      for name, of in _grouped(transfers, lambda t: f"{t.kind} {t.reduction}".strip()).items()
    },
  }
  if gathers := [c for c in collectives if c.kind == "all-gather"]:
    largest = max(gathers, key=lambda c: c.whole_bytes)
    found["largest_gather"] = {
      "moves": _place(largest),
      "bytes": largest.whole_bytes,
      "share_of_the_llm": round(largest.whole_bytes / llm_bytes, 4),
    }
  if kind in PEAKS:
    # A sum over s slices costs a chip at least 2 (s - 1) / s of its part, in and out.
    twice = 2 * (slices - 1) / slices
    dcn = sum(t.calls * t.bytes * (twice if t.kind == "all-reduce" else 1) for t in transfers)
    links = sum(received(c) / links_of(c, places, torus) for c in collectives)
    found["estimate"] = _times(
      kind, flops=flops, flops_needed=flops_needed, hbm=hbm, links=links, dcn=dcn
    )
  return found


def received(collective: Collective) -> float:
  """Bytes that a chip must receive in all calls of a collective, each once."""
  size, chips = collective.calls * collective.whole_bytes, collective.groups.shape[1]
  if collective.kind == "collective-permute":
    return size
  twice = 2 if collective.kind == "all-reduce" else 1  # it sums, then it gathers
  return twice * size * (chips - 1) / chips


def links_of(collective: Collective, places: np.ndarray, torus: float) -> int:
  """Number of links of the chip that has the fewest, along the axes that a collective spans.

  An axis that closes to a ring has two, another axis one. Permutes go both ways around a ring.

  Args:
    places: int [chips, axes], coordinates of the chips.
    torus: number of chips from which an axis closes to a ring.
  """
  if collective.kind == "collective-permute":
    return 2
  group = places[collective.groups[0]]
  extents = [(len(set(group[:, n])), len(set(places[:, n]))) for n in range(places.shape[1])]
  links = [2 if of == all_ >= torus else 1 for of, all_ in extents if of > 1]
  return max(sum(links), 1)


def _times(kind: str, *, flops, flops_needed, hbm, links, dcn) -> dict[str, Any]:
  peaks, memory = PEAKS[kind], MEMORY[kind]
  bounds = {
    "compute": flops / (peaks.tflop_per_s * 1e12),
    "HBM": hbm / (memory.gb_per_s * 1e9),
    "ICI": links / (peaks.link_gb_per_s * 1e9),
    "DCN": dcn / (peaks.dcn_gb_per_s * 1e9),
  }
  slowest = max(bounds, key=lambda name: bounds[name])
  shortest = bounds[slowest]
  longest = max(bounds["compute"], bounds["HBM"]) + bounds["ICI"] + bounds["DCN"]
  return {
    "means": (
      "an estimate, not a measurement: each bound at its published peak, all in perfect overlap;"
      " compute includes recomputation; mfu: matrix products without recomputation, relative to the"
      " peak in the time of the slowest bound; mfu_without_overlap: if networks wait for compute"
    ),
    "seconds": {name: float(f"{value:.3g}") for name, value in bounds.items()},
    "slowest": slowest,
    "mfu": round(flops_needed / (shortest * peaks.tflop_per_s * 1e12), 3),
    "mfu_without_overlap": round(flops_needed / (longest * peaks.tflop_per_s * 1e12), 3),
    "peaks": {**peaks._asdict(), "hbm_gb_per_s": memory.gb_per_s},
  }


def add_rows(rows: Table, result: Mapping[str, Any]) -> None:
  """Adds the rows of traffic and estimate to the table of a result."""
  for kind, row in result["collectives"].items():
    rows.add_row(f"{kind}, {row['calls']:,} calls", f"{row['bytes'] / 1e9:.3g} GB")
  for kind, row in result["between_slices"].items():
    rows.add_row(f"between slices: {kind}, {row['calls']:,} calls", f"{row['bytes'] / 1e9:.3g} GB")
  if largest := result.get("largest_gather"):
    share = f"{largest['share_of_the_llm']:.1%} of the LLM"
    rows.add_row("largest gather", f"{largest['bytes'] / 1e9:.3g} GB, {share}")
  rows.add_row("HBM traffic", f"{result['hbm_bytes_per_chip'] / 1e9:.3g} GB")
  if "estimate" in result:
    found = result["estimate"]
    for name, seconds in found["seconds"].items():
      rows.add_row(f"estimated time: {name}", f"{seconds:.3g} s")
    rows.add_row("estimated MFU", f"{found['mfu']:.0%}, bound by {found['slowest']}")
    rows.add_row("the same without overlap", f"{found['mfu_without_overlap']:.0%}")


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
  found: dict[K, list[T]] = {}
  for item in items:
    found.setdefault(key(item), []).append(item)
  return found


def _summed(collectives: Iterable[Collective], key: Callable[[Collective], K]) -> dict[K, dict]:
  return {
    name: {"calls": sum(c.calls for c in of), "bytes": round(sum(map(received, of)))}
    for name, of in _grouped(collectives, key).items()
  }


def _listed(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
  """The collectives that move most, by their place in the program."""
  rows = [
    {"kind": kind, "moves": place, **row}
    for (kind, place), row in _summed(collectives, lambda c: (c.kind, _place(c))).items()
  ]
  return sorted(rows, key=lambda row: -row["bytes"])[:LISTED]


def _place(collective: Collective) -> str:
  """Where the traced program has a collective: "backward: decode/LLM/layers/mlp/up"."""
  if not collective.op_name:
    return "unknown"
  names = re.sub(r"\w+\(|\)", "", collective.op_name).split("/")
  kept = [name for name in names if name not in _LOOPS and "." not in name]
  backward = "transpose(" in collective.op_name
  return f"{'backward' if backward else 'forward'}: {'/'.join(kept) or 'sums of the micro-batches'}"
