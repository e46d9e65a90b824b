"""Tables and figures of perplexities and of scores by LoRA scale."""

import dataclasses
import itertools
import json
import math
import string
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Column, Table

from mooer_jax.evaluation.answer_matching import TaskScore
from mooer_jax.files import write_json

NONE = "(none)"  # stands for no instruction
_STYLES = ("-", "--", ":", "-.")  # of the lines of several LoRA scales


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """Perplexity of the reference answers of one task.

  Attributes:
    checkpoint: folder of the checkpoint, or of a run that is measured while it trains.
    step: step of the checkpoint in its run, 0 if it is in none.
    scale: LoRA scale.
    instruction, task: task of the prompt, or "(none)"; task of the answers.
    perplexity: exp(nats per token).
    tokens: number of tokens, including eos.
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
  """Scores of a task at a LoRA scale."""

  scale: float
  task: str
  score: TaskScore


def exp_of(nats: float) -> float:
  """The perplexity of a loss in nats per token; infinite beyond the range of floats."""
  try:
    return math.exp(nats)
  except OverflowError:
    return math.inf


def write(path: Path, rows: Sequence[Perplexity] | Sequence[SweepPoint]) -> None:
  """Writes rows as JSON."""
  write_json(path, [dataclasses.asdict(row) for row in rows])


def read_perplexities(path: Path) -> list[Perplexity]:
  """Reads what `write` wrote."""
  return [Perplexity(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def perplexity_table(rows: Sequence[Perplexity]) -> Table:
  """A row for each checkpoint, scale and instruction, a column for each task."""
  tasks = list(dict.fromkeys(row.task for row in rows))
  whole = Column("checkpoint", overflow="fold")
  table = Table(whole, "step", "LoRA scale", "instruction", *tasks, title="perplexity")
  lines: dict[tuple, dict[str, str]] = {}
  for r in rows:
    line = lines.setdefault((r.checkpoint, r.step, r.scale, r.instruction), {})
    line[r.task] = f"{r.perplexity:.2f}"
  for (folder, step, scale, instruction), found in lines.items():
    shown = (found.get(task, "") for task in tasks)
    table.add_row(_name(folder), str(step), f"{scale:g}", instruction, *shown)
  return table


def sweep_table(points: Sequence[SweepPoint]) -> Table:
  """A row for each scale, a column for each task: accuracy (WER), or BLEU."""
  cells: dict[float, dict[str, str]] = {}
  for scale, task, s in ((p.scale, p.task, p.score) for p in points):
    wer = "–" if s.wer is None else f"{s.wer:.1f}"
    cell = f"{100 * s.accuracy:.1f} ({wer})" if s.bleu is None else f"BLEU {s.bleu:.1f}"
    cells.setdefault(scale, {})[task] = cell
  tasks = list(dict.fromkeys(point.task for point in points))
  table = Table("LoRA scale", *tasks, title="accuracy % (WER %), or BLEU")
  for scale, of_task in cells.items():
    table.add_row(f"{scale:g}", *(of_task[task] for task in tasks))
  return table


def draw_perplexities(rows: Sequence[Perplexity], path: Path) -> Path:
  """Draws P(Y|X) above P(Y|X, I), a column for each instruction, as in the paper's figure 4.

  A column shows all tasks but those of the other instructions. The x axis is the step, the LoRA
  scale of a single checkpoint, or the order of checkpoints whose steps do not increase.
  """
  from matplotlib.figure import Figure

  given = [name for name in dict.fromkeys(row.instruction for row in rows) if name != NONE]
  tasks = list(dict.fromkeys(row.task for row in rows))
  scales = sorted({row.scale for row in rows})
  folders = list(dict.fromkeys((row.checkpoint, row.step) for row in rows))
  over_scales = len(folders) == 1
  by_step = all(a < b for (_, a), (_, b) in itertools.pairwise(folders))

  def x_of(row: Perplexity) -> float:
    if over_scales:
      return row.scale
    return row.step if by_step else folders.index((row.checkpoint, row.step))

  def draw(axes, shown: Sequence[Perplexity]):
    lines: dict[tuple[str, float | None], list[Perplexity]] = {}
    for row in sorted(shown, key=x_of):
      lines.setdefault((row.task, None if over_scales else row.scale), []).append(row)
    for (task, scale), line in sorted(lines.items(), key=lambda item: tasks.index(item[0][0])):
      label, style = task, "-"
      if scale is not None and len(scales) > 1:
        label, style = f"{task}, {scale:g}", _STYLES[scales.index(scale) % len(_STYLES)]
      x, y = [x_of(row) for row in line], [row.perplexity for row in line]
      color = f"C{tasks.index(task)}"
      axes.plot(x, y, "o", linestyle=style, color=color, label=label, markersize=4)
    axes.set_yscale("log")
    axes.legend(fontsize="small")

  columns, height = max(1, len(given)), 2 if given else 1
  figure = Figure(figsize=(max(4.6 * columns, 5.2), 3.4 * height), layout="constrained")
  grid = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
  letters = itertools.chain(string.ascii_lowercase, map(str, itertools.count(27)))
  for instructions, panels in zip(([NONE] * columns, given), grid, strict=False):
    for column, (instruction, axes) in enumerate(zip(instructions, panels, strict=True)):
      others = {*given} - {*given[column : column + 1]}
      draw(axes, [r for r in rows if r.instruction == instruction and r.task not in others])
      what = "P(Y|X)" if instruction == NONE else f"P(Y|X, I), I of {instruction}"
      axes.set_title(f"({next(letters)}) {what}" if given else what)
  for axes in grid[-1]:
    axes.set_xlabel("LoRA scale" if over_scales else "step" if by_step else "")
    if not by_step:
      axes.set_xticks(range(len(folders)), [_name(f) for f, _ in folders], rotation=30, ha="right")
  for panels in grid:
    panels[0].set_ylabel("perplexity of the references")
  figure.savefig(path, dpi=120)
  return path


def _name(folder: str) -> str:
  return "/".join(Path(folder).parts[-2:])


def draw_sweep(points: Sequence[SweepPoint], trained: float, path: Path) -> Path:
  """Draws accuracy, word error rate and, for tasks that translate, BLEU over the LoRA scale."""
  from matplotlib.figure import Figure

  def shown_wer(score: TaskScore) -> float | None:
    return None if score.wer is None else min(score.wer, 200)

  # Label, limits of the y axis, value of a point.
  panels: list[tuple[str, tuple, Callable[[TaskScore], float | None]]] = [
    ("accuracy, %", (-3, 103), lambda score: 100 * score.accuracy),
    ("word error rate, % (above 200 at 200)", (None, None), shown_wer),
  ]
  if any(point.score.bleu is not None for point in points):
    panels.append(("BLEU", (-3, 103), lambda score: score.bleu))
  figure = Figure(figsize=(4.5 * len(panels), 3.8), layout="constrained")
  grid = figure.subplots(1, len(panels))
  for axes, (label, limits, value_of) in zip(grid, panels, strict=True):
    for number, task in enumerate(dict.fromkeys(point.task for point in points)):
      line = sorted((p for p in points if p.task == task), key=lambda p: p.scale)
      values = [value_of(p.score) for p in line]
      axes.plot([p.scale for p in line], values, marker="o", color=f"C{number}", label=task)
    axes.axvline(trained, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="LoRA scale", ylabel=label, ylim=limits)
  grid[0].legend(fontsize="small")
  figure.savefig(path, dpi=120)
  return path
