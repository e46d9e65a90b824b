"""The GPU suite: correctness, kernels, the LLM of 7B beside PyTorch, a short training.

Run it by gpu_suite.sh.

Each section runs in its own process, so that each framework has the whole GPU and a section that
fails or crashes does not affect the others.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks.provenance import MODEL, versions, write_result

# section -> (module with `run(dry_run) -> dict`, time limit in seconds)
SECTIONS = {
  "correctness": ("benchmarks.gpu_correctness", 110),
  "kernels": ("benchmarks.kernels", 80),
  "jax_7b": ("benchmarks.llm_jax", 160),
  "torch_7b": ("benchmarks.llm_torch", 140),
  "training": ("benchmarks.gpu_training", 100),
}
WORKLOADS = ("forward", "train_step", "decode")
SOURCES = (
  *MODEL,
  *(f"{module.replace('.', '/')}.py" for module, _ in SECTIONS.values()),
  "benchmarks/gpu_suite.py",
  "benchmarks/llm_sizes.py",
  "convert/parts/hf_config.py",
  "mooer_jax/generation",
  "mooer_jax/sharding.py",
  "mooer_jax/training",
)


def run_section(name: str, dry_run: bool) -> dict:
  """Run one section in this process; an error becomes part of the result."""
  start = time.perf_counter()
  try:
    result = importlib.import_module(SECTIONS[name][0]).run(dry_run)
  except Exception:
    result = {"passed": False, "error": traceback.format_exc()}
  return {"passed": True, **result, "seconds": round(time.perf_counter() - start, 1)}


def spawn_section(name: str, dry_run: bool) -> dict:
  """Run one section in a new process, with a time limit."""
  limit = SECTIONS[name][1] * (5 if dry_run else 1)  # a CPU may be busy
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "section.json"
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--section", name, "--json", str(out)]
    try:
      subprocess.run(command + ["--dry-run"] * dry_run, timeout=limit, check=True)
      return json.loads(out.read_text("utf-8"))
    except subprocess.TimeoutExpired:
      return {"passed": False, "error": f"not done after {limit} s"}
    except subprocess.CalledProcessError as error:
      return {"passed": False, "error": f"the process ended with status {error.returncode}"}


def compare(jax_side: dict, torch_side: dict) -> dict:
  """Return the ratios of PyTorch to JAX: above 1, JAX is faster or takes less memory."""
  ratios = {}
  for workload in WORKLOADS:
    ours, theirs = (side.get(workload) for side in (jax_side, torch_side))
    if ours and theirs:
      ratios[workload] = {
        f"{name}_torch_over_jax": round(theirs[key] / ours[key], 3)
        for name, key in (("time", "seconds"), ("memory", "memory_gb"))
        if ours.get(key) and theirs.get(key)
      }
  return ratios


def show(report: dict):
  """Print the report as plain lines, without further packages."""
  print(f"\n{report['device']}{'  (dry run, sizes mean nothing)' if report['dry_run'] else ''}")
  for name, section in report["sections"].items():
    print(f"{name:12} {'passed' if section['passed'] else 'FAILED'}")
    if section.get("error"):
      print(f"    {section['error'].strip().splitlines()[-1]}")
    for check in section.get("checks", ()):
      mark = "ok" if check["passed"] else "FAILED"
      print(f"    {check['name']:44} {check['error']:.2e} <= {check['tolerance']:.0e}  {mark}")
  print(f"{'':12} {'JAX s':>9} {'torch s':>9} {'torch/JAX':>10}   {'JAX GB':>7} {'torch GB':>8}")
  for workload, ratio in report["torch_over_jax"].items():
    ours, theirs = (report["sections"][side][workload] for side in ("jax_7b", "torch_7b"))
    memory = "".join(f"{side['memory_gb'] or float('nan'):9.2f}" for side in (ours, theirs))
    print(
      f"{workload:12} {ours['seconds']:9.4f} {theirs['seconds']:9.4f}"
      f" {ratio['time_torch_over_jax']:10.2f}  {memory}"
    )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
  parser.add_argument("--section", choices=SECTIONS, help="run only this section, in this process")
  parser.add_argument("--json", type=Path, help="file to write")
  options = parser.parse_args()
  if options.dry_run:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
  if options.section:
    options.json.write_text(json.dumps(run_section(options.section, options.dry_run)), "utf-8")
    return 0
  sections = {name: spawn_section(name, options.dry_run) for name in SECTIONS}
  devices = (section["device"] for section in sections.values() if section.get("device"))
  report = {
    "device": next(devices, "unknown"),
    "dry_run": options.dry_run,
    "versions": versions("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy"),
    "torch_over_jax": compare(sections["jax_7b"], sections["torch_7b"]),
    "sections": sections,
  }
  show(report)
  folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
  path = options.json or folder / f"gpu_suite{'_dry_run' * options.dry_run}.json"
  write_result(path, report, SOURCES)
  print(f"written to {path}")
  return 0 if all(section["passed"] for section in sections.values()) else 1


if __name__ == "__main__":
  sys.exit(main())
