"""Run the parity and model tests under other instruction sets, BLAS kernels and thread counts.

  make portable
  make portable PORTABLE_ARGS="--only xla-sse4_2 lowest"
  python -m tests.portable --tests tests/nn -- -x
  make portable PORTABLE_ARGS="--json benchmarks/results/portable.json"

The tests run once for each setting: first one variable at a time, then all variables at their
lowest, and at the highest value that this machine has. XLA optimises its programs as it does for
users; `make test` compiles without. A setting that this machine lacks is not run, and the table
at the end says so. The exit status is 1 if a setting failed. With --json, the results of this
processor are updated in a file after each setting, so that the settings may run on several days.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import commit_of, versions, write_result

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
  *(f"audio/test_{name}.py" for name in ("cmvn", "fbank", "frontend", "logmel")),
  "nn", "kernels", "encoders", "connectors", "decoders", "parity", "generation", "training",
  "convert/verify", "test_numerics.py", "test_speech_llm.py", "test_pmap.py",
)  # fmt: skip

# The names that /proc/cpuinfo has for what each instruction set needs.
FEATURES = {
  "SSE4.2": {"sse4_2"},
  "AVX2": {"avx2", "fma"},
  "AVX-512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
  "AVX-512 BF16": {"avx512_bf16"},
  "AMX": {"amx_tile"},
}

# What users run. JAX's compilation cache may be shared: XLA_FLAGS is a part of its keys.
OPTIMISED = {"XLA_FLAGS": "--xla_backend_optimization_level=3"}


class Machine(NamedTuple):
  instruction_sets: frozenset[str]  # keys of FEATURES
  cpus: int
  processor: str = ""


class Outcome(NamedTuple):
  """Counts of a run of the tests, and the names of those that failed."""

  passed: int
  failures: list[str]
  minutes: float
  status: int  # of pytest

  def __str__(self) -> str:
    counts = f"{self.passed} passed, {len(self.failures)} failed in {self.minutes:.0f} min"
    if self.status == 0:
      return counts
    return "\n".join([f"FAILED (pytest: {self.status}): {counts}", *self.failures])


class Setting(NamedTuple):
  """Environment variables of one run, and what the run needs."""

  name: str
  env: Mapping[str, str] = {}
  needs: tuple[str, ...] = ()  # keys of FEATURES
  cpus: int = 1

  def missing(self, machine: Machine) -> str:
    """What this machine lacks for the setting; empty if it can run."""
    lacking = [name for name in self.needs if name not in machine.instruction_sets]
    if machine.cpus < self.cpus:
      lacking.append(f"{self.cpus} CPUs")
    return ", ".join(lacking)


def _xla(isa: str, *needs: str) -> Setting:
  return Setting(f"xla-{isa.lower()}", {"XLA_FLAGS": f"--xla_cpu_max_isa={isa}"}, needs)


def _openblas(core: str, *needs: str) -> Setting:
  return Setting(f"openblas-{core.lower()}", {"OPENBLAS_CORETYPE": core}, needs)


def _aten(capability: str, *needs: str) -> Setting:
  return Setting(f"aten-{capability}", {"ATEN_CPU_CAPABILITY": capability}, needs)


# The values of each variable, the lowest first. OpenBLAS and PyTorch take any value and crash at
# an instruction that the processor lacks.
VARIABLES = (
  (_xla("SSE4_2", "SSE4.2"), _xla("AVX2", "AVX2"), _xla("AVX512", "AVX-512")),
  (
    _openblas("Nehalem", "SSE4.2"),
    _openblas("Haswell", "AVX2"),
    _openblas("SkylakeX", "AVX-512"),
    _openblas("SapphireRapids", "AVX-512", "AVX-512 BF16", "AMX"),
  ),
  (_aten("default"), _aten("avx2", "AVX2"), _aten("avx512", "AVX-512")),
  (
    # XLA starts a thread for each of the eight simulated devices, so the flag turns them off.
    Setting(
      "threads-1", {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    ),
    Setting("threads-2", {"OMP_NUM_THREADS": "2"}, cpus=2),
  ),
)


def together(name: str, settings: Sequence[Setting]) -> Setting:
  """One setting with the variables and needs of all; values of XLA_FLAGS are joined."""
  env: dict[str, str] = {}
  for setting in settings:
    for key, value in setting.env.items():
      env[key] = f"{env[key]} {value}" if key in env else value
  needs = dict.fromkeys(need for setting in settings for need in setting.needs)
  return Setting(name, env, tuple(needs), max(setting.cpus for setting in settings))


def settings_for(machine: Machine) -> list[Setting]:
  """All settings, those that the machine lacks among them."""
  possible = [[one for one in values if not one.missing(machine)] for values in VARIABLES]
  return [
    Setting("optimised"),
    *(setting for values in VARIABLES for setting in values),
    together("lowest", [values[0] for values in VARIABLES]),
    together("highest", [values[-1] for values in possible if values]),
  ]


def instruction_sets(cpuinfo: str) -> frozenset[str]:
  """Keys of FEATURES that the text of /proc/cpuinfo names; none on another kind of processor."""
  lines = (line for line in cpuinfo.splitlines() if line.startswith("flags"))
  flags = set(next(lines, "").split())
  return frozenset(name for name, needed in FEATURES.items() if needed <= flags)


def this_machine() -> Machine:
  path = Path("/proc/cpuinfo")
  text = path.read_text("utf-8") if path.exists() else ""
  names = (line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line)
  return Machine(instruction_sets(text), os.cpu_count() or 1, next(names, "unknown"))


def environment(setting: Setting) -> dict[str, str]:
  """All variables for a process that runs tests under a setting."""
  return {**os.environ, **together("", [Setting("", OPTIMISED), setting]).env}


def run_tests(setting: Setting, pytest_args: Sequence[str]) -> Outcome:
  """Run pytest in a process of its own, which prints to the terminal."""
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    report = Path(folder) / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}"]
    process = subprocess.run([*command, *pytest_args], cwd=ROOT, env=environment(setting))
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
  tags = [{child.tag for child in case} for case in cases]
  failures = [
    f"{case.get('classname')}::{case.get('name')}"
    for case, of_case in zip(cases, tags)
    if of_case & {"failure", "error"}
  ]
  passed = sum(not of_case & {"failure", "error", "skipped"} for of_case in tags)
  return Outcome(passed, failures, (time.monotonic() - start) / 60, process.returncode)


def record(path: Path, machine: Machine, setting: Setting, outcome: Outcome) -> None:
  """Replace the row of this processor and setting in a file of results, or add it."""
  rows = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
  row = {
    "processor": machine.processor,
    "instruction_sets": sorted(machine.instruction_sets),
    "setting": setting.name,
    "variables": dict(setting.env),
    "passed": outcome.passed,
    "failures": outcome.failures,
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "commit": commit_of(ROOT),
  }
  rows = [
    one for one in rows if (one["processor"], one["setting"]) != (row["processor"], row["setting"])
  ]
  result = {"rows": [*rows, row], "versions": versions("jax", "jaxlib", "numpy", "torch")}
  write_result(path, result, ["tests/portable.py"])


def main(argv: Sequence[str]) -> int:
  machine = this_machine()
  settings = {setting.name: setting for setting in settings_for(machine)}
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--only", nargs="+", metavar="NAME", choices=settings, default=settings, help="settings to run"
  )
  parser.add_argument(
    "--tests", nargs="+", metavar="PATH", default=[f"tests/{name}" for name in TESTS],
    help="files or folders of tests",
  )  # fmt: skip
  parser.add_argument("--json", type=Path, metavar="FILE", help="file of results to update")
  parser.add_argument("pytest_args", nargs="*", help="arguments of pytest, after --")
  args = parser.parse_args(argv)
  if args.json and args.tests != parser.get_default("tests"):
    parser.error("--json records runs of all tests; leave out --tests")

  console = Console()
  table = Table("setting", "variables", "result")
  succeeded = True
  for number, name in enumerate(args.only, 1):
    setting = settings[name]
    variables = "\n".join(f"{key}={value}" for key, value in setting.env.items())
    if missing := setting.missing(machine):
      table.add_row(name, variables, f"NOT RUN: this machine lacks {missing}")
      continue
    console.rule(f"{number} of {len(args.only)}: {name}")
    outcome = run_tests(setting, [*args.tests, "-m", "not nightly", *args.pytest_args])
    succeeded &= outcome.status == 0
    table.add_row(name, variables, str(outcome))
    if args.json:
      record(args.json, machine, setting, outcome)
  console.print(table)
  return 0 if succeeded else 1


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
