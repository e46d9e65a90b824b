"""The lists of packages agree with each other, and the installed library has its parts."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
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
  direct += [*extras["demo"], *extras["mini"], *extras["verify"]]
  assert {_name(requirement) for requirement in direct} - pinned <= {"mooer-jax"}


def test_the_promised_extras_exist(project):
  assert {"tpu", "cuda", "convert", "data", "serve", "mini", "dev"} <= set(
    project["optional-dependencies"]
  )


def _third_party_imports(folder):
  """Name of each imported top-level package that is not Python's own, and a file that does so."""
  found = {}
  for path in sorted(folder.rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
      found.update({name.split(".")[0]: path for name in names})
  ours = {"mooer_jax", *sys.stdlib_module_names}
  return {name: path for name, path in found.items() if name not in ours}


@pytest.mark.parametrize("folder", ["mooer_jax", "convert"])
def test_what_the_library_imports_is_declared(repo_root, project, folder):
  extras = project["optional-dependencies"]
  named = ("convert", "verify", "data", "serve")
  required = [*project["dependencies"], *(r for name in named for r in extras[name])]
  declared = {_name(requirement) for requirement in required}
  provided_by = metadata.packages_distributions()
  undeclared = {
    name: str(path)
    for name, path in _third_party_imports(repo_root / folder).items()
    if not {_name(package) for package in provided_by.get(name, [name])} & declared
  }
  assert undeclared == {}


def test_an_import_inside_a_function_is_found(tmp_path):
  (tmp_path / "a.py").write_text("import os\ndef f():\n  import scipy.fft\n  from . import b\n")
  assert _third_party_imports(tmp_path) == {"scipy": tmp_path / "a.py"}


def test_the_installed_package_holds_the_converters(tmp_path):
  try:
    metadata.distribution("mooer-jax")
  except metadata.PackageNotFoundError:
    pytest.skip("mooer-jax is not installed in this Python; `make test` installs it")
  code = "import mooer_jax.convert, mooer_jax.nn.layers; print(mooer_jax.convert.__name__)"
  # From another folder, so that the checkout is not on the path by itself.
  found = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
  )
  assert found.stdout.strip() == "mooer_jax.convert"


@pytest.fixture(scope="module")
def installed_wheel(repo_root, tmp_path_factory):
  """Folder with the contents of the built wheel, as pip unpacks it."""
  folder = tmp_path_factory.mktemp("wheel")
  sources = folder / "sources"  # the build writes into its folder
  for name in ("mooer_jax", "convert", "configs"):
    shutil.copytree(repo_root / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copyfile(repo_root / name, sources / name)
  command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
  subprocess.run([sys.executable, *command, "-w", folder, sources], check=True, cwd=folder)
  [wheel] = folder.glob("*.whl")
  zipfile.ZipFile(wheel).extractall(folder / "site")
  return folder / "site"


@pytest.mark.parametrize(
  "arguments, status, message",
  [
    (["--version"], 0, "0.1.0"),
    (["transcribe", "--help"], 0, "--chunk-length-s"),
    (["train", "--config=tiny", "--config.data.shards=nowhere"], 1, "nowhere: no such list"),
    (["train", "--config=salmonn_activation", "--config.workdir=w"], 1, "init_from"),
    (["train", "--config=other"], 1, "no shipped config (mini_activation, mini_salmonn, mooer_7b"),
    (
      ["eval", "--config=configs/tiny.py", "--checkpoint=nowhere"],
      1,
      "nowhere: no such checkpoint",
    ),
    (["convert", "inspect", "nowhere"], 2, "nowhere: no such file or folder"),
    (["checkpoint", "verify", "nowhere"], 2, "nowhere"),
    (["pack", "--wav-scp=a", "--text=b", "--out=c"], 2, "a: "),
  ],
  ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_installed_wheel_has_every_command(
  installed_wheel, plain_env, tmp_path, arguments, status, message
):
  env = {**plain_env, "PYTHONPATH": str(installed_wheel)}
  command = [sys.executable, "-m", "mooer_jax.cli", *arguments]
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
  assert message in done.stdout + done.stderr
  assert done.returncode == status and "Traceback" not in done.stderr
