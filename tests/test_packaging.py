"""The lists of packages agree with each other, and the installed library has its parts."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest


@pytest.fixture(scope="module")
def project(repo_root):
  return tomllib.loads((repo_root / "pyproject.toml").read_text("utf-8"))["project"]


def _lines(path):
  return [line for line in path.read_text("utf-8").splitlines() if line and line[0] != "#"]


def _name(requirement):
  return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-").replace(".", "-")


def test_requirements_are_those_of_the_package(repo_root, project):
  assert _lines(repo_root / "requirements.txt") == project["dependencies"]


def test_constraints_pin_every_direct_dependency_exactly(repo_root, project):
  pins = _lines(repo_root / "constraints.txt")
  # No local version such as +cpu, no URL: both would tie the file to one machine.
  assert [p for p in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", p)] == []
  pinned = {_name(pin) for pin in pins}
  extras = project["optional-dependencies"]
  direct = [*project["dependencies"], *extras["dev"], *extras["convert"], *extras["data"]]
  assert {_name(r) for r in [*direct, *extras["demo"]]} - pinned <= {"mooer-jax"}


def test_the_promised_extras_exist(project):
  assert {"tpu", "cuda", "convert", "data", "serve", "dev"} <= set(project["optional-dependencies"])


def test_the_installed_package_holds_the_converters(tmp_path):
  try:
    metadata.distribution("mooer-jax")
  except metadata.PackageNotFoundError:
    pytest.skip("mooer-jax is not installed in this Python; `make test` installs it")
  code = "import mooer_jax.convert, mooer_jax.nn.dense; print(mooer_jax.convert.__name__)"
  # From another folder, so that the checkout is not on the path by itself.
  found = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
  )
  assert found.stdout.strip() == "mooer_jax.convert"
