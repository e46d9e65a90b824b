"""Scores that this package does not compute: those of public tools, and judgements of answers.

`NAME.scores.json` contains corpus scores of a public tool as fractions, with names in either case:
`{"METEOR": 0.256, "SPIDEr": 0.476}`. Both need Java. The package aac-metrics computes them
(`evaluate(candidates, mult_references, metrics=["meteor", "spider"])`), and so does pycocoevalcap
(SPIDEr is the mean of CIDEr and SPICE).

`NAME.judgements.json` contains the judgements of a person or a judge model by key:
`{"0000000-clip": {"follows": true, "correct": false}}`. `judgement_sheet` returns the form to fill
in. If the field `answer` is kept, a judgement counts for that answer only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mooer_jax.files import read_json_object

# METEOR is at most 1; SPIDEr is the mean of CIDEr-D, at most 10, and SPICE, at most 1.
_LARGEST = {"meteor": 1.0, "spider": 5.5}


def read_scores(path: str | Path, names: Sequence[str]) -> dict[str, float]:
  """Read the scores with the given names.

  Raises:
    ValueError: if the file is not such JSON, a name is missing, or a value is not a fraction.
  """
  content = read_json_object(path)
  values = {name.lower(): value for name, value in content.items()}
  scores = {}
  for name in names:
    value: Any = values.get(name.lower())
    largest = _LARGEST[name.lower()]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= largest:
      raise ValueError(
        f"{path}: {name}={value!r}; must be a fraction from 0 to {largest:g}, as in"
        f" {{{name!r}: 0.25}}"
      )
    scores[name] = float(value)
  return scores


def read_judgements(path: str | Path) -> dict[str, dict[str, Any]]:
  """Read judgements by key, with the fields `follows` and `correct`: true, false or null.

  Raises:
    ValueError: if the file is not such JSON, or a judgement has neither field or other values.
  """
  content = read_json_object(path)
  if not content:
    raise ValueError(f"{path}: the JSON object is empty")
  for key, judgement in content.items():
    fields = judgement if isinstance(judgement, dict) else {}
    given = [fields[name] for name in ("follows", "correct") if name in fields]
    if not given or not all(value is None or isinstance(value, bool) for value in given):
      raise ValueError(
        f'{path}: {key!r} has {judgement!r}; must be like {{"follows": true, "correct": false}}'
      )
  return content


def judgement_sheet(
  entries: Mapping[str, Mapping[str, Any]], hypotheses: Mapping[str, str], fields: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """Return the form for a judge: question, reference, answer and the fields to fill in, by key."""
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
  *,
  hypotheses: Mapping[str, str],
) -> tuple[float | None, str]:
  """Return the share of keys that were judged true. A key without a hypothesis counts as false.

  Returns:
    (share, ""); (None, reason) if an answer is not judged or has changed since.
  """
  answered = [key for key in keys if key in hypotheses]
  if open_ := [key for key in answered if judgements.get(key, {}).get(field) is None]:
    return None, (
      f"{field!r} is not judged for {len(open_)} of {len(answered)} answers, first {open_[0]}"
    )
  stale = [k for k in answered if judgements[k].get("answer", hypotheses[k]) != hypotheses[k]]
  if stale:
    return None, f"{len(stale)} answers have changed since they were judged, first {stale[0]}"
  return sum(judgements[key][field] for key in answered) / len(keys), ""
