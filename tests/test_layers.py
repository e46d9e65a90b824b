"""The house rules: imports go down, wings stay apart, files stay small, torch stays outside."""

import ast
from pathlib import Path

import pytest

FLOORS = {
  5: ("run", "transcribe", "transcript", "clips", "cli", "serve"),
  4: ("generation", "data", "training", "evaluation"),
  3: ("speech_llm", "prompts", "config", "sections", "checkpoint"),
  2: ("encoders", "connectors", "decoders", "vocoders"),
  1: ("nn",),
  0: ("audio", "kernels", "text", "tree", "files"),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
# Their rooms never import each other; those of floors 3 and 5 may.
APART = (0, 1, 2, 4)
MAX_LINES = 400
TORCH_FOLDERS = ("convert", "tests", "benchmarks")
# Packages built on torch count as torch: importing one imports it.
TORCH = ("torch", "torchaudio", "peft", "funasr", "transformers")
# What a checkout holds beside the project's own sources.
NOT_OURS = (".venv", "out", "build", "dist", ".git")


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


def room_of(path: Path, root: Path) -> str | None:
  """The room of mooer_jax that a file belongs to; None for its __init__.py and other folders."""
  parts = path.relative_to(root).with_suffix("").parts
  return parts[1] if parts[0] == "mooer_jax" and parts[1] != "__init__" else None


def _imported_rooms(modules: set[str]) -> set[str]:
  parts = (module.split(".") for module in modules)
  return {names[1] for names in parts if names[0] == "mooer_jax" and len(names) > 1}


def import_violations(root: Path) -> list[str]:
  """Imports that climb to a higher floor, or cross between rooms that stay apart."""
  found = []
  for path in python_files(root):
    name = path.relative_to(root)
    room = room_of(path, root)
    rooms = _imported_rooms(imported_modules(path, root))
    if name.parts[0] == "convert":
      found += [
        f"{name} imports mooer_jax.{r}: converters stay below floor 5"
        for r in sorted(rooms)
        if FLOOR_OF.get(r) == 5
      ]
    if room is None:
      continue
    if room not in FLOOR_OF:
      found.append(f"{name}: the room {room!r} is on no floor; see FLOORS in tests/test_layers.py")
      continue
    for other in sorted(rooms & FLOOR_OF.keys() - {room}):
      if FLOOR_OF[other] > FLOOR_OF[room]:
        found.append(f"{name} (floor {FLOOR_OF[room]}) imports {other} (floor {FLOOR_OF[other]})")
      elif FLOOR_OF[other] == FLOOR_OF[room] and FLOOR_OF[room] in APART:
        found.append(f"{name}: {room} imports {other} of the same floor {FLOOR_OF[room]}")
    outside = {m.split(".")[0] for m in imported_modules(path, root)}
    for folder in sorted(outside & {"tests", "benchmarks", "demo", "configs", "convert"}):
      found.append(f"{name} imports {folder}, which is not in the installed library")
  return found


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
    f"{path.relative_to(root)}: a name that says nothing"
    for path in python_files(root)
    if path.stem in ("utils", "common", "helpers", "misc")
  ]


RULES = (import_violations, torch_violations, size_violations, name_violations)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule, repo_root):
  assert rule(repo_root) == []


def test_the_checker_reads_the_project(repo_root):
  rooms = {room_of(path, repo_root) for path in python_files(repo_root)} - {None}
  assert {"nn", "encoders", "decoders", "speech_llm", "training"} <= rooms


@pytest.mark.parametrize(
  "path, source, rule, message",
  [
    ("mooer_jax/nn/dense.py", "from mooer_jax.encoders import sanm", import_violations, "floor 2"),
    ("mooer_jax/nn/dense.py", "from mooer_jax import config", import_violations, "floor 3"),
    ("mooer_jax/nn/dense.py", "from ..training.step import f", import_violations, "floor 4"),
    ("mooer_jax/nn/__init__.py", "from .. import training", import_violations, "floor 4"),
    ("mooer_jax/tree.py", "def f():\n  import mooer_jax.nn.dense", import_violations, "floor 1"),
    ("mooer_jax/data/a.py", "import mooer_jax.training.step", import_violations, "same floor 4"),
    ("mooer_jax/connectors/a.py", "from ..encoders import b", import_violations, "same floor 2"),
    ("mooer_jax/audio/a.py", "from mooer_jax import tree", import_violations, "same floor 0"),
    ("mooer_jax/cellar/a.py", "", import_violations, "on no floor"),
    ("mooer_jax/data/a.py", "from demo import digits", import_violations, "not in the installed"),
    ("convert/a.py", "from mooer_jax.cli import main", import_violations, "below floor 5"),
    ("mooer_jax/data/a.py", "def f():\n  import torch.nn", torch_violations, "imports torch"),
    ("configs/a.py", "from transformers import Qwen2Config", torch_violations, "transformers"),
    ("demo/a.py", "\n" * 401, size_violations, "401 lines"),
    ("mooer_jax/nn/utils.py", "", name_violations, "says nothing"),
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
  "path, source",
  [
    ("mooer_jax/run/train.py", "from mooer_jax.training import step\nfrom mooer_jax.data import a"),
    ("mooer_jax/speech_llm.py", "from mooer_jax.config import SpeechLLMConfig"),
    ("mooer_jax/training/a.py", "from mooer_jax.training.b import f\nimport mooer_jax.tree"),
    ("mooer_jax/encoders/a.py", "from ..nn.dense import Dense\nimport mooer_jax"),
    ("convert/a.py", "import torch\nfrom mooer_jax.speech_llm import init"),
    ("tests/a.py", "import torch\n" * 400),
    (".venv/lib/utils.py", "import torch\n" * 401),
  ],
)
def test_a_good_file_passes(tmp_path, path, source):
  file = tmp_path / path
  file.parent.mkdir(parents=True)
  file.write_text(source)
  assert [message for rule in RULES for message in rule(tmp_path)] == []
