"""Reports of a score: `report.json` for programs, `report.txt` for people, a table to print."""

from __future__ import annotations

import dataclasses
import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mooer_jax.evaluation.alignment import Counts, Pair
from mooer_jax.evaluation.error_rate import METRICS, Score, Utterance
from mooer_jax.files import replace_file

_LINE_WIDTH = 100
_KEYS_SHOWN = 20


def write_report(
  folder: str | Path,
  score: Score,
  *,
  name: str,
  worst: int = 10,
  details: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
  """Writes `report.json` and `report.txt` into a folder, which is created if needed.

  Args:
    folder: output folder; files of these names are replaced.
    score: scores to report.
    name: name of the test set, for the headline.
    worst: number of utterances to show aligned.
    details: other values to record (checkpoint, speed, ...), JSON values by name.

  Returns:
    The paths of the two files.

  Raises:
    ValueError: if `details` has values that are not JSON, such as NaN and infinity.
  """
  folder = Path(folder)
  content = as_dict(score, name=name, worst=worst, details=details)
  try:
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
  except (TypeError, ValueError) as error:
    raise ValueError(f"details of {name!r} cannot be written as JSON: {error}") from error
  with replace_file(folder / "report.json") as beside:
    beside.write_text(text + "\n", encoding="utf-8")
  with replace_file(folder / "report.txt") as beside:
    table = as_text(score, name=name, worst=worst, details=details)
    beside.write_text(table, encoding="utf-8")
  return folder / "report.json", folder / "report.txt"


def as_dict(
  score: Score, *, name: str, worst: int = 10, details: Mapping[str, Any] | None = None
) -> dict[str, Any]:
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
      for u in score.worst(worst)
    ],
    "per_utterance": [_utterance_dict(u) for u in score.utterances],
  }


def as_text(
  score: Score, *, name: str, worst: int = 10, details: Mapping[str, Any] | None = None
) -> str:
  """Returns the report as text: the totals, then the worst utterances aligned."""
  c = score.counts
  lines = [
    f"{name}: {METRICS[score.config.metric].title} {_percent(c.rate)}",
    f"{c.errors:,} errors in {c.reference:,} tokens: {c.substitutions:,} substitutions, "
    f"{c.deletions:,} deletions, {c.insertions:,} insertions",
    f"{len(score.utterances):,} utterances scored, {score.wrong_utterances:,} with an error",
    *_key_lines(
      "without hypothesis ("
      + ("counted as deleted" if score.config.missing == "count" else "left out of the figures")
      + ")",
      score.missing,
    ),
    *_key_lines("hypotheses without reference (not scored)", score.without_reference),
    *(f"note: {note}" for note in score.notes),
    *(f"{key.replace('_', ' ')}: {_shown(value)}" for key, value in (details or {}).items()),
  ]
  shown = score.worst(worst)
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


def table(scores: Mapping[str, Score]):
  """Returns a `rich` table with one row for each named score, to be printed on a console."""
  import rich.table
  import rich.text

  result = rich.table.Table()
  for column in ("", "error rate", "tokens", "sub", "del", "ins", "clips", "wrong", "missing"):
    result.add_column(column, justify="right" if column else "left")
  for name, score in scores.items():
    c = score.counts
    numbers = (
      c.reference,
      c.substitutions,
      c.deletions,
      c.insertions,
      len(score.utterances),
      score.wrong_utterances,
      len(score.missing),
    )
    # A plain string would be read as markup, and a name may hold brackets.
    result.add_row(rich.text.Text(name), _percent(c.rate), *(f"{n:,}" for n in numbers))
  return result


def alignment_lines(pairs: Sequence[Pair], *, width: int = _LINE_WIDTH) -> list[str]:
  """Shows an alignment as rows REF and HYP, and a third with the marks S, D and I.

  Tokens of a pair start in the same column, with wide characters counted as two; asterisks take the
  place of a missing token. Rows are wrapped at `width` columns.
  """
  lines = []
  for chunk in _chunks(pairs, width - len("REF: ")):
    cells = [_cell(*pair) for pair in chunk]
    for title, row in zip(("REF: ", "HYP: ", "     "), zip(*cells)):
      lines.append((title + " ".join(row)).rstrip())
    if not lines[-1]:
      lines.pop()
  return lines


def display_width(text: str) -> int:
  """Columns of a text on a terminal: wide characters take two, combining ones none."""
  return sum(
    0
    if unicodedata.combining(c) or unicodedata.category(c) in ("Cf", "Me", "Mn")
    else 2
    if unicodedata.east_asian_width(c) in "WF"
    else 1
    for c in text
  )


def printable(text: str) -> str:
  """Escapes characters that a terminal would interpret or not show, a line break as `\\n`."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cell(reference: str | None, hypothesis: str | None) -> tuple[str, str, str]:
  """The two tokens and the mark of one pair, padded to the same width."""
  if hypothesis is None:
    mark = "D"
  elif reference is None:
    mark = "I"
  else:
    mark = " " if reference == hypothesis else "S"
  width = _pair_width((reference, hypothesis))
  return _pad(reference, width), _pad(hypothesis, width), _pad(mark, width)


def _pad(token: str | None, width: int) -> str:
  if token is None:
    return "*" * width
  text = printable(token)
  return text + " " * (width - display_width(text))


def _pair_width(pair: Pair) -> int:
  # At least one column: a blank cell would leave no place for the mark.
  return max(1, *(display_width(printable(token)) for token in pair if token is not None))


def _chunks(pairs: Sequence[Pair], width: int) -> Iterator[list[Pair]]:
  chunk: list[Pair] = []
  used = 0
  for pair in pairs:
    needed = _pair_width(pair) + 1
    if chunk and used + needed > width + 1:
      yield chunk
      chunk, used = [], 0
    chunk.append(pair)
    used += needed
  if chunk:
    yield chunk


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
