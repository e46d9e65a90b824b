"""`make portable`: which settings a machine has, and one parity test under the lowest of them."""

import json

import pytest

from tests import portable

HASWELL = "flags\t\t: fpu sse4_2 fma avx2\n"
XEON = HASWELL.replace(
  "avx2", "avx2 avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 amx_tile"
)


def _not_run(cpuinfo: str, cpus: int = 2) -> set[str]:
  machine = portable.Machine(portable.instruction_sets(cpuinfo), cpus)
  return {one.name for one in portable.settings_for(machine) if one.missing(machine)}


def test_settings_that_the_machine_lacks_are_known():
  avx512 = {"xla-avx512", "openblas-skylakex", "openblas-sapphirerapids", "aten-avx512"}
  assert _not_run(HASWELL) == avx512
  assert _not_run(XEON) == set()
  assert _not_run(XEON.replace(" amx_tile", "")) == {"openblas-sapphirerapids"}
  assert _not_run(XEON, cpus=1) == {"threads-2"}
  assert {"xla-sse4_2", "lowest", *avx512} <= _not_run("Features\t: fp asimd\n")  # Arm


def test_the_highest_setting_is_what_the_machine_has():
  def highest(cpuinfo: str) -> dict[str, str]:
    machine = portable.Machine(portable.instruction_sets(cpuinfo), cpus=2)
    return dict(portable.settings_for(machine)[-1].env)

  assert highest(HASWELL) == {
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "ATEN_CPU_CAPABILITY": "avx2",
    "OMP_NUM_THREADS": "2",
  }
  assert highest(XEON)["OPENBLAS_CORETYPE"] == "SapphireRapids"


@pytest.mark.nightly
def test_a_parity_test_passes_under_the_lowest_setting():
  *_, lowest, _ = portable.settings_for(portable.this_machine())
  assert lowest.name == "lowest"
  test = "tests/parity/test_sanm_parity.py::test_equals_funasr_at_real_widths[2-layers]"
  outcome = portable.run_tests(lowest, [test, "-n", "0", "-p", "no:cacheprovider"])
  assert outcome.status == 0 and str(outcome).startswith("1 passed, 0 failed"), outcome


def test_a_test_that_fails_is_counted_and_named(tmp_path):
  (tmp_path / "test_bad.py").write_text("def test_one():\n  assert False\n")
  outcome = portable.run_tests(portable.Setting("as it is"), [str(tmp_path), "-n", "0"])
  assert outcome.status == 1 and "0 passed, 1 failed" in str(outcome)
  assert "test_one" in outcome.failures[0] and outcome.failures[0] in str(outcome)


def test_results_of_a_setting_are_replaced_and_others_stay(tmp_path):
  file = tmp_path / "portable.json"
  machine = portable.Machine(frozenset(), 2, "a processor")
  for setting, passed in (("one", 3), ("two", 4), ("one", 5)):
    portable.record(
      file, machine, portable.Setting(setting), portable.Outcome(passed, [], 1.0, status=0)
    )
  rows = json.loads(file.read_text("utf-8"))["rows"]
  assert [(row["setting"], row["passed"]) for row in rows] == [("two", 4), ("one", 5)]
