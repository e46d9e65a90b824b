"""Reports of a score: `report.json` for programs, `report.txt` for people, a table to print."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from mooer_jax import storage
from mooer_jax.evaluation.alignment import Counts, Pair, mark
from mooer_jax.evaluation.error_rate import METRICS, Score, Utterance
from mooer_jax.files import replace_file, write_json

_LINE_WIDTH = 100
_KEYS_SHOWN = 20
_WORST_SHOWN = 10  # utterances that are shown aligned


def write_report(
  folder: str | Path, score: Score, *, name: str, details: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
  """Writes `report.json` and `report.txt` into a folder, and returns their paths.

  Args:
    folder: output folder, created if needed; files of these names are replaced.
    score: scores to report.
    name: name of the test set, for the headline.
    details: other values to record (checkpoint, speed, ...), JSON values by name.

  Raises:
    ValueError: if `details` has values that are not JSON, such as NaN and infinity, or the folder
      is a URL.
  """
  folder = storage.local(folder, "folder")
  json_path, text_path = folder / "report.json", folder / "report.txt"
  try:
    write_json(json_path, as_dict(score, name=name, details=details), allow_nan=False)
  except (TypeError, ValueError) as error:
    raise ValueError(f"details of {name!r} cannot be written as JSON: {error}") from error
  with replace_file(text_path) as beside:
    text = as_text(score, name=name, details=details)
    beside.write_text(text, encoding="utf-8", errors="backslashreplace")
  return json_path, text_path


def as_dict(score: Score, *, name: str, details: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Returns the report as JSON values; a rate without reference tokens is null, not infinite."""
  return {
    "name": name,
    "config": dataclasses.asdict(score.config),
    **_counts_dict(score.counts),
    "utterances": len(score.utterances),
    "wrong_utterances": score.wrong_utterances,
    "missing": list(score.missing),
    "without_reference": list(score.without_reference),
    "notes": list(score.notes),
    "details": dict(details or {}),
    "worst": [
      {**_utterance_dict(u), "alignment": [list(pair) for pair in u.alignment()]}
      for u in score.worst(_WORST_SHOWN)
    ],
    "per_utterance": [_utterance_dict(u) for u in score.utterances],
  }


def as_text(score: Score, *, name: str, details: Mapping[str, Any] | None = None) -> str:
  """Returns the report as text: the totals, then the worst utterances aligned."""
  c = score.counts
  how = "counted as deleted" if score.config.missing == "count" else "left out of the figures"
  lines = [
    f"{name}: {METRICS[score.config.metric].title} {_percent(c.rate)}",
    f"{c.errors:,} errors in {c.reference:,} tokens: {c.substitutions:,} substitutions, "
    f"{c.deletions:,} deletions, {c.insertions:,} insertions",
    f"{len(score.utterances):,} utterances scored, {score.wrong_utterances:,} with an error",
    *_key_lines(f"without hypothesis ({how})", score.missing),
    *_key_lines("hypotheses without reference (not scored)", score.without_reference),
    *(f"note: {note}" for note in score.notes),
    *(f"{key.replace('_', ' ')}: {_shown(value)}" for key, value in (details or {}).items()),
  ]
  shown = score.worst(_WORST_SHOWN)
  if shown:
    lines += ["", f"The {len(shown)} worst of {score.wrong_utterances:,} utterances with an error:"]
  for utterance in shown:
    c = utterance.counts
    lines += [
      "",
      f"{printable(utterance.key)}: {c.errors} errors in {c.reference} tokens "
      f"(S {c.substitutions}, D {c.deletions}, I {c.insertions})"
      + (", no hypothesis" if utterance.missing else ""),
      *alignment_lines(utterance.alignment()),
    ]
  return "\n".join(lines) + "\n"


def table(scores: Mapping[str, Score]) -> Table:
  """Returns a table with one row for each named score."""
  result = Table()
  for column in ("", "error rate", "tokens", "sub", "del", "ins", "clips", "wrong", "missing"):
    result.add_column(column, justify="right" if column else "left")
  for name, score in scores.items():
    c = score.counts
    numbers = [c.reference, c.substitutions, c.deletions, c.insertions]
    numbers += [len(score.utterances), score.wrong_utterances, len(score.missing)]
    # A plain string would be read as markup, and a name may hold brackets.
    result.add_row(Text(name), _percent(c.rate), *(f"{n:,}" for n in numbers))
  return result


def alignment_lines(pairs: Sequence[Pair], *, width: int = _LINE_WIDTH) -> list[str]:
  """Shows an alignment as rows REF and HYP, and a third with the marks S, D and I.

  Tokens of a pair start in the same column; asterisks take the place of a missing token. Rows are
  wrapped at `width` columns, of which wide characters take two.
  """
  blocks: list[list[list[str]]] = []
  used = width
  for pair in pairs:
    shown = [None if token is None else printable(token) for token in pair]
    # At least one column: a blank cell would leave no place for the mark.
    columns = max(1, *(cell_len(token) for token in shown if token is not None))
    reference, hypothesis = ("*" * columns if token is None else token for token in shown)
    if used + 1 + columns > width:
      blocks.append([])
      used = len("REF:")
    cells = (reference, hypothesis, mark(*pair))
    blocks[-1].append([set_cell_size(text, columns) for text in cells])
    used += 1 + columns
  lines = []
  for block in blocks:
    for title, row in zip(("REF:", "HYP:", "    "), zip(*block, strict=True), strict=True):
      lines.append(" ".join([title, *row]).rstrip())
  return [line for line in lines if line]


def printable(text: str) -> str:
  """Escapes characters that a terminal would interpret or not show, a line break as `\\n`."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shown(value: Any) -> str:
  """A JSON value as text, without quotes and brackets."""
  match value:
    case None:
      return "undefined"
    case float():
      return f"{round(value, 4)}"
    case Mapping():
      return ", ".join(f"{name.replace('_', ' ')} {_shown(x)}" for name, x in value.items())
    case list() | tuple():
      return "; ".join(map(_shown, value)) or "none"
  return printable(str(value))


def _key_lines(title: str, keys: Sequence[str]) -> list[str]:
  if not keys:
    return []
  shown = " ".join(printable(key) for key in keys[:_KEYS_SHOWN])
  more = len(keys) - _KEYS_SHOWN
  rest = f" and {more:,} more, see report.json" if more > 0 else ""
  return [f"{len(keys):,} {title}: {shown}{rest}"]


def _utterance_dict(utterance: Utterance) -> dict[str, Any]:
  return {"key": utterance.key, "missing": utterance.missing, **_counts_dict(utterance.counts)}


def _counts_dict(counts: Counts) -> dict[str, Any]:
  return {
    "error_rate": counts.rate if math.isfinite(counts.rate) else None,
    "reference_tokens": counts.reference,
    "hypothesis_tokens": counts.hypothesis,
    **dataclasses.asdict(counts),
  }


def _percent(rate: float) -> str:
  return f"{100 * rate:.2f} %" if math.isfinite(rate) else "undefined (no reference tokens)"
