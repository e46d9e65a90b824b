"""Collectives and memory traffic of a compiled XLA program, read from its text.

XLA's own cost analysis counts the body of a loop once. Here it counts once per iteration.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These move no data, or their parts are counted instead.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
         "call", "after-all", "opt-barrier", "partition-id", "replica-id"}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


class Shape(NamedTuple):
  """One array: its bytes, without padding, and whether it is in HBM."""

  bytes: int
  in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # of the result; several in a tuple
  operands: tuple[str, ...]
  text: str  # what follows the operands; for a parameter or a constant, from its value on
  root: bool

  @property
  def called(self) -> list[str]:
    """Computations that run as part of this instruction, loop bodies included."""
    names = r"(?:calls|body|to_apply|true_computation|false_computation)=%([\w.-]+)"
    branches = re.search(r"branch_computations=\{([^}]*)\}", self.text)
    return re.findall(names, self.text) + re.findall(r"%([\w.-]+)", branches[1] if branches else "")

  @property
  def collective(self) -> str:
    """The kind of a collective, "" of others. The second half of an asynchronous one has none."""
    kind = self.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""

  @property
  def channel(self) -> str:
    """The number that the parts of a collective share."""
    found = re.search(r"channel_id=(\d+)", self.text)
    return found[1] if found else self.name


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


class Program:
  """A compiled program, from `compiled.as_text()`."""

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ""
    inside: dict[str, Instruction] = {}
    for line in text.splitlines():
      if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
        inside = self.computations.setdefault(header[2], {})
        self.entry = header[2] if header[1] else self.entry
      elif found := _LINE.match(line):
        root, name, shape, opcode, operands, rest = found.groups()
        plain = opcode in ("parameter", "constant")
        inside[name] = Instruction(
          name=name,
          opcode=opcode,
          shapes=tuple(_shapes(shape)),
          operands=() if plain else tuple(re.findall(r"%([\w.-]+)", operands)),
          text=operands + rest if plain else rest,
          root=bool(root),
        )
    if not self.entry:
      raise ValueError("the text is not that of a compiled program: it has no line `ENTRY …`")

  def runs(self) -> dict[str, int]:
    """How often each computation runs, without those inside of fusions."""
    counts: dict[str, int] = {}

    def visit(name: str, times: int):
      counts[name] = counts.get(name, 0) + times
      for instruction in self.computations[name].values():
        if instruction.opcode == "while":
          visit(instruction.called[0], times * self.trip_count(name, instruction))
        elif instruction.opcode in ("call", "conditional", "async-start"):
          for called in instruction.called:  # all branches: an upper bound
            visit(called, times)

    visit(self.entry, 1)
    return counts

  def trip_count(self, computation: str, loop: Instruction) -> int:
    """Number of iterations of a while loop, from XLA's annotation or from its condition.

    Raises:
      ValueError: if the loop does not count up to a constant.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
      return int(known[1])
    condition = re.search(r"condition=%([\w.-]+)", loop.text)
    inside = self.computations[condition[1]] if condition else {}
    compared = next((x for x in inside.values() if x.root and "direction=LT" in x.text), None)
    counter, bound = (inside[name] for name in compared.operands) if compared else (None, None)
    if index := re.search(r"index=(\d+)", counter.text) if counter else None:
      place = int(index[1])
      start = self._constant(computation, self._element(computation, loop.operands[0], place))
      end = self._constant(condition[1], bound.name)
      step = self._step(loop.called[0], place)
      if start is not None and end is not None and step:
        return max(-(-(end - start) // step), 0)
    raise ValueError(f"the loop %{loop.name} has no constant number of iterations")

  def _element(self, computation: str, name: str, place: int) -> str:
    """The name of an element of a tuple."""
    return self.computations[computation][name].operands[place]

  def _constant(self, computation: str, name: str) -> int | None:
    found = self.computations[computation][name]
    while found.opcode in ("copy", "bitcast"):
      found = self.computations[computation][found.operands[0]]
    return int(found.text.partition(")")[0]) if found.opcode == "constant" else None

  def _step(self, body: str, place: int) -> int | None:
    """What an iteration adds to the counter, which XLA unrolls by 2 in some loops."""
    inside = self.computations[body]
    root = next(x for x in inside.values() if x.root)
    added = inside[root.operands[place]] if root.opcode == "tuple" else root
    total = 0
    while added.opcode in ("add", "copy", "bitcast"):
      if added.opcode == "add":
        constants = [self._constant(body, name) for name in added.operands]
        total += next((value for value in constants if value is not None), 0)
        [name] = [n for n, v in zip(added.operands, constants, strict=True) if v is None]
      else:
        [name] = added.operands
      added = inside[name]
    return total if re.search(rf"index={place}\b", added.text) else None

  def collectives(self) -> list[Collective]:
    """The collectives of the program. Those that XLA splits over several fusions count once."""
    return [self._collective(*found) for _, *found in self._calls_of_collectives()]

  def _calls_of_collectives(self) -> list[tuple[str, str, Instruction, int]]:
    """(loop, computation, instruction, calls) of each collective.

    On TPUs, an asynchronous collective is in a fusion with its start, in those of the matrix
    products that it overlaps, also of loops, and in one with its end. They have the same channel;
    the start counts.
    """
    plain, started = [], []
    fused: dict[tuple[str, str, str], tuple[str, str, Instruction, int]] = {}
    for outer, times in self.runs().items():
      for inside, instruction in self._all_instructions(outer):
        if not (kind := instruction.collective):
          continue
        found = outer, inside, instruction, times
        if inside == outer:
          plain.append(found)
        elif any("AsyncCollectiveStart" in x.text for x in self.computations[inside].values()):
          started.append(found)
        else:
          fused[outer, kind, instruction.channel] = found
    begun = {(instruction.collective, instruction.channel) for _, _, instruction, _ in started}
    others = [found for (_, *key), found in fused.items() if tuple(key) not in begun]
    return plain + started + others

  def _collective(self, inside: str, instruction: Instruction, times: int) -> Collective:
    kind, groups = instruction.collective, _groups(instruction.text)
    if kind == "all-reduce" and "all-reduce-scatter" in inside:
      kind = "reduce-scatter"  # a fusion on TPUs
    op_name = re.search(r'op_name="([^"]*)"', instruction.text)
    return Collective(
      kind=kind,
      calls=times,
      whole_bytes=sum(self._operand_bytes(inside, instruction))
      * (groups.shape[1] if kind == "all-gather" else 1),
      groups=groups,
      op_name=op_name[1] if op_name else "",
    )

  def transfers(self) -> list[Transfer]:
    """The exchanges between slices. The compiled program is that of one slice."""
    found = []
    for name, times in self.runs().items():
      for instruction in self.computations[name].values():
        attributes = dict(re.findall(r'_xla_megascale_(\w+)="(\w+)"', instruction.text))
        if instruction.opcode == "recv" and "transfer_type" in attributes:
          kind = attributes["transfer_type"].lower().replace("_", "-")
          reduction = attributes.get("reduce_operation", "")
          found.append(Transfer(kind, reduction, times, instruction.shapes[0].bytes))
    return found

  def hbm_bytes(self) -> int:
    """Bytes that the instructions of the program read from HBM and write to it.

    Each instruction reads its operands and writes its results once; what a fusion keeps inside is
    not counted, nor are arrays in VMEM. A slice counts with its own size, not that of its operand.
    A Pallas kernel that reads a block again counts it once.
    """
    total = 0
    for outer, times in self.runs().items():
      for instruction in self.computations[outer].values():
        total += times * self._traffic(outer, instruction)
    for outer, inside, instruction, times in self._calls_of_collectives():
      if inside != outer:  # in a fusion, whose results are counted here
        total += times * _in_hbm(instruction.shapes)
    return total

  def _all_instructions(self, name: str) -> Iterator[tuple[str, Instruction]]:
    """(computation, instruction) of a computation and of the fusions in it."""
    for instruction in self.computations[name].values():
      yield name, instruction
      if instruction.opcode == "fusion":
        yield from self._all_instructions(instruction.called[0])

  def _operand_bytes(self, computation: str, instruction: Instruction) -> Iterator[int]:
    inside = self.computations[computation]
    for operand in instruction.operands:
      yield sum(shape.bytes for shape in inside[operand].shapes)

  def _traffic(self, computation: str, instruction: Instruction) -> int:
    """Bytes in HBM that one run of an instruction reads and writes."""
    opcode, inside = instruction.opcode, self.computations[computation]
    if opcode in _FREE or opcode.endswith("-done"):
      return 0
    operands = [inside[name] for name in instruction.operands]
    if opcode == "fusion":
      called = instruction.called[0]
      parameters = {
        int(x.text.partition(")")[0]): name
        for name, x in self.computations[called].items()
        if x.opcode == "parameter"
      }
      read = sum(
        min(_in_hbm(operand.shapes), self._read(called, parameters[n]))
        for n, operand in enumerate(operands)
        if _in_hbm(operand.shapes)
      )
      return read + sum(self._written(called, instruction.shapes))
    if opcode in _SLICES:
      return (_in_hbm(operands[0].shapes) > 0) * _size(instruction) + _in_hbm(instruction.shapes)
    if opcode == "dynamic-update-slice":
      return _in_hbm(operands[1].shapes) + (_in_hbm(instruction.shapes) > 0) * _size(operands[1])
    # An asynchronous copy or collective has its operands in its result too.
    results = instruction.shapes[:1] if opcode == "copy-start" else instruction.shapes
    return sum(_in_hbm(x.shapes) for x in operands) + _in_hbm(results)

  def _read(self, computation: str, parameter: str) -> int:
    """Bytes of a parameter that a fusion reads: those of its slices, if it only takes slices."""
    inside = self.computations[computation]
    total = 0
    for user in inside.values():
      if parameter not in user.operands:
        continue
      if user.opcode in _SLICES and user.operands[0] == parameter:
        total += _size(user)
      elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter:
        continue  # in place
      elif user.opcode == "bitcast":
        total += self._read(computation, user.name)
      elif user.opcode == "fusion":
        called = user.called[0]
        number = user.operands.index(parameter)
        names = [
          name
          for name, x in self.computations[called].items()
          if x.opcode == "parameter" and x.text.startswith(f"{number})")
        ]
        total += self._read(called, names[0])
      elif user.opcode != "tuple":  # passed on
        total += _size(inside[parameter])
    return min(total, _size(inside[parameter]))

  def _written(self, computation: str, shapes: tuple[Shape, ...]) -> Iterator[int]:
    """Bytes in HBM that a fusion writes, for each of its results."""
    inside = self.computations[computation]
    root = next(x for x in inside.values() if x.root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for result, shape in zip(results, shapes, strict=False):
      while result.opcode == "bitcast":
        result = inside[result.operands[0]]
      if not shape.in_hbm or result.opcode == "parameter" or result.collective:
        continue
      if result.opcode == "dynamic-update-slice":
        yield _size(inside[result.operands[1]])
      elif result.opcode == "fusion":
        yield from self._written(result.called[0], (shape,))
      else:
        yield shape.bytes


_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)(\).*)$")


def _shapes(text: str) -> Iterator[Shape]:
  for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text):
    width = re.search(r"\d+", dtype)
    bits = 8 if dtype == "pred" else int(width[0]) if width else 0
    elements = math.prod(int(size) for size in dims.split(",") if size)
    yield Shape(-(-elements * bits // 8), "S(" not in layout)


def _size(instruction: Instruction) -> int:
  return sum(shape.bytes for shape in instruction.shapes)


def _in_hbm(shapes: tuple[Shape, ...]) -> int:
  return sum(shape.bytes for shape in shapes if shape.in_hbm)


def _groups(text: str) -> np.ndarray:
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
