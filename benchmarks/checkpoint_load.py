"""Time of loading a checkpoint with and without the check of its SHA-256 sums.

    python -m benchmarks.checkpoint_load --json out/checkpoint_load.json

Each load runs in its own process, alternately with and without the check.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.convert_7b import forget
from benchmarks.provenance import versions, write_result
from mooer_jax import checkpoint
from mooer_jax.text.tokenizer import Tokenizer

SOURCES = ("benchmarks/checkpoint_load.py", "mooer_jax/checkpoint")
KINDS = ("checked", "unchecked")
LEAF_BYTES = 25 * 10**6
PROGRAM = """
import sys, time, jax
from mooer_jax import checkpoint
from mooer_jax.checkpoint import sums
if sys.argv[2] == "unchecked":
  sums.check = lambda *args: None
jax.devices()
start = time.perf_counter()
jax.block_until_ready(checkpoint.load(sys.argv[1]).params)
print(time.perf_counter() - start)
"""


def save_random(folder: Path, megabytes: int) -> None:
  """Save a checkpoint of random float32 matrices."""
  rng = np.random.default_rng(0)
  count = -(-megabytes * 10**6 // LEAF_BYTES)
  params = {f"leaf{i}": rng.random((LEAF_BYTES // 4000, 1000), np.float32) for i in range(count)}
  tokenizer = Tokenizer.from_characters("a").save
  checkpoint.save(folder, params=params, config_json={}, tokenizer=tokenizer, generation={})


def seconds_to_load(folder: Path, kind: str) -> float:
  command = [sys.executable, "-c", PROGRAM, folder, kind]
  return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--megabytes", type=int, default=300, help="default: 300")
  parser.add_argument("--repeats", type=int, default=5, help="default: 5")
  parser.add_argument("--dir", help="folder for the checkpoint; default: a temporary one")
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  result: dict = {"megabytes": args.megabytes, "versions": versions("jax", "orbax-checkpoint")}
  with tempfile.TemporaryDirectory(dir=args.dir) as parent:
    folder = Path(parent) / "checkpoint"
    save_random(folder, args.megabytes)
    for cache in ("cold", "warm"):
      times: dict[str, list[float]] = {kind: [] for kind in KINDS}
      for _ in range(args.repeats):
        for kind in KINDS:
          if cache == "cold":
            forget(folder)
          times[kind].append(seconds_to_load(folder, kind))
      checked, unchecked = (statistics.median(times[kind]) for kind in KINDS)
      row = {"checked_s": checked, "unchecked_s": unchecked, "ratio": checked / unchecked}
      print(f"{cache} page cache:", ", ".join(f"{name} {x:.2f}" for name, x in row.items()))
      result[f"{cache}_page_cache"] = row
  write_result(args.json, result, SOURCES)


if __name__ == "__main__":
  main()
