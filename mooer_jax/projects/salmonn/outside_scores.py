"""Scores that this package does not compute: public tools' figures, a judge's answers.

`NAME.scores.json` holds corpus figures of a public tool, as fractions:

    {"METEOR": 0.256, "SPIDEr": 0.476}

Both need Java. The package aac-metrics computes them (`evaluate(candidates, mult_references,
metrics=["meteor", "spider"])`, whose corpus scores have just these names in lower case); so does
pycocoevalcap, whose SPIDEr is the mean of its CIDEr and SPICE. Names are taken in either case,
further ones are passed over.

`NAME.judgements.json` holds what a person or a judge model says of each answer, by key:

    {"0000000-clip": {"follows": true, "correct": false}}

`judgement_sheet` makes the form to fill in; its field `answer`, where it is kept, ties a judgement
to the answer that was judged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# METEOR is at most 1; SPIDEr is the mean of CIDEr-D, at most 10, and SPICE, at most 1.
_LARGEST = {"meteor": 1.0, "spider": 5.5}


def read_scores(path: str | Path, names: Sequence[str]) -> dict[str, float]:
  """Reads a tool's figures by the given names.

  Raises:
    ValueError: if the file is no such JSON, lacks a name, or a value is no fraction.
  """
  content = _read_object(path)
  values = {str(name).lower(): value for name, value in content.items()}
  scores = {}
  for name in names:
    value = values.get(name.lower())
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f"{path}: {name}={value!r}; needed is a number, as in {{{name!r}: 0.25}}")
    largest = _LARGEST.get(name.lower(), 1.0)
    if not (math.isfinite(value) and 0 <= value <= largest):
      raise ValueError(f"{path}: {name}={value}; needed is a fraction from 0 to {largest:g}")
    scores[name] = float(value)
  return scores


def read_judgements(path: str | Path) -> dict[str, dict[str, Any]]:
  """Reads judgements by key; each names at least one of `follows` and `correct`, null if open.

  Raises:
    ValueError: if the file is no such JSON, or a judgement holds something else, by key.
  """
  content = _read_object(path)
  for key, judgement in content.items():
    fields = judgement if isinstance(judgement, dict) else {}
    given = [fields[name] for name in ("follows", "correct") if name in fields]
    if not given or not all(value is None or isinstance(value, bool) for value in given):
      raise ValueError(
        f'{path}: {key!r} has {judgement!r}; needed is {{"follows": true, "correct": false}}'
      )
  return content


def judgement_sheet(
  entries: Mapping[str, Mapping[str, Any]], hypotheses: Mapping[str, str], fields: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """The form for a judge: question, reference and answer by key, and null in the given fields."""
  return {
    key: {
      "question": entry.get("Q", ""),
      "transcript": entry.get("transcript", ""),
      "reference": entry.get("text", ""),
      "answer": hypotheses[key],
      **dict.fromkeys(fields),
    }
    for key, entry in entries.items()
    if key in hypotheses
  }


def judged_share(
  judgements: Mapping[str, Mapping[str, Any]],
  field: str,
  keys: Sequence[str],
  hypotheses: Mapping[str, str],
) -> tuple[float | None, str]:
  """Share of all keys that were judged true; a key without a hypothesis counts as false.

  Returns:
    (share, ""), or (None, reason) if an answer is not judged, or another answer was.
  """
  answered = [key for key in keys if key in hypotheses]
  open_ = [key for key in answered if judgements.get(key, {}).get(field) is None]
  if open_:
    return None, (
      f"the judgements lack {field!r} for {len(open_)} of {len(answered)} answers, first {open_[0]}"
    )
  stale = [k for k in answered if judgements[k].get("answer", hypotheses[k]) != hypotheses[k]]
  if stale:
    return None, f"{len(stale)} judgements are of other answers, first {stale[0]}"
  return sum(judgements[key][field] for key in answered) / len(keys), ""


def _read_object(path: str | Path) -> dict[str, Any]:
  try:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not JSON: {error}") from error
  if not isinstance(content, dict) or not content:
    raise ValueError(f"{path}: holds no JSON object, or an empty one")
  return content
