"""What a run says of its memory and of tests left out, and that too much memory fails it."""

import os
import subprocess
import sys

import pytest

from tests import worker_memory

TESTS = """
import pytest

@pytest.mark.parametrize("x", range(4))
def test_quick(x):
  pass

@pytest.mark.nightly
@pytest.mark.parametrize("x", range(3))
def test_long(x):
  pass
"""
LINUX = pytest.mark.skipif(not worker_memory.ON_LINUX, reason="no Linux: units of ru_maxrss")


@pytest.fixture
def run(repo_root, tmp_path):
  """Runs pytest on TESTS with this suite's conftest as a plugin: (exit status, output)."""

  def command(*options, limit_gb=worker_memory.LIMIT_GB):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(
      f"from tests import worker_memory\nworker_memory.LIMIT_GB = {limit_gb}\n"
    )
    process = subprocess.run(
      [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", *options],
      env={**os.environ, "PYTHONPATH": str(repo_root)},
      cwd=tmp_path,
      capture_output=True,
      text=True,
    )
    return process.returncode, process.stdout + process.stderr

  return command


@pytest.mark.parametrize("workers, names", [("0", ["main"]), ("2", ["gw0", "gw1"])])
def test_peaks_and_nightly_tests_are_named(run, workers, names):
  status, text = run("-n", workers, "-m", "not nightly")
  assert status == 0, text
  for name in names if worker_memory.ON_LINUX else []:
    assert f"\n{name}: 0." in text
  assert "3 nightly tests not run; `make nightly` runs them" in text
  assert "test_it.py::test_long (3 cases)" in text


@LINUX
@pytest.mark.parametrize("workers", ["0", "2"])
def test_too_much_memory_fails_a_run_without_nightly_tests(run, workers):
  status, text = run("-n", workers, "-m", "not nightly", limit_gb=0.001)
  assert status == 1 and "more than 0.001 GB fails the run" in text, text
  status, text = run("-n", "0", limit_gb=0.001)
  assert status == 0 and "nightly tests not run" not in text, text
