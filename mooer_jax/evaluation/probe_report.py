"""Tables and figures of what `run/probe.py` measures."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """Of the reference answers to one task.

  Attributes:
    checkpoint: folder.
    step: of it, 0 where there is only one.
    scale: of LoRA.
    instruction: the task whose prompt was given, "(none)" without.
    task: whose answers they are.
    perplexity: exp(nats per token).
    tokens: in them, eos included.
  """

  checkpoint: str
  step: int
  scale: float
  instruction: str
  task: str
  perplexity: float
  tokens: int


@dataclasses.dataclass(frozen=True)
class SweepPoint:
  """How the answers to a task are at a LoRA scale; see `by_task.TaskScore`."""

  scale: float
  task: str
  count: int
  not_decoded: int
  wer: float | None
  accuracy: float
  following: float | None
  bleu: float | None


def write(path: Path, rows: Sequence[Perplexity] | Sequence[SweepPoint]) -> None:
  """Writes them as JSON."""
  made = [dataclasses.asdict(row) for row in rows]
  path.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def perplexity_table(rows: Sequence[Perplexity]) -> Table:
  """A line for each checkpoint, scale and instruction, a column for each task."""
  tasks = list(dict.fromkeys(row.task for row in rows))
  table = Table("step", "LoRA scale", "instruction", *tasks, title="perplexity")
  lines = dict.fromkeys((r.step, r.scale, r.instruction) for r in rows)
  found = {(r.step, r.scale, r.instruction, r.task): r.perplexity for r in rows}
  for step, scale, instruction in lines:
    cells = (found.get((step, scale, instruction, task)) for task in tasks)
    shown = ("" if value is None else f"{value:.2f}" for value in cells)
    table.add_row(str(step), f"{scale:g}", instruction, *shown)
  return table


def sweep_table(points: Sequence[SweepPoint]) -> Table:
  """A line for each scale, a column for each task: accuracy, and WER in brackets."""
  tasks = list(dict.fromkeys(point.task for point in points))
  table = Table("LoRA scale", *tasks, title="accuracy % (WER %)")
  found = {(p.scale, p.task): p for p in points}
  for scale in dict.fromkeys(p.scale for p in points):
    cells = (found[scale, task] for task in tasks)
    table.add_row(f"{scale:g}", *(_cell(c) for c in cells))
  return table


def _cell(point: SweepPoint) -> str:
  wer = "–" if point.wer is None else f"{point.wer:.1f}"
  return f"{100 * point.accuracy:.1f} ({wer})"


def draw_perplexities(rows: Sequence[Perplexity], path: Path) -> Path:
  """A panel for each instruction, against the step, or the LoRA scale of a single checkpoint."""
  from matplotlib.figure import Figure

  instructions = list(dict.fromkeys(row.instruction for row in rows))
  tasks = list(dict.fromkeys(row.task for row in rows))
  by_step = len({row.step for row in rows}) > 1
  figure = Figure(figsize=(4.2 * len(instructions), 3.6), layout="constrained")
  panels = figure.subplots(1, len(instructions), sharey=True, squeeze=False)[0]
  for axes, instruction in zip(panels, instructions, strict=True):
    for number, task in enumerate(tasks):
      for scale in dict.fromkeys(row.scale for row in rows) if by_step else (None,):
        line = [
          row
          for row in rows
          if (row.instruction, row.task) == (instruction, task) and scale in (None, row.scale)
        ]
        x = [row.step if by_step else row.scale for row in line]
        label = task if scale is None or len({r.scale for r in rows}) == 1 else f"{task}, {scale:g}"
        axes.plot(x, [row.perplexity for row in line], "o-", color=f"C{number}", label=label)
    given = instruction.startswith("(")
    axes.set_title("P(Y|X), no instruction" if given else f"P(Y|X, I), I of {instruction}")
    axes.set(xlabel="step" if by_step else "LoRA scale", yscale="log")
  panels[0].set_ylabel("perplexity of the reference answers")
  panels[-1].legend(fontsize="small")
  figure.savefig(path, dpi=120)
  return path


def draw_sweep(points: Sequence[SweepPoint], trained: float, path: Path) -> Path:
  """Accuracy and word error rate of every task against the LoRA scale."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.8), layout="constrained")
  accuracy, wer = figure.subplots(1, 2)
  for task in dict.fromkeys(point.task for point in points):
    line = sorted((p for p in points if p.task == task), key=lambda p: p.scale)
    scales = [p.scale for p in line]
    accuracy.plot(scales, [100 * p.accuracy for p in line], "o-", label=task)
    wer.plot(scales, [min(p.wer, 200) if p.wer is not None else None for p in line], "o-")
  accuracy.set(xlabel="LoRA scale", ylabel="answers that are right, %", ylim=(-3, 103))
  wer.set(xlabel="LoRA scale", ylabel="word error rate, % (above 200 at 200)")
  for axes in (accuracy, wer):
    axes.axvline(trained, color="grey", linewidth=0.8, linestyle="--")
  accuracy.legend(fontsize="small")
  figure.savefig(path, dpi=120)
  return path
