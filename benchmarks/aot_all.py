"""All plans of `benchmarks.aot` in the README, one after another.

    python -m benchmarks.aot_all           # hours on 2 CPU cores; may be interrupted and repeated
    python -m benchmarks.aot_all --list    # what is to do

A plan whose result was made by the same command from unchanged code is skipped.
"""

import argparse
import json
import shlex
import subprocess
import sys

from benchmarks.provenance import RESULTS, ROOT, changed_sources

MOOER = "--config=configs/mooer_7b.py"
SALMONN = "--config=configs/salmonn.py:13b,2"
ONE_MICRO_BATCH = "--config.train.gradient_accumulation_steps=1"
KEEP_PRODUCTS = "--config.compute.remat=dots"  # with 95 GiB, there is room for them


def rows(count: int) -> tuple[str, str]:
  """Options for the rows of a step."""
  return f"--config.data.batch_size={count}", f"--config.data.shuffle_buffer_size={count}"


def mesh(**sizes: int) -> tuple[str, ...]:
  return tuple(f"--config.mesh.{axis}={size}" for axis, size in sizes.items())


PLANS: dict[str, tuple[str, ...]] = {
  "mooer_7b_v5e_4x4": (MOOER, "--topology=v5e:4x4"),
  "mooer_7b_v5p_8x8x8": (
    MOOER, "--topology=v5p:8x8x8", *mesh(data=8, fsdp=64), *rows(2048), ONE_MICRO_BATCH,
    KEEP_PRODUCTS,
  ),
  "salmonn_13b_v5e_4x4": (SALMONN, "--topology=v5e:4x4"),
  "mooer_7b_2_x_v5e_4x4": (
    MOOER, "--topology=v5e:4x4", "--slices=2", *mesh(data=2, fsdp=16), *rows(512),
  ),
  "mooer_7b_v5p_16x16x16": (
    MOOER, "--topology=v5p:16x16x16", *mesh(data=16, fsdp=256), *rows(16384), ONE_MICRO_BATCH,
  ),
  "salmonn_13b_3_v5e_4x4": ("--config=configs/salmonn_activation.py:13b", "--topology=v5e:4x4"),
  "mooer_7b_v5e_16x16": (MOOER, "--topology=v5e:16x16", *rows(4096)),
  "mooer_7b_v6e_16x16": (MOOER, "--topology=v6e:16x16", *rows(4096), ONE_MICRO_BATCH),
  "salmonn_13b_v5p_8x8x8": (
    SALMONN, "--topology=v5p:8x8x8", *mesh(data=8, fsdp=64), *rows(2048), KEEP_PRODUCTS,
  ),
  "salmonn_13b_v5p_16x16x16": (
    SALMONN, "--topology=v5p:16x16x16", *mesh(data=16, fsdp=256), *rows(16384), KEEP_PRODUCTS,
  ),
  "salmonn_13b_v6e_16x16": (SALMONN, "--topology=v6e:16x16", *rows(1024)),
  "salmonn_13b_v5e_16x16": (SALMONN, "--topology=v5e:16x16", *rows(1024)),
  # Beside v5p_16x16x16: compile time on 16 and on 4,096 chips, with as many rows on each.
  "mooer_7b_v5p_2x2x4": (MOOER, "--topology=v5p:2x2x4", *rows(64), ONE_MICRO_BATCH),
  "mooer_7b_v5p_8x8x8_data": (
    MOOER, "--topology=v5p:8x8x8", *mesh(data=512, fsdp=1), *rows(2048), ONE_MICRO_BATCH,
  ),
  "salmonn_7b_v5e_4x4": ("--config=configs/salmonn.py:7b,1", "--topology=v5e:4x4"),
  "mooer_omni_v5e_4x4": ("--config=configs/mooer_omni.py:3", "--topology=v5e:4x4"),
  "decode_mooer_omni_v5e_2x2": (
    "--program=decode", "--config=configs/mooer_omni.py:3", "--topology=v5e:2x2",
    *mesh(fsdp=1, tensor=4), "--num_beams=4",
  ),
  "decode_mooer_7b_v5e_2x2": (
    "--program=decode", MOOER, "--topology=v5e:2x2", *mesh(fsdp=1, tensor=4), "--num_beams=4",
  ),
  "decode_salmonn_13b_v5e_2x4": (
    "--program=decode", SALMONN, "--topology=v5e:2x4",
    *mesh(data=2, fsdp=1, tensor=4), "--num_beams=4",
  ),
}  # fmt: skip


def command(name: str) -> list[str]:
  json_file = RESULTS.relative_to(ROOT) / f"aot_{name}.json"
  return ["-m", "benchmarks.aot", *PLANS[name], "--json", json_file.as_posix()]


def is_current(name: str) -> bool:
  file = RESULTS / f"aot_{name}.json"
  if not file.exists():
    return False
  about = json.loads(file.read_text("utf-8"))["provenance"]
  return about["command"] == shlex.join(["python", *command(name)]) and not changed_sources(about)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--list", action="store_true", help="print the plans that are to do, only")
  parser.add_argument("names", nargs="*", metavar="NAME", help="plans to make; default: all")
  args = parser.parse_args()
  if unknown := set(args.names) - PLANS.keys():
    parser.error(f"unknown plans: {', '.join(sorted(unknown))}; choose from {', '.join(PLANS)}")
  failed = []
  for name in args.names or PLANS:
    if is_current(name):
      continue
    print(name, flush=True)
    if not args.list and subprocess.run([sys.executable, *command(name)], cwd=ROOT).returncode:
      failed.append(name)
  if failed:
    print(f"failed: {', '.join(failed)}", file=sys.stderr)
  return bool(failed)


if __name__ == "__main__":
  sys.exit(main())
