"""The tables of benchmarks/README.md, from the JSON in benchmarks/results.

    python -m benchmarks.tables            # writes them into the README
    python -m benchmarks.tables --check    # status 1 if the README differs

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`. A row whose result is older
than the code that it describes is marked with †.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS, changed_sources

README = Path(__file__).parent / "README.md"
STALE = " †"
_LEGEND = (
  "† older than the code that it describes; `python -m benchmarks.provenance` has the commands."
)


def _load(pattern: str) -> list[dict[str, Any]]:
  return [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob(pattern))]


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
  lines = [[*header], ["---"] * len([*header]), *([*map(str, row)] for row in rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _made(result: dict[str, Any]) -> str:
  """Date and commit of a result, with a mark if its code has changed."""
  about = result["provenance"]
  mark = STALE if changed_sources(about) else ""
  return f"{about['date']}, {(about['commit'] or 'unknown')[:7]}{mark}"


def _config(result: dict[str, Any]) -> str:
  """The config that a command names, with the overrides of mesh and data."""
  words = result["provenance"]["command"].split()
  named = next(word.partition("=")[2] for word in words if word.startswith("--config="))
  return f"`{named.removeprefix('configs/')}`"


def _chips(result: dict[str, Any]) -> str:
  slices = result.get("slices", 1)
  of_slice = f"{result['chips'] // slices:,} x {result['chip']}"
  return of_slice if slices == 1 else f"{slices} slices of {of_slice}"


def _plans(header: Iterable[str], columns: Callable[[dict], Iterable], pattern: str) -> str:
  """A table of plans for TPUs: what all have, and columns of their own before the last one.

  Plans without the figures of a column, from an earlier version, are left out.
  """
  plans = [r for r in _load(pattern) if ("decode_step" in r) == ("decode" in pattern)]
  first = "config", "chips", "mesh: data x fsdp x tensor"
  rows = []
  for r in plans:
    try:
      own = [*columns(r)]
    except KeyError:
      continue
    mesh = " x ".join(str(size) for size in r["mesh"].values())
    rows.append((_config(r), _chips(r), mesh, *own, _made(r)))
  return _table((*first, *header, "made"), rows)


def _memory(result: dict[str, Any]) -> tuple[str, str]:
  return f"{result['hbm_gb_per_chip']:.2f} GiB", f"{result['hbm_of_chip_gb']} GiB"


def aot_train() -> str:
  def columns(r):
    batch, memory = r["batch"], r["hbm_gb_per_chip"]
    rows = f"{batch['rows']:,}"
    if batch["micro_batches"] > 1:
      rows += f" in {batch['micro_batches']}"
    frames = " + ".join(str(size) for name, size in batch.items() if name.endswith("_frames"))
    tokens = f"{batch['prompt_tokens']} + {batch['answer_tokens']}"
    spare = f"{1 - memory / r['hbm_of_chip_gb']:.0%}"
    seconds = f"{r['compile_cpu_seconds']:.0f} s ({r['compile_seconds']:,.0f} s)"
    return *_memory(r), spare, rows, frames, tokens, r["compute"]["remat"], seconds

  header = ("memory per chip", "of", "spare", "rows, micro-batches", "frames",
            "tokens of prompt + answer", "remat", "compile time of CPU (wall)")  # fmt: skip
  return _plans(header, columns, "aot_*.json")


def aot_estimate() -> str:
  """Collectives and estimated time of the train steps."""
  kinds = {"all-gather": "gathers", "all-reduce": "sums", "reduce-scatter": "sums",
           "all-to-all": "exchanges", "collective-permute": "permutes"}  # fmt: skip

  def columns(r):
    found, moved = r["estimate"], dict.fromkeys(kinds.values(), 0.0)
    for kind, row in r["collectives"].items():
      moved[kinds[kind]] += row["bytes"] / 1e9
    between = sum(row["bytes"] for row in r["between_slices"].values()) / 1e9
    largest = r.get("largest_gather", {"bytes": 0, "share_of_the_llm": 0})
    seconds = found["seconds"]
    return (
      ", ".join(f"{name} {size:.3g}" for name, size in moved.items() if size >= 0.05)
      or "under 0.1",
      f"{between:.2g}" if between else "",
      f"{largest['bytes'] / 1e9:.2g} GB, {largest['share_of_the_llm']:.1%}",
      f"{r['hbm_bytes_per_chip'] / 1e9:,.0f}",
      " / ".join(f"{1e3 * seconds[name]:,.0f}" for name in ("compute", "HBM", "ICI", "DCN")),
      found["slowest"],
      f"{found['mfu']:.0%}",
      f"{found['mfu_without_overlap']:.0%}",
    )

  header = ("received per chip, GB", "between slices, GB", "largest gather, of the LLM",
            "HBM traffic, GB", "compute / HBM / ICI / DCN, ms", "slowest",
            "MFU, estimate: time of the slowest", "networks not overlapped")  # fmt: skip
  return _plans(header, columns, "aot_*.json")


def aot_decode() -> str:
  def columns(r):
    step, batch = r["decode_step"], r["batch"]
    read = step["weights_bytes_per_chip"] + step["cache_bytes_per_chip"]
    least_ms = 1e3 * batch["rows"] / step["tokens_per_s_at_full_bandwidth"]
    clips = f"{batch['rows']} x {batch['num_beams']}"
    return *_memory(r), clips, f"{read / 1e9:.2f} GB", f"{least_ms:.1f} ms"

  header = "memory per chip", "of", "clips x beams", "a step reads, per chip", "and takes at least"
  return _plans(header, columns, "aot_decode_*.json")


def speed() -> str:
  header = ("clips x beams", "our LLM", "whole pipeline", "to the first token",
            "memory, ours and PyTorch", "first call less a later one, ours", "made")  # fmt: skip
  rows = [
    (
      case,
      {"none": "float32"}.get(r["quantization"], r["quantization"]),
      f"{found['ratios']['whole']:.2f}",
      f"{found['ratios']['to the first token']:.2f}",
      f"{found['mooer_jax']['peak_gb_so_far']} and {found['pytorch']['peak_gb_so_far']} GB",
      f"{found['mooer_jax']['compile_s']:.1f} s",
      _made(r),
    )
    for r in _load("speed*.json")
    for case, found in r["cases"].items()
  ]
  return _table(header, rows)


def vocoder() -> str:
  rows = [
    (name, case["states"], f"{case['ratio']:.2f}", f"{case['largest_difference']:.0e}", _made(r))
    for r in _load("vocoder.json")
    for name, case in r["cases"].items()
  ]
  header = "audio", "states a row", "speed, PyTorch = 1", "largest difference of a sample", "made"
  return _table(header, rows)


def cpu_products() -> str:
  header = ("cores", "rows", "weights", "speed, PyTorch float32 = 1",
            "matrices converted to float32", "largest error, in std", "made")  # fmt: skip
  rows = [
    (r["cores"], number, name, f"{row['speed']:.2f}",
     f"{row['matrices_converted']} of {r['sizes']['matrices']}", f"{row['relative_error']:.1e}",
     _made(r))
    for r in _load("cpu_products*.json")
    for number, found in r["rows"].items()
    for name, row in found.items()
  ]  # fmt: skip
  return _table(header, rows)


def train_speed() -> str:
  stages = "forward", "forward and backward", "whole step", "memory"
  rows = [
    (r["case"]["clips"], *(f"{r['ratios'][stage]:.2f}" for stage in stages), _made(r))
    for r in _load("train_speed*.json")
  ]
  return _table(("clips", *stages, "made"), rows)


def accuracy_text() -> str:
  header = ("", "perplexity", "mean KL, nats", "same tokens, given the text",
            "same tokens, generated", "word error rate", "made")  # fmt: skip
  rows = [
    (row["name"], f"{row['perplexity']:.3f}", f"{row['mean_kl']:.1e}", f"{row['agreement']:.1%}",
     f"{row['generated']['same_tokens']:.1%}", f"{row['generated']['word_error_rate']:.1%}",
     _made(r))
    for r in _load("accuracy_text.json")
    for row in r["cases"]
  ]  # fmt: skip
  return _table(header, rows)


def convert_7b() -> str:
  [r] = _load("convert_7b.json")
  rows = [
    (name, f"{r[key]['seconds'] / r['cp']['seconds']:.2f}",
     f"{r[key]['peak_gb']:.2f}" if key != "cp" else "", _made(r))
    for key, name in (("cp", "`cp` of the same files"), ("import", "import"), ("export", "export"))
  ]  # fmt: skip
  return _table(("", "time relative to `cp`", "peak, GB", "made"), rows)


def loss() -> str:
  [r] = _load("loss.json")
  planned, timed = (
    f"{x['rows']} x {x['tokens']} tokens, {x['size']}, {x['dtype']}"
    for x in (r["planned"], r["timed"])
  )
  ratios = {"blocks": f"{r['time_of_blocks_relative_to_whole']:.2f}", "whole": "1"}
  names = {"blocks": "32 positions at a time", "whole": "all logits at once"}
  rows = [
    (name, f"{r['gib'][way]['temporaries']:.2f} GiB", ratios[way], _made(r))
    for way, name in names.items()
  ]
  header = "", f"memory on a v5e ({planned})", f"time on {r['device']} ({timed})", "made"
  return _table(header, rows)


def sanm_memory() -> str:
  [r] = _load("sanm_memory.json")
  rows = [
    (
      name,
      *(
        f"{found[count]['memory'] / unit:.3g} of {found[count]['layer'] / unit:.3g} {label}"
        f" ({found[count]['share']:.1%})"
        for count, unit, label in (("bytes", 1e6, "MB"), ("flops", 1e9, "GFLOP"))
      ),
      "yes" if found["fused_with_output_projection"] else "no",
      _made(r),
    )
    for name, found in ((name, r[name]) for name in ("forward", "forward and backward"))
  ]
  header = "bytes of the memory", "its operations", "in the fusion of the output projection"
  return _table((f"{r['rows']} x {r['frames']} frames, {r['chip']}", *header, "made"), rows)


def portable() -> str:
  [r] = _load("portable.json")
  rows = [
    (
      row["setting"],
      " ".join(f"`{key}={value}`" for key, value in row["variables"].items()) or "as users run it",
      f"{row['processor']} ({', '.join(row['instruction_sets'])})",
      f"{row['passed']} passed, {len(row['failures'])} failed",
      f"{row['date']}, {(row['commit'] or 'unknown')[:7]}",
    )
    for row in r["rows"]
  ]
  return _table(("setting", "variables", "processor", "tests", "made"), rows)


def data_speed() -> str:
  rows = [
    (
      name,
      f"{case['ratio']:.2f}",
      f"{case['mooer_jax']['times_real_time_of_cpu'] / case['goal']:.2f}",
      f"{case['hours']:.2g} h",
      _made(r),
    )
    for r in _load("data.json")
    for name, case in r["cases"].items()
  ]
  return _table(("shards", "speed relative to PyTorch", "to the goal", "audio", "made"), rows)


def data_padding() -> str:
  rows = [
    (count, f"{share:.1%}", _made(r))
    for r in _load("data.json")
    for count, share in r["padding"].items()
  ]
  return _table(("buckets", "padding in the frames", "made"), rows)


TABLES: dict[str, Callable[[], str]] = {
  function.__name__: function
  for function in (
    aot_train,
    aot_estimate,
    aot_decode,
    speed,
    vocoder,
    train_speed,
    cpu_products,
    accuracy_text,
    loss,
    convert_7b,
    sanm_memory,
    portable,
    data_speed,
    data_padding,
  )
}


def filled(text: str) -> str:
  """A README with its tables made anew."""

  def table(match: re.Match) -> str:
    made = TABLES[match[1]]()
    legend = f"\n\n{_LEGEND}" if STALE in made else ""
    return f"<!-- table: {match[1]} -->\n\n{made}{legend}\n\n<!-- end -->"

  return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--check", action="store_true", help="write nothing; status 1 if they differ")
  args = parser.parse_args()
  old = README.read_text("utf-8")
  new = filled(old)
  if args.check and new != old:
    print(f"{README.name}: the tables are not those of results/; run python -m benchmarks.tables")
    return 1
  if not args.check:
    README.write_text(new, "utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main())
