"""Results name what they come from, and a result whose code has changed is named by a warning."""

import importlib
import json
import re

import pytest

from benchmarks import provenance

BEFORE = '''"""Doubles."""

def double(x):
  """Twice as much."""
  return 2 * x
'''


@pytest.fixture
def figure(tmp_path, monkeypatch):
  """A result in results/ that describes code/double.py: (root, its folder)."""
  monkeypatch.setattr(provenance, "ROOT", tmp_path)
  (tmp_path / "code").mkdir()
  (tmp_path / "code" / "double.py").write_text(BEFORE)
  (tmp_path / "run.sh").write_text("exit 0\n")
  results = tmp_path / "results"
  sources = ("code", "run.sh")
  provenance.write_result(results / "speed.json", {"seconds": 2.0}, sources, command="make speed")
  return tmp_path, results


def test_a_result_names_command_date_commit_and_sources(repo_root, tmp_path):
  path = tmp_path / "new" / "speed.json"
  provenance.write_result(path, {"seconds": 2.0}, ["benchmarks/provenance.py"])
  written = json.loads(path.read_text("utf-8"))
  about = written.pop("provenance")
  assert written == {"seconds": 2.0}
  assert about["command"].startswith("python ")
  assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
  assert (repo_root / ".git").exists() == bool(re.fullmatch("[0-9a-f]{40}", about["commit"] or ""))
  assert list(about["sources"]) == ["benchmarks/provenance.py"]


@pytest.mark.parametrize(
  "change, warned",
  [
    (lambda text: text, False),
    (lambda text: text.replace("Twice as much.", "Two times."), False),
    (lambda text: "# A comment.\n" + text.replace("2 * x", "(2  *  x)"), False),
    (lambda text: text.replace("2 * x", "3 * x"), True),
    (lambda text: text.replace("2 * x", "False * x"), True),
    (lambda text: text.replace("2 * x", "x"), True),
    (lambda text: text + "0\n", True),
  ],
  ids=["same", "docstring", "layout", "number", "type", "less", "more"],
)
def test_only_a_change_of_the_code_is_warned_of(figure, change, warned):
  root, results = figure
  (root / "code" / "double.py").write_text(change(BEFORE))
  found = provenance.warnings(results, root)
  assert len(found) == warned
  for line in found:
    assert line.startswith("speed.json: code has changed since 2") and "make speed" in line


def test_files_that_are_gone_or_no_python_count_too(figure):
  root, results = figure
  (root / "run.sh").write_text("exit 1\n")
  (root / "code" / "double.py").rename(root / "code" / "twice.py")
  [line] = provenance.warnings(results, root)
  assert "code has changed, run.sh has changed since" in line
  (root / "run.sh").unlink()
  [line] = provenance.warnings(results, root)
  assert "run.sh is gone since" in line


def test_a_result_without_provenance_is_named(figure):
  root, results = figure
  (results / "old.json").write_text('{"seconds": 1}')
  [line] = provenance.warnings(results, root)
  assert line.startswith("old.json: no provenance")


def test_a_source_that_does_not_exist_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="mooer_jax/absent"):
    provenance.write_result(tmp_path / "x.json", {}, ["mooer_jax/absent.py"])
  assert not (tmp_path / "x.json").exists()


BENCHMARKS = ["accuracy", "convert_7b", "gpu_suite"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_sources_of_each_benchmark_exist(name):
  sources = importlib.import_module(f"benchmarks.{name}").SOURCES
  assert f"benchmarks/{name}.py" in sources
  for source in sources:
    provenance.fingerprint(provenance.ROOT / source)


def test_the_check_warns_and_does_not_fail(monkeypatch, capsys):
  monkeypatch.setattr(provenance, "warnings", lambda: ["a.json: x has changed"])
  provenance.main()
  assert capsys.readouterr().err == "warning: benchmarks/results/a.json: x has changed\n"
