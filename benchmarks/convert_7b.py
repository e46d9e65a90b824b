"""Memory and time of import and export of a full-size Qwen2-7B folder with random weights.

    python -m benchmarks.convert_7b --dir /fast/disk --json convert.json

Needs 30.4 GB of disk below --dir, and removes all files at the end. The reference is `cp` of the
same files; all start from a cold page cache.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.provenance import write_result
from convert.core.engine import Outgoing, natural
from convert.core.folders import write_json
from convert.core.writers import write_shards
from convert.parts.hf_config import hf_config
from convert.parts.language_model import TABLE, shapes
from mooer_jax.checkpoint.sums import hash_file
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.text.tokenizer import Tokenizer

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SOURCES = (
  "benchmarks/convert_7b.py",
  "convert/core",
  "convert/exporting.py",
  "convert/importing.py",
  "convert/parts/language_model.py",
  "convert/readers",
  "mooer_jax/checkpoint",
)
SHARD_BYTES = 4 * 10**9  # as in the published folder
# Runs in its own process, so that the peak memory is that of the conversion alone.
PROGRAM = """
import re, sys
def status(name):
  return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e6
start = status("VmRSS")
from convert.main import main
code = main(sys.argv[1:])
print("MEMORY", start, status("VmHWM"))
sys.exit(code)
"""


def write_folder(folder: Path, config: LLMConfig) -> int:
  """Write a Hugging Face folder with random bfloat16 weights; returns its bytes."""
  folder.mkdir(parents=True)
  tensors = []
  for path, shape in shapes(config).items():
    name, transform = TABLE.to_torch(path)
    tensors.append(Outgoing(name, transform.torch_shape(shape), BFLOAT16, path, transform))
  tensors.sort(key=lambda tensor: natural(tensor.name))
  bits = np.random.default_rng(0).integers(0, 2**64, 2**23, np.uint64).view(np.uint16)
  bits &= 0xBFFF  # no exponent of ones: every value is finite

  def arrays():
    for number, tensor in enumerate(tensors):
      values = np.resize(bits[number:], int(np.prod(tensor.shape)))
      yield values.view(BFLOAT16).reshape(tensor.shape)

  write_json(folder / "config.json", hf_config(config, BFLOAT16))
  Tokenizer.from_characters("a").save(folder)  # an import needs one
  write_shards(folder, tensors, arrays(), shard_bytes=SHARD_BYTES)
  return sum(tensor.nbytes for tensor in tensors)


def forget(folder: Path) -> None:
  """Drop the files of a folder from the page cache."""
  os.sync()
  for file in folder.rglob("*"):
    if file.is_file():
      with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_convert(*args: str) -> dict[str, float]:
  """Run `convert` and return seconds, and peak memory over the interpreter's start in GB."""
  begin = time.perf_counter()
  command = [sys.executable, "-c", PROGRAM, *args]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  seconds = time.perf_counter() - begin
  start, peak = map(float, done.stdout.rsplit("MEMORY", 1)[1].split())
  return {"seconds": seconds, "peak_gb": peak - start}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--dir", type=Path, help="folder for the files; default: a temporary folder")
  parser.add_argument("--layers", type=int, default=28, help="number of layers (default: 28)")
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  config = dataclasses.replace(LLMConfig.SIZES["qwen2_7b"], layers=args.layers)
  with tempfile.TemporaryDirectory(prefix="convert_7b_", dir=args.dir) as work:
    source, ours, back = (Path(work) / name for name in ("hf", "ours", "back"))
    total = write_folder(source, config)
    rows: dict[str, dict[str, float]] = {}
    forget(source)
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, back], check=True)
    rows["cp"] = {"seconds": time.perf_counter() - begin, "peak_gb": 0.0}
    shutil.rmtree(back)
    forget(source)
    rows["import"] = run_convert("import", "qwen2", str(source), str(ours))
    original = {file.name: hash_file(file) for file in source.glob("*.safetensors")}
    shutil.rmtree(source)  # so that the disk never holds three copies
    forget(ours)
    rows["export"] = run_convert(
      "export", "qwen2", str(ours), str(back), "--shard-size", f"{SHARD_BYTES // 10**9}GB"
    )
    exported = {file.name: hash_file(file) for file in back.glob("*.safetensors")}
  identical = exported == original
  print(f"Qwen2-7B, {args.layers} layers, bfloat16: {total / 1e9:.1f} GB")
  print(f"{'':8}{'seconds':>10}{'times cp':>10}{'peak GB over start':>20}")
  for name, row in rows.items():
    ratio = row["seconds"] / rows["cp"]["seconds"]
    print(f"{name:8}{row['seconds']:10.1f}{ratio:10.2f}{row['peak_gb']:20.2f}")
  print(f"the exported files are {'the same' if identical else 'NOT the same'} byte for byte")
  write_result(args.json, {"bytes": total, "identical": identical, **rows}, SOURCES)
  return 0 if identical else 1


if __name__ == "__main__":
  sys.exit(main())
