"""Collectives, exchanges between slices, and HBM traffic of a compiled program.

The body of a loop counts once per iteration.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from benchmarks.hlo import Instruction, Program, Shape

# These move no data, or their parts are counted instead.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
         "call", "after-all", "opt-barrier", "partition-id", "replica-id"}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
# On TPUs, an asynchronous collective is in a fusion with this start, in those of the matrix
# products that it overlaps, also of loops, and in one with its end. All have its channel.
_START, _ASYNCHRONOUS = "AsyncCollectiveStart", "AsyncCollective"


class Collective(NamedTuple):
  """A collective operation of the program, with all its executions.

  Attributes:
    kind: one of COLLECTIVES.
    calls: number of executions in one run of the program.
    whole_bytes: size of the array that one call gathers, sums or exchanges; of all chips of a group
      for "all-gather", of one chip for the others.
    groups: int [groups, chips], positions in the mesh of a slice; of "collective-permute" pairs.
    op_name: place in the traced program; "" with several slices, whose compilation drops it.
  """

  kind: str
  calls: int
  whole_bytes: int
  groups: np.ndarray
  op_name: str


class Transfer(NamedTuple):
  """Exchange of one array between slices: the part of a collective that crosses their network.

  Attributes:
    kind: of the collective, as "all-reduce".
    reduction: "SUM" or another operation; "" without one.
    calls: number of executions in one run of the program.
    bytes: size of the part of one chip.
  """

  kind: str
  reduction: str
  calls: int
  bytes: int


def collectives(program: Program) -> list[Collective]:
  """The collectives of a program. One that is in several fusions counts once."""
  return [_collective(program, *found) for _, *found in _calls(program)]


def transfers(program: Program) -> list[Transfer]:
  """The exchanges between slices. The compiled program is that of one slice."""
  found = []
  for name, times in program.runs().items():
    for instruction in program.computations[name].values():
      attributes = dict(re.findall(r'_xla_megascale_(\w+)="(\w+)"', instruction.text))
      if instruction.opcode == "recv" and "transfer_type" in attributes:
        kind = attributes["transfer_type"].lower().replace("_", "-")
        reduction = attributes.get("reduce_operation", "")
        found.append(Transfer(kind, reduction, times, instruction.shapes[0].bytes))
  return found


def hbm_bytes(program: Program) -> int:
  """Bytes that the instructions of a program read from HBM and write to it, on one chip.

  Each instruction reads its operands and writes its results once. Not counted are what a fusion
  keeps inside, and arrays in VMEM. A slice counts with its own size, not that of its operand. A
  Pallas kernel that reads a block again counts it once.
  """
  total = 0
  for name, times in program.runs().items():
    for instruction in program.computations[name].values():
      total += times * _traffic(program, name, instruction)
  for outer, inside, instruction, times in _calls(program):
    if inside != outer:
      root = program.root(inside)
      if _START in root.text:  # (operand, result, …)
        total += times * sum(shape.bytes for shape in root.shapes[:2] if shape.in_hbm)
      else:
        operands = program.operands(inside, instruction)
        total += times * sum(x.hbm_bytes for x in (instruction, *operands))
  return total


def _calls(program: Program) -> list[tuple[str, str, Instruction, int]]:
  """(loop, computation, instruction, calls) of each collective."""
  plain, started = [], []
  fused: dict[tuple[str, str, str], tuple[str, str, Instruction, int]] = {}
  for outer, times in program.runs().items():
    for inside, instruction in program.instructions(outer):
      if not (kind := instruction.collective):
        continue
      found = outer, inside, instruction, times
      if inside == outer:
        plain.append(found)
      elif _START in program.root(inside).text:
        started.append(found)
      else:
        fused[outer, kind, instruction.channel] = found
  begun = {(instruction.collective, instruction.channel) for _, _, instruction, _ in started}
  others = [found for (_, *key), found in fused.items() if tuple(key) not in begun]
  return plain + started + others


def _collective(program: Program, inside: str, instruction: Instruction, times: int) -> Collective:
  kind, groups = instruction.collective, groups_of(instruction.text)
  if kind == "all-reduce" and "all-reduce-scatter" in inside:
    kind = "reduce-scatter"  # a fusion on TPUs
  op_name = re.search(r'op_name="([^"]*)"', instruction.text)
  size = sum(x.bytes for x in program.operands(inside, instruction))
  return Collective(
    kind=kind,
    calls=times,
    whole_bytes=size * (groups.shape[1] if kind == "all-gather" else 1),
    groups=groups,
    op_name=op_name[1] if op_name else "",
  )


def _traffic(program: Program, computation: str, instruction: Instruction) -> int:
  """Bytes in HBM that one run of an instruction reads and writes."""
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith("-done"):
    return 0
  operands = program.operands(computation, instruction)
  if opcode == "fusion":
    called = instruction.called[0]
    read = sum(
      min(x.hbm_bytes, _read(program, called, program.parameter(called, number)))
      for number, x in enumerate(operands)
      if x.hbm_bytes
    )
    return read + sum(_written(program, called, instruction.shapes))
  if opcode in _SLICES:
    return (operands[0].hbm_bytes > 0) * instruction.bytes + instruction.hbm_bytes
  if opcode == "dynamic-update-slice":
    return operands[1].hbm_bytes + (instruction.hbm_bytes > 0) * operands[1].bytes
  results = instruction.shapes
  if opcode == "copy-start":
    results = results[:1]
  elif instruction.collective and opcode.endswith("-start"):  # (operands, results, …)
    results = results[len(operands) : 2 * len(operands)]
  return sum(x.hbm_bytes for x in operands) + sum(x.bytes for x in results if x.in_hbm)


def _read(program: Program, computation: str, value: Instruction) -> int:
  """Bytes of a parameter that a fusion reads: those of its slices, if it only takes slices."""
  total = 0
  for user in program.computations[computation].values():
    if value.name not in user.operands or user.collective or _ASYNCHRONOUS in user.text:
      continue  # collectives are counted by themselves
    if user.opcode in _SLICES and user.operands[0] == value.name:
      total += user.bytes
    elif user.opcode == "bitcast":
      total += _read(program, computation, user)
    elif user.opcode == "fusion":
      called, number = user.called[0], user.operands.index(value.name)
      total += _read(program, called, program.parameter(called, number))
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
      pass  # in place
    elif user.opcode != "tuple":  # passed on
      total += value.bytes
  return min(total, value.bytes)


def _written(program: Program, computation: str, shapes: tuple[Shape, ...]) -> Iterator[int]:
  """Bytes in HBM that a fusion writes, for each of its results."""
  inside, root = program.computations[computation], program.root(computation)
  results = program.operands(computation, root) if root.opcode == "tuple" else [root]
  for result, shape in zip(results, shapes, strict=False):
    while result.opcode == "bitcast":
      result = inside[result.operands[0]]
    counted_elsewhere = result.collective or _ASYNCHRONOUS in result.text
    if not shape.in_hbm or result.opcode == "parameter" or counted_elsewhere:
      continue
    if result.opcode == "dynamic-update-slice":
      yield inside[result.operands[1]].bytes
    elif result.opcode == "fusion":
      yield from _written(program, result.called[0], (shape,))
    else:
      yield shape.bytes


def groups_of(text: str) -> np.ndarray:
  """The groups of a collective, int [groups, chips], in each of XLA's three notations."""
  if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text):
    return np.array([row.split(",") for row in re.findall(r"\{([\d,]+)\}", found[1])], int)
  if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    shape, dims, order = ([int(n) for n in part.split(",")] if part else None
                          for part in found.groups())  # fmt: skip
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
  if found := re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text
  ):
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    named = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[3])
    return _device_order(found[2], math.prod(axes.values()))[_mesh_groups(axes, named)]
  described = text.partition("replica_groups=")[2][:80]
  raise ValueError(f"cannot read the groups of a collective: {described!r}")


def _device_order(text: str | None, size: int) -> np.ndarray:
  """Devices of a mesh in order: all, those of "[8,64]T(1,0" or those listed."""
  if not text:
    return np.arange(size)
  if iota := re.match(r"\[([\d,]+)\]T\(([\d,]+)", text):
    dims, order = ([int(n) for n in part.split(",")] for part in iota.groups())
    return np.arange(size).reshape(dims).transpose(order).reshape(-1)
  return np.array([int(n) for n in text.split(",")])


def _mesh_groups(axes: dict[str, int], named: list[tuple[str, str, str]]) -> np.ndarray:
  """Groups over axes of a mesh; ("x", "2", "4") is the part of 4 of axis x that 2 parts precede."""
  parts = {name: (int(before), int(size)) for name, before, size in named if size}
  whole = {name for name, _, size in named if not size}
  dims, inside = [], []
  for name, size in axes.items():
    before, middle = parts.get(name, (1, size))
    dims += [before, middle, size // (before * middle)]
    inside += [False, name in parts or name in whole, False]
  order = sorted(range(len(dims)), key=lambda n: inside[n])
  width = math.prod(size for size, within in zip(dims, inside, strict=True) if within)
  return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1, width)
