import io
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mooer_jax.evaluation.alignment import align
from mooer_jax.evaluation.error_rate import ScoreConfig, score
from mooer_jax.evaluation.report import (
  alignment_lines,
  as_dict,
  as_text,
  printable,
  table,
  write_report,
)


@pytest.fixture
def result():
  references = {"a": "今天是Monday开会", "b": "好的", "c": "再见", "d": "one"}
  hypotheses = {"a": "今天monday开回会", "b": "好的", "d": "two", "[z]": "?"}
  return score(references, hypotheses)


def test_text_report(result):
  assert (
    as_text(result, name="demo")
    == """\
demo: error rate, MooER's tokens 45.45 %
5 errors in 11 tokens: 1 substitutions, 3 deletions, 1 insertions
4 utterances scored, 3 with an error
1 without hypothesis (counted as deleted): c
1 hypotheses without reference (not scored): [z]

The 3 worst of 3 utterances with an error:

c: 2 errors in 2 tokens (S 0, D 2, I 0), no hypothesis
REF: 再 见
HYP: ** **
     D  D

a: 2 errors in 6 tokens (S 0, D 1, I 1)
REF: 今 天 是 MONDAY 开 ** 会
HYP: 今 天 ** MONDAY 开 回 会
           D            I

d: 1 errors in 1 tokens (S 1, D 0, I 0)
REF: ONE
HYP: TWO
     S
"""
  )


def test_files_say_the_same(result, tmp_path):
  json_path, text_path = write_report(tmp_path / "new", result, name="demo", details={"steps": 7})
  assert text_path.read_text("utf-8") == as_text(result, name="demo", details={"steps": 7})
  content = json.loads(json_path.read_text("utf-8"))
  assert content == as_dict(result, name="demo", details={"steps": 7})
  assert content["error_rate"] == 5 / 11
  assert (content["substitutions"], content["deletions"], content["insertions"]) == (1, 3, 1)
  assert content["missing"] == ["c"] and content["without_reference"] == ["[z]"]
  assert content["config"]["metric"] == "mixed"
  assert content["details"] == {"steps": 7}
  assert len(content["worst"]) == 3 and len(content["per_utterance"]) == 4
  assert content["worst"][0]["alignment"] == [["再", None], ["见", None]]
  assert sum(u["deletions"] for u in content["per_utterance"]) == 3


def test_reports_without_reference_tokens_say_so(tmp_path):
  empty = score({"a": ""}, {"a": "x"})
  assert "undefined" in as_text(empty, name="demo")
  path, _ = write_report(tmp_path, empty, name="demo")
  assert json.loads(path.read_text("utf-8"))["error_rate"] is None


def test_details_are_shown_without_the_syntax_of_python(result):
  details = {
    "decode_seconds": 8.754321,
    "rates": {"word": 1 / 3, "character": None},
    "cut_off": 0,
    "not_decoded": [],
    "notes": ["a: too long", "b\n"],
  }
  lines = as_text(result, name="demo", details=details).splitlines()
  for line in (
    "decode seconds: 8.7543",
    "rates: word 0.3333, character undefined",
    "cut off: 0",
    "not decoded: none",
    "notes: a: too long; b\\n",
  ):
    assert line in lines


def test_skipped_utterances_are_told(tmp_path):
  skipped = score({"a": "x", "b": "y"}, {"a": "x"}, ScoreConfig(missing="skip"))
  text = as_text(skipped, name="demo")
  assert "1 without hypothesis (left out of the figures): b" in text
  assert "worst" not in text


def test_many_keys_are_cut_short_with_their_number():
  references = {f"k{i:02d}": "x" for i in range(40)}
  text = as_text(score(references, {"k00": "x"}), name="demo")
  assert "39 without hypothesis" in text
  assert "k20 and 19 more, see report.json" in text


def test_details_that_json_cannot_hold_leave_no_report(result, tmp_path):
  with pytest.raises(ValueError, match="'demo'"):
    write_report(tmp_path, result, name="demo", details={"loss": float("nan")})
  assert not list(tmp_path.iterdir())


@given(
  st.lists(st.text("ab好ﾊＡ\x1b\u0301", min_size=1, max_size=4), max_size=30),
  st.lists(st.text("ab好ﾊＡ\x1b\u0301", min_size=1, max_size=4), max_size=30),
)
def test_rows_stay_in_step_and_within_the_width(reference, hypothesis):
  pairs = align(reference, hypothesis)
  lines = alignment_lines(pairs, width=40)
  assert all(cell_len(line) <= 40 for line in lines)
  rows = {"REF": [], "HYP": []}
  for line in lines:
    if line[:3] in rows:
      rows[line[:3]] += line[5:].split()
  assert rows["REF"] == [_shown(r, h) for r, h in pairs]
  assert rows["HYP"] == [_shown(h, r) for r, h in pairs]
  for ref, hyp in itertools.pairwise(lines):
    if ref.startswith("REF"):
      assert _starts(ref) == _starts(hyp)


def _shown(token, other):
  return printable(token) if token is not None else "*" * max(1, cell_len(printable(other)))


def _starts(line):
  """Columns in which tokens begin."""
  columns, column, before = [], 0, " "
  for character in line[5:]:
    if character != " " and before == " ":
      columns.append(column)
    column += cell_len(character)
    before = character
  return columns


def test_control_characters_are_spelt_out():
  assert printable("a\x1b[31m\n\u200d好") == "a\\x1b[31m\\n\\u200d好"


def test_table_has_a_row_a_set(result):
  import rich.console

  stream = io.StringIO()
  console = rich.console.Console(file=stream, width=140, color_system=None)
  console.print(table({"demo [b]": result, "other": result}))
  rows = [line.split("│") for line in stream.getvalue().splitlines() if "45.45" in line]
  cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
  numbers = ["45.45 %", "11", "1", "3", "1", "4", "3", "1"]
  assert cells == [["demo [b]", *numbers], ["other", *numbers]]
