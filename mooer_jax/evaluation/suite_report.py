"""The table of a suite: measured figures beside the published ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mooer_jax.evaluation.task_scorers import Row, Scored

# A task's result, or why it was not run; by `Row.stem`.
Results = Mapping[str, Scored | str]
_DECIMALS = {"accuracy": 2, "diversity": 2}


def table(rows: Sequence[Row], results: Results):
  """Returns a `rich` table: a line for each metric of each row.

  A rate of following the instruction stands in brackets. A dash is a figure that is not there;
  why stands in the cell where the task was not run, else in the lines of `notes`.
  """
  import rich.table
  import rich.text

  result = rich.table.Table()
  for column in ("level", "task", "metric", "clips", "measured", "published", "activation-tuned"):
    result.add_column(column, justify="left" if column in ("task", "metric") else "right")
  for row in rows:
    for cells in _lines(row, results[row.stem]):
      result.add_row(*(rich.text.Text(cell) for cell in cells))
  return result


def notes(rows: Sequence[Row], results: Results) -> list[str]:
  """What a reader of the table should know, a line for each note, after the task's name."""
  return [
    f"{row.name}: {note}"
    for row in rows
    if isinstance(scored := results[row.stem], Scored)
    for note in scored.notes
  ]


def as_dict(rows: Sequence[Row], results: Results) -> list[dict[str, Any]]:
  """Returns the table as JSON values; what is not there is null, with its reason."""
  return [_row_dict(row, results[row.stem]) for row in rows]


def _row_dict(row: Row, result: Scored | str) -> dict[str, Any]:
  scored = result if isinstance(result, Scored) else None
  values = scored.values if scored else (None,) * len(row.metrics)
  return {
    "name": row.name,
    "level": row.level,
    "task": row.task,
    "file": row.file,
    "not_run": None if isinstance(result, Scored) else result,
    "count": scored.count if scored else None,
    "higher_is_better": row.higher_is_better,
    "metrics": {
      metric: {"measured": value, "published": before, "activation_tuned": after}
      for metric, value, before, after in zip(row.metrics, values, row.before, row.after)
    },
    "following_rate": {
      "measured": scored.following_rate if scored else None,
      "published": row.following[0],
      "activation_tuned": row.following[1],
    }
    if row.following
    else None,
    "notes": list(scored.notes) if scored else [],
  }


def _lines(row: Row, result: Scored | str) -> Iterator[tuple[str, ...]]:
  for i, metric in enumerate(row.metrics):
    published = [
      _cell(metric, figures[i], row, which) for which, figures in enumerate((row.before, row.after))
    ]
    if isinstance(result, Scored):
      count = f"{result.count:,}"
      measured = _number(metric, result.values[i])
      if row.following:
        measured += f" ({_number('accuracy', result.following_rate)})"
    else:
      count, measured = "–", f"– {result}"
    first = (str(row.level), row.name) if i == 0 else ("", "")
    better = "↑" if row.higher_is_better else "↓"
    rate = " (following)" if row.following else ""
    yield (*first, f"{metric} {better}{rate}", count, measured, *published)


def _cell(metric: str, value: float, row: Row, which: int) -> str:
  rate = f" ({_number('accuracy', row.following[which])})" if row.following else ""
  return _number(metric, value) + rate


def _number(metric: str, value: float | None) -> str:
  return "–" if value is None else f"{value:.{_DECIMALS.get(metric, 1)}f}"
