"""The GPU suite's dry run: every section on the CPU at tiny sizes, and how it reports failures."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu_suite
from benchmarks.llm_sizes import FULL

# A machine with a GPU has few packages besides jax, flax, optax and torch.
ABSENT_THERE = (
  "ml_collections", "soundfile", "soxr", "librosa", "grain", "tensorflow_datasets", "peft",
  "funasr", "tensorboardX", "tokenizers", "av", "orbax",
)  # fmt: skip


@pytest.mark.parametrize("name", gpu_suite.SECTIONS)
def test_a_section_passes_at_tiny_sizes(name):
  section = gpu_suite.run_section(name, dry_run=True)
  assert section["passed"], section


@pytest.mark.nightly
def test_the_dry_run_passes_every_section(repo_root, tmp_path, plain_env):
  process = subprocess.run(
    ["bash", "benchmarks/gpu_suite.sh", "--dry-run"],
    env={**plain_env, "OUT": str(tmp_path), "PYTHON": sys.executable},
    cwd=repo_root,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stdout + process.stderr[-3000:]
  report = json.loads((tmp_path / "gpu_suite_dry_run.json").read_text("utf-8"))
  assert report["dry_run"] and report["device"] == "cpu"
  assert report["sections"].keys() == gpu_suite.SECTIONS.keys()
  assert all(section["passed"] for section in report["sections"].values())
  assert report["torch_over_jax"].keys() == set(gpu_suite.WORKLOADS)
  assert report["sections"]["training"]["last_loss"] < report["sections"]["training"]["first_loss"]


def test_it_needs_nothing_that_a_gpu_machine_lacks(repo_root, plain_env):
  modules = ["gpu_correctness", "llm_jax", "gpu_training", "gpu_suite"]
  block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in ABSENT_THERE)
  code = block + "".join(f"import benchmarks.{name}\n" for name in modules)
  subprocess.run([sys.executable, "-c", code], env=plain_env, cwd=repo_root, check=True)


def test_a_section_that_fails_is_recorded_and_the_others_run(monkeypatch, tmp_path, capsys):
  def spawn(name, dry_run):
    if name == "jax_7b":
      return {"passed": False, "error": "RuntimeError: out of memory"}
    return {"passed": True, "device": "cpu"}

  monkeypatch.setattr(gpu_suite, "spawn_section", spawn)
  monkeypatch.setattr(sys, "argv", ["gpu_suite", "--json", str(tmp_path / "out.json")])
  assert gpu_suite.main() == 1
  report = json.loads((tmp_path / "out.json").read_text("utf-8"))
  assert [name for name, s in report["sections"].items() if not s["passed"]] == ["jax_7b"]
  assert "out of memory" in capsys.readouterr().out


def test_an_error_in_a_section_becomes_its_result(monkeypatch):
  monkeypatch.setitem(gpu_suite.SECTIONS, "broken", ("benchmarks.no_such_module", 1))
  result = gpu_suite.run_section("broken", dry_run=True)
  assert not result["passed"] and "no_such_module" in result["error"]


def test_the_ratio_is_torch_over_jax_and_absent_without_both_sides():
  ours = {"forward": {"seconds": 1.0, "memory_gb": 10.0}, "decode": {"seconds": 1.0}}
  theirs = {"forward": {"seconds": 2.0, "memory_gb": 15.0}}
  assert gpu_suite.compare(ours, theirs) == {
    "forward": {"time_torch_over_jax": 2.0, "memory_torch_over_jax": 1.5}
  }


def test_the_sections_together_stay_below_ten_minutes():
  assert sum(limit for _, limit in gpu_suite.SECTIONS.values()) < 600
  assert FULL.llm.layers == 28 and FULL.llm.hidden_size == 3584
