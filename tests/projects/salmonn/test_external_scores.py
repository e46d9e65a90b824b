"""Figures and judgements that come from files."""

import json

import pytest

from mooer_jax.projects.salmonn.external_scores import (
  judged_share,
  judgement_sheet,
  read_judgements,
  read_scores,
)


@pytest.fixture
def written(tmp_path):
  def write(content):
    path = tmp_path / "given.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path

  return write


def test_scores_are_taken_by_name_in_either_case(written):
  path = written({"meteor": 0.25, "SPIDEr": 0.47, "fense": 0.6})
  assert read_scores(path, ("METEOR", "SPIDEr")) == {"METEOR": 0.25, "SPIDEr": 0.47}


@pytest.mark.parametrize(
  "content, says",
  [
    ({"METEOR": 25.6}, "METEOR=25.6; must be a fraction from 0 to 1"),
    ({"METEOR": -0.1}, "METEOR=-0.1; must be a fraction"),
    ({"METEOR": True}, "METEOR=True"),
    ({"CIDEr": 0.3}, "METEOR=None; must be a fraction"),
    ({}, "METEOR=None"),
    ([0.25], "must hold a JSON object"),
    ("METEOR 0.25", "not JSON"),
    ('{"METEOR": NaN}', "METEOR=nan"),
  ],
)
def test_other_scores_are_refused(written, content, says):
  with pytest.raises(ValueError, match=f"given.json: .*{says}"):
    read_scores(written(content), ("METEOR",))


@pytest.mark.parametrize("judgement", ["yes", {}, {"correct": 1}, {"follows": "true"}, None])
def test_other_judgements_are_refused(written, judgement):
  with pytest.raises(ValueError, match="'b' has "):
    read_judgements(written({"a": {"follows": True}, "b": judgement}))


def test_a_sheet_filled_in_is_judgements(written):
  entries = {"a": {"text": "r", "Q": "q"}, "b": {"text": "s"}, "c": {"text": "t"}}
  hypotheses = {"a": "yes", "b": "no"}
  sheet = judgement_sheet(entries, hypotheses, ("follows", "correct"))
  assert list(sheet) == ["a", "b"] and sheet["a"]["question"] == "q"
  keys = list(entries)
  blank = read_judgements(written(sheet))
  share, why = judged_share(blank, "correct", keys, hypotheses=hypotheses)
  assert share is None and "'correct' is not judged for 2 of 2 answers, first a" in why

  sheet["a"].update(follows=True, correct=True)
  sheet["b"].update(follows=True, correct=False)
  filled = read_judgements(written(sheet))
  assert judged_share(filled, "correct", keys, hypotheses=hypotheses) == (pytest.approx(1 / 3), "")
  assert judged_share(filled, "follows", keys, hypotheses=hypotheses) == (pytest.approx(2 / 3), "")
  share, why = judged_share(filled, "follows", keys, hypotheses={**hypotheses, "b": "well"})
  assert share is None and "1 answers have changed since they were judged, first b" in why
