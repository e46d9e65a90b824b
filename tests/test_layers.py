"""Architecture rules: imports go down, packages stay apart, no circles, small files, no torch."""

import ast
import graphlib
from collections.abc import Set
from pathlib import Path

import pytest

LAYERS = {
  7: ("cli", "programs"),
  6: ("projects",),
  5: ("run", "transcribe", "serve", "units"),
  4: ("generation", "data", "training", "evaluation"),
  3: ("speech_llm", "sharding", "inputs", "prompts", "config", "checkpoint"),
  2: ("encoders", "connectors", "decoders", "vocoders", "aligners"),
  1: ("nn",),
  0: ("audio", "kernels", "text", "tree", "files", "hosts", "storage"),
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
# Packages of these layers never import each other; those of layers 3 and 5 may.
APART = (0, 1, 2, 4)
MAX_LINES = 450
TORCH_FOLDERS = ("convert", "tests", "benchmarks")
# Packages built on torch count as torch: importing one imports it.
TORCH = ("torch", "torchaudio", "peft", "funasr", "transformers")
# What a checkout holds beside the project's own sources.
NOT_OURS = (".venv", ".venv-beam", "out", "build", "dist", ".git")


def python_files(root: Path) -> list[Path]:
  return sorted(
    path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in NOT_OURS
  )


def imported_modules(path: Path, root: Path) -> set[str]:
  """Absolute dotted names of every import in a file, those inside functions included."""
  package = path.relative_to(root).with_suffix("").parts[:-1]
  names = set()
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Import):
      names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = list(package[: len(package) - node.level + 1]) if node.level else []
      base += node.module.split(".") if node.module else []
      names.add(".".join(base))
      # `from mooer_jax import tree` imports a module as well as a name.
      names.update(".".join([*base, alias.name]) for alias in node.names)
  return names


def part_of(path: Path, root: Path) -> str | None:
  """The package or module of mooer_jax that a file belongs to; None outside of mooer_jax."""
  parts = path.relative_to(root).with_suffix("").parts
  return parts[1] if parts[0] == "mooer_jax" and parts[1] != "__init__" else None


def _imported_parts(modules: set[str]) -> set[str]:
  parts = (module.split(".") for module in modules)
  return {names[1] for names in parts if names[0] == "mooer_jax" and len(names) > 1}


def import_violations(root: Path) -> list[str]:
  """Imports of a higher layer, or between packages that must stay apart."""
  found = []
  for path in python_files(root):
    name = path.relative_to(root)
    part = part_of(path, root)
    modules = imported_modules(path, root)
    parts = _imported_parts(modules)
    if name.parts[0] == "convert":
      found += [
        f"{name} imports mooer_jax.{p}: converters stay below layer 5"
        for p in sorted(parts)
        if LAYER_OF.get(p, 0) >= 5
      ]
    if part is None:
      continue
    if part not in LAYER_OF:
      found.append(f"{name}: {part!r} is in no layer; see LAYERS in tests/test_layers.py")
      continue
    layer = LAYER_OF[part]
    for other in sorted(parts & LAYER_OF.keys() - {part}):
      if LAYER_OF[other] > layer:
        found.append(f"{name} (layer {layer}) imports {other} (layer {LAYER_OF[other]})")
      elif LAYER_OF[other] == layer and layer in APART:
        found.append(f"{name}: {part} imports {other} of the same layer {layer}")
    outside = {m.split(".")[0] for m in modules}
    for folder in sorted(outside & {"tests", "benchmarks", "demo", "configs", "convert"}):
      found.append(f"{name} imports {folder}, which is not in the installed library")
  return found


def _edges(path: Path, root: Path, modules: Set[str]) -> set[str]:
  """The modules that a file imports; a package only where a name comes from its __init__."""
  package = path.relative_to(root).with_suffix("").parts[:-1]
  found = set()
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = list(package[: len(package) - node.level + 1]) if node.level else []
      name = ".".join([*base, *filter(None, [node.module])])
      inner = {f"{name}.{alias.name}" for alias in node.names}
      found |= inner & modules | ({name} if inner - modules else set())
  return found & modules


def circle_violations(root: Path) -> list[str]:
  """Files of mooer_jax or convert that import each other in a circle, also inside functions."""
  files = {}
  for path in python_files(root):
    names = path.relative_to(root).with_suffix("").parts
    if names[0] in ("mooer_jax", "convert"):
      files[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
  graph = {module: _edges(path, root, files.keys()) - {module} for module, path in files.items()}
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    circle = [str(files[module].relative_to(root)) for module in error.args[1]]
    return [f"import circle: {' -> '.join(reversed(circle))}"]
  return []


def torch_violations(root: Path) -> list[str]:
  found = []
  for path in python_files(root):
    name = path.relative_to(root)
    torch = {m.split(".")[0] for m in imported_modules(path, root)} & set(TORCH)
    if torch and name.parts[0] not in TORCH_FOLDERS:
      found.append(f"{name} imports {', '.join(sorted(torch))}; allowed only in {TORCH_FOLDERS}")
  return found


def size_violations(root: Path) -> list[str]:
  found = []
  for path in python_files(root):
    lines = len(path.read_text("utf-8").splitlines())
    if lines > MAX_LINES:
      found.append(f"{path.relative_to(root)}: {lines} lines, allowed are {MAX_LINES}")
  return found


def name_violations(root: Path) -> list[str]:
  return [
    f"{path.relative_to(root)}: a name without a meaning"
    for path in python_files(root)
    if path.stem in ("utils", "common", "helpers", "misc")
  ]


RULES = (import_violations, circle_violations, torch_violations, size_violations, name_violations)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule, repo_root):
  assert rule(repo_root) == []


def test_the_checker_reads_the_project(repo_root):
  parts = {part_of(path, repo_root) for path in python_files(repo_root)} - {None}
  assert {"nn", "encoders", "decoders", "speech_llm", "training"} <= parts


def test_the_readme_shows_every_part_in_its_layer(repo_root):
  _, _, drawn = (repo_root / "README.md").read_text("utf-8").partition("\nmooer_jax/\n")
  lines = [line for line in drawn.partition("\nconvert/")[0].split("\n") if line[2] != " "]
  shown = [{*line.strip().partition("  ")[0].split()} for line in lines]
  parts = {part_of(path, repo_root) for path in python_files(repo_root)} - {None}
  layers = [LAYERS[number] for number in sorted(LAYERS, reverse=True)]
  assert shown == [parts.intersection(layer) for layer in layers if parts.intersection(layer)]


@pytest.mark.parametrize(
  "path, source, rule, message",
  [
    ("mooer_jax/nn/layers.py", "from mooer_jax.encoders import sanm", import_violations, "layer 2"),
    ("mooer_jax/nn/layers.py", "from mooer_jax import config", import_violations, "layer 3"),
    ("mooer_jax/nn/layers.py", "from ..training.step import f", import_violations, "layer 4"),
    ("mooer_jax/nn/__init__.py", "from .. import training", import_violations, "layer 4"),
    ("mooer_jax/tree.py", "def f():\n  import mooer_jax.nn.layers", import_violations, "layer 1"),
    ("mooer_jax/data/a.py", "import mooer_jax.training.step", import_violations, "same layer 4"),
    ("mooer_jax/connectors/a.py", "from ..encoders import b", import_violations, "same layer 2"),
    ("mooer_jax/audio/a.py", "from mooer_jax import tree", import_violations, "same layer 0"),
    ("mooer_jax/run/a.py", "from mooer_jax.projects import b", import_violations, "layer 6"),
    ("mooer_jax/cellar/a.py", "", import_violations, "in no layer"),
    ("mooer_jax/data/a.py", "from demo import digits", import_violations, "not in the installed"),
    ("convert/a.py", "from mooer_jax.cli import main", import_violations, "below layer 5"),
    ("mooer_jax/data/a.py", "def f():\n  import torch.nn", torch_violations, "imports torch"),
    ("configs/a.py", "from transformers import Qwen2Config", torch_violations, "transformers"),
    ("demo/a.py", "\n" * 451, size_violations, "451 lines"),
    ("mooer_jax/nn/utils.py", "", name_violations, "without a meaning"),
  ],
)
def test_a_bad_file_is_found(tmp_path, path, source, rule, message):
  file = tmp_path / path
  file.parent.mkdir(parents=True)
  file.write_text(source)
  violations = rule(tmp_path)
  assert len(violations) == 1
  assert message in violations[0] and path in violations[0]


@pytest.mark.parametrize(
  "back",
  [
    "from mooer_jax.data import a",
    "def f():\n  from mooer_jax.data.a import g",
    "from . import a",
    "from mooer_jax.data import f",  # a name of a, through __init__
  ],
)
def test_a_circle_is_found(tmp_path, back):
  folder = tmp_path / "mooer_jax" / "data"
  folder.mkdir(parents=True)
  (folder / "__init__.py").write_text("from mooer_jax.data.a import f\n")
  (folder / "a.py").write_text("from mooer_jax.data import b\n")
  (folder / "b.py").write_text(back)
  [violation] = circle_violations(tmp_path)
  assert "mooer_jax/data/a.py" in violation and "mooer_jax/data/b.py" in violation


@pytest.mark.parametrize(
  "path, source",
  [
    ("mooer_jax/run/train.py", "from mooer_jax.training import step\nfrom mooer_jax.data import a"),
    ("mooer_jax/speech_llm.py", "from mooer_jax.config import SpeechLLMConfig"),
    ("mooer_jax/training/a.py", "from mooer_jax.training.b import f\nimport mooer_jax.tree"),
    ("mooer_jax/encoders/a.py", "from ..nn.layers import Dense\nimport mooer_jax"),
    ("mooer_jax/cli.py", "from mooer_jax.projects.salmonn import suite"),
    ("convert/a.py", "import torch\nfrom mooer_jax.speech_llm import init"),
    ("tests/a.py", "import torch\n" * 400),
    (".venv/lib/utils.py", "import torch\n" * 451),
  ],
)
def test_a_good_file_passes(tmp_path, path, source):
  file = tmp_path / path
  file.parent.mkdir(parents=True)
  file.write_text(source)
  assert [message for rule in RULES for message in rule(tmp_path)] == []
