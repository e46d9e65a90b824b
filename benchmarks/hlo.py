"""The text of a compiled XLA program: its instructions, and how often each computation runs.

XLA's own cost analysis counts the body of a loop once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


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
  def bytes(self) -> int:
    """Size of the result."""
    return sum(shape.bytes for shape in self.shapes)

  @property
  def hbm_bytes(self) -> int:
    """Size of the part of the result that is in HBM."""
    return sum(shape.bytes for shape in self.shapes if shape.in_hbm)

  @property
  def channel(self) -> str:
    """The number that the parts of a collective share."""
    found = re.search(r"channel_id=(\d+)", self.text)
    return found[1] if found else self.name


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
    root = self.root(body)
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

  def instructions(self, computation: str) -> Iterator[tuple[str, Instruction]]:
    """(computation, instruction) of a computation and of the fusions in it."""
    for instruction in self.computations[computation].values():
      yield computation, instruction
      if instruction.opcode == "fusion":
        yield from self.instructions(instruction.called[0])

  def operands(self, computation: str, instruction: Instruction) -> list[Instruction]:
    """The instructions of the same computation that an instruction reads."""
    return [self.computations[computation][name] for name in instruction.operands]

  def parameter(self, computation: str, number: int) -> Instruction:
    """The parameter of a computation that has this number."""
    inside = self.computations[computation].values()
    return next(x for x in inside if x.opcode == "parameter" and x.text.startswith(f"{number})"))

  def root(self, computation: str) -> Instruction:
    """The instruction whose result is that of the computation."""
    return next(x for x in self.computations[computation].values() if x.root)


_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)(\).*)$")


def _shapes(text: str) -> Iterator[Shape]:
  for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text):
    width = re.search(r"\d+", dtype)
    bits = 8 if dtype == "pred" else int(width[0]) if width else 0
    elements = math.prod(int(size) for size in dims.split(",") if size)
    yield Shape(-(-elements * bits // 8), "S(" not in layout)
