"""The tables of benchmarks/README.md are those of the results."""

import json

from benchmarks import tables
from benchmarks.tables import README, filled


def without_marks(text: str) -> str:
  """A README without the marks of results that are older than their code."""
  legend = f"\n\n{tables._LEGEND}"
  return text.replace(legend, "").replace(tables.STALE, "")


def test_the_readme_has_the_figures_of_the_results():
  text = README.read_text("utf-8")
  assert text.count("<!-- table: ") == len(tables.TABLES) == text.count("<!-- end -->")
  assert without_marks(filled(text)) == without_marks(text), "run python -m benchmarks.tables"


def test_a_changed_figure_and_changed_code_show(monkeypatch, tmp_path):
  [result] = tables._load("convert_7b.json")
  text = "<!-- table: convert_7b -->\n<!-- end -->"
  monkeypatch.setattr(tables, "RESULTS", tmp_path)
  for ratio, sources in ((1.25, {}), (2.5, {"no_such_file.py": "0"})):
    result["import"]["seconds"] = ratio * result["cp"]["seconds"]
    result["provenance"]["sources"] = sources
    (tmp_path / "convert_7b.json").write_text(json.dumps(result), "utf-8")
    table = filled(text)
    assert f"| import | {ratio:.2f} |" in table
    assert (tables.STALE in table) == bool(sources) == (tables._LEGEND in table)
