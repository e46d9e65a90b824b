"""Provenance of results: command, date, commit and source files, in the JSON of each result.

    python -m benchmarks.provenance    # lists the results whose source files have changed

The check is part of `make lint`. It only warns, because a result stays true of its commit.
"""

import argparse
import ast
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The model from features to logits: sources of every figure that runs it.
MODEL = (
  "mooer_jax/connectors",
  "mooer_jax/decoders",
  "mooer_jax/encoders",
  "mooer_jax/kernels",
  "mooer_jax/nn",
  "mooer_jax/speech_llm.py",
)


def write_result(
  path: Path | None, result: Mapping[str, Any], sources: Iterable[str], *, command=""
) -> None:
  """Write a result with its provenance as JSON; without a path (no --json), do nothing.

  Args:
    path: file to write; its folder is created.
    result: figures, as JSON values.
    sources: files and folders of the repository that the figures describe.
    command: command that repeats the measurement; default: that of this process.
  """
  if path is None:
    return
  provenance = {
    "command": command or shlex.join(["python", *sys.orig_argv[1:]]),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "commit": commit_of(ROOT),
    "machine": f"{platform.system()}, {platform.machine()}, {os.cpu_count()} CPUs",
    "sources": {source: fingerprint(ROOT / source) for source in sources},
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({**result, "provenance": provenance}, indent=2) + "\n", "utf-8")


def run_benchmark(
  doc: str | None, measure: Callable[[], Mapping[str, Any]], sources: Iterable[str]
) -> None:
  """Command line of a benchmark without options of its own; --json FILE writes its result."""
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  write_result(args.json, measure(), sources)


def versions(*packages: str) -> dict[str, str]:
  """Versions of Python and of packages; "absent" for one that is not installed."""
  found = {"python": platform.python_version()}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "absent"
  return found


def fingerprint(path: Path) -> str:
  """Hash of a file, or of all Python files of a folder, without comments, docstrings and layout."""
  digest = hashlib.sha256()
  for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
    digest.update(file.relative_to(path).as_posix().encode())
    content = file.read_bytes()
    digest.update(_code(ast.parse(content)).encode() if file.suffix == ".py" else content)
  return digest.hexdigest()[:16]


def _code(node) -> str:
  """A syntax tree as text, the same on every supported Python."""
  if isinstance(node, list):
    return f"[{','.join(_code(child) for child in node if not _is_text(child))}]"
  if isinstance(node, ast.Constant):
    return repr(node.value)
  if not isinstance(node, ast.AST):
    return repr(node)
  # Newer Pythons add fields, which are None or empty for older syntax.
  fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
  return f"{type(node).__name__}({','.join(f'{k}={_code(v)}' for k, v in fields.items())})"


def _is_text(node) -> bool:
  """Whether a node is a statement that is only a string: a docstring."""
  value = node.value if isinstance(node, ast.Expr) else None
  return isinstance(value, ast.Constant) and isinstance(value.value, str)


def changed_sources(provenance: Mapping[str, Any], root: Path = ROOT) -> list[str]:
  """The changed ones of the source files that a result describes."""
  changed = []
  for source, before in provenance["sources"].items():
    if not (root / source).exists():
      changed.append(f"{source} is gone")
    elif fingerprint(root / source) != before:
      changed.append(f"{source} has changed")
  return changed


def warnings(results: Path = RESULTS, root: Path = ROOT) -> list[str]:
  """Return one line for each result whose source files have changed."""
  found = []
  for file in sorted(results.glob("*.json")):
    about = json.loads(file.read_text("utf-8")).get("provenance")
    if about is None:
      found.append(f"{file.name}: no provenance; repeat the benchmark")
      continue
    changed = changed_sources(about, root)
    if changed:
      made = f"{about['date']} ({(about['commit'] or 'unknown commit')[:12]})"
      found.append(f"{file.name}: {', '.join(changed)} since {made}; repeat: {about['command']}")
  return found


def commit_of(repository: Path) -> str | None:
  """Commit that is checked out; None where there is no git or no repository."""
  command = ["git", "rev-parse", "HEAD"]
  try:
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
  except (FileNotFoundError, subprocess.CalledProcessError):
    return None
  return done.stdout.strip()


def main():
  for line in warnings():
    print(f"warning: benchmarks/results/{line}", file=sys.stderr)


if __name__ == "__main__":
  main()
