"""The committed plans of `benchmarks.aot` reach the goals of the project."""

import json

import pytest

from benchmarks.provenance import RESULTS


def plan(name: str) -> dict:
  return json.loads((RESULTS / f"aot_{name}.json").read_text("utf-8"))


PLANS = sorted(file.stem.removeprefix("aot_") for file in RESULTS.glob("aot_*.json"))


@pytest.mark.parametrize("name", PLANS)
def test_a_tenth_of_the_memory_is_spare(name):
  assert plan(name)["hbm_gb_per_chip"] <= 0.9 * plan(name)["hbm_of_chip_gb"]


@pytest.mark.parametrize("name", [name for name in PLANS if not name.startswith("decode")])
def test_the_llm_is_never_gathered_in_one_piece(name):
  largest = plan(name).get("largest_gather", {"share_of_the_llm": 0})
  assert largest["share_of_the_llm"] < 0.1


@pytest.mark.parametrize("name", ["mooer_7b_v5p_8x8x8", "salmonn_13b_v5p_8x8x8"])
def test_estimated_mfu_on_512_chips(name):
  found = plan(name)["estimate"]
  assert found["means"].startswith("an estimate, not a measurement")
  assert found["mfu"] >= found["mfu_without_overlap"] >= 0.55


def test_4096_chips_take_at_most_twice_the_compile_time_of_16():
  few, many = plan("mooer_7b_v5p_2x2x4"), plan("mooer_7b_v5p_16x16x16")
  assert (few["chips"], many["chips"]) == (16, 4096)
  assert few["batch"] | {"rows": 0} == many["batch"] | {"rows": 0}
  assert many["compile_cpu_seconds"] <= 2 * few["compile_cpu_seconds"]
