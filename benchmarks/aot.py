"""Memory, FLOPs and compile time of a training config on TPU chips, computed on a CPU machine.

  python -m benchmarks.aot --config=configs/mooer_7b.py --topology=v5e:4x4 --json out/aot.json
  python -m benchmarks.aot --config=configs/salmonn.py:7b,1 --topology=v5e:4x4

The compiler for TPUs comes with the package libtpu (Linux on x86_64); no chip is used.
`--config.key=value` overrides values of the config, as for train.py.
"""

import os
from pathlib import Path

# Otherwise libtpu queries a cloud server for the chips of this machine, which takes seconds.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# It also locks the chips for one process, but there are none.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["JAX_PLATFORMS"] = "cpu"

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from benchmarks.compile_step import compile_step, prompt_tokens
from benchmarks.provenance import MODEL, versions, write_result
from mooer_jax.run.config import Run
from mooer_jax.run.process import run_program

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "chips and their arrangement")
_JSON = flags.DEFINE_string("json", None, "file to write")
_PROMPT = flags.DEFINE_integer(
  "prompt_tokens",
  None,
  "number of text tokens in the prompt; default: an estimate for the longest",
)


SOURCES = (
  *MODEL,
  "benchmarks/aot.py",
  "benchmarks/compile_step.py",
  "benchmarks/flops.py",
  "mooer_jax/training",
)


def table(result: dict) -> Table:
  rows = Table("", "one chip", title=f"train step on {result['chips']} x {result['chip']}")
  rows.add_row("mesh", " x ".join(f"{k} {v}" for k, v in result["mesh"].items()))
  rows.add_row("batch", ", ".join(f"{k} {v:g}" for k, v in result["batch"].items()))
  for name, value in result["memory_gb_per_chip"].items():
    rows.add_row(f"memory: {name}", f"{value:.3f} GiB")
  rows.add_row("memory of a chip", f"{result['hbm_of_chip_gb']} GiB")
  rows.add_row("FLOPs a step, recomputation included", f"{result['flops_per_chip']:.3e}")
  rows.add_row("FLOPs a step, without recomputation", f"{result['flops_needed_per_chip']:.3e}")
  rows.add_row("compile time", f"{result['compile_seconds']:.1f} s")
  return rows


def compile_config():
  """Compile the train step of the config in the flags."""
  run = Run.read(_CONFIG.value)
  prompt = prompt_tokens(run) if _PROMPT.value is None else _PROMPT.value
  result = compile_step(run, _TOPOLOGY.value, prompt=prompt)
  result["versions"] = versions("jax", "jaxlib", "libtpu", "flax", "optax")
  Console().print(table(result))
  if _JSON.value:
    config = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    write_result(Path(_JSON.value), result, (*SOURCES, config))


if __name__ == "__main__":
  run_program(compile_config, needs=["config"])
