"""Memory, FLOPs, collectives and estimated time of a config's programs on TPUs, without TPUs.

  python -m benchmarks.aot --config=configs/mooer_7b.py --topology=v5e:4x4 --json out/aot.json
  python -m benchmarks.aot --config=configs/mooer_7b.py --topology=v5e:4x4 --slices=2 \
    --config.mesh.data=2 --config.data.batch_size=512
  python -m benchmarks.aot --config=configs/salmonn.py:7b,1 --topology=v5e:4x4
  python -m benchmarks.aot --program=decode --config=configs/mooer_7b.py --topology=v5e:2x2 \\
    --config.mesh.fsdp=1 --config.mesh.tensor=4 --num_beams=4

The compiler for TPUs comes with the package libtpu (Linux on x86_64); no chip is used.
`--config.key=value` overrides values of the config, as for train.py and eval.py.
"""

import dataclasses
import time
from pathlib import Path

from benchmarks.chips import MEMORY, kernels_of, memory_of, memory_table, topology_devices  # isort: skip  (before jax)

import jax
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from benchmarks import aot_decode, flops, roofline
from benchmarks.hlo import Program
from benchmarks.provenance import MODEL, versions, write_result
from mooer_jax import tree
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.batches import Batcher
from mooer_jax.run.config import Run
from mooer_jax.run.process import run_program
from mooer_jax.run.start import trained_patterns, vocoder_of
from mooer_jax.sharding import make_mesh
from mooer_jax.speech_llm import Batch
from mooer_jax.training.program import abstract_state, jitted_step

_PROGRAM = flags.DEFINE_enum("program", "train", ["train", "decode"], "train step, or generation")
_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "chips and their arrangement")
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of this topology; mesh.data splits them")
_JSON = flags.DEFINE_string("json", None, "file to write")
_PROMPT = flags.DEFINE_integer(
  "prompt_tokens", None, "text tokens in the prompt; default: an estimate for the longest"
)
_NUM_BEAMS = flags.DEFINE_integer(
  "num_beams", None, "number of beams of --program=decode; default: generation.num_beams"
)

SOURCES = (*MODEL, "benchmarks/aot.py", "benchmarks/chips.py", "mooer_jax/sharding.py")
SOURCES_OF = {
  "train": (
    *SOURCES,
    "benchmarks/flops.py",
    "benchmarks/hlo.py",
    "benchmarks/roofline.py",
    "benchmarks/traffic.py",
    "mooer_jax/training",
  ),
  "decode": (*SOURCES, "benchmarks/aot_decode.py", "mooer_jax/generation"),
}


def prompt_tokens(run: Run) -> int:
  """Text tokens of the longest prompt: 26 for MooER's ASR prompt with Qwen2's tokenizer.

  Prompts with questions are padded, and up to 8 tokens precede the speech (Vicuna's template with
  SALMONN's prompts).
  """
  return 8 + run.data.prompt_tokens if run.data.prompt_tokens else 26


def compile_step(run: Run, topology: str, *, prompt: int, slices: int = 1) -> dict:
  """Compile the step that `train.py` would run, for a batch in the longest buckets.

  `prompt` is the number of text tokens in the prompt. Returns the content of the JSON file.
  """
  run.check_features()
  devices = topology_devices(topology, slices)
  mesh = make_mesh(**dataclasses.asdict(run.mesh), devices=devices)
  options = {"trainable": trained_patterns(run), "mesh": mesh, "vocoder": vocoder_of(run)}
  (state, frozen), _ = abstract_state(run.model, run.optimizer, **options)
  # The prompt costs the same on either side of the speech.
  batcher = Batcher(
    run.data,
    run.model,
    (0, prompt),
    encoded=bool(run.data.cache_features),
    targets=options["vocoder"] is not None,
  )
  batch = batcher.shapes()[0]
  micro_batches = run.train.gradient_accumulation_steps

  def trace(model):
    step = jitted_step(model, run.optimizer, accumulation=micro_batches, **options)
    return step.trace(state, frozen, batch)

  start = time.perf_counter()
  model = run.model.with_compute(platform="tpu")
  lowered = trace(model).lower()
  lowered_at, cpu_before = time.perf_counter(), time.process_time()
  compiled = lowered.compile()
  compiled_at, cpu_seconds = time.perf_counter(), time.process_time() - cpu_before
  # Counted without kernels: a kernel's body is traced once, whatever its grid.
  counted = flops.traced(trace(model.with_compute(attention="xla")).jaxpr)
  needed = flops.traced(trace(model.with_compute(attention="xla", remat="none")).jaxpr)
  chips, memory, kind = len(devices), memory_of(compiled), devices[0].device_kind
  params = tree.merge(state.trainable, frozen)
  of_chip = MEMORY[kind].gib if kind in MEMORY else None
  return {
    "topology": topology,
    "slices": slices,
    "chip": kind,
    "chips": chips,
    "mesh": dict(mesh.shape),
    "batch": {
      "rows": run.data.batch_size,
      "micro_batches": micro_batches,
      "rows_per_chip_and_micro_batch": run.data.batch_size
      / (micro_batches * mesh.shape["data"] * mesh.shape["fsdp"]),
      **_lengths(batch, run.model),
      "prompt_tokens": prompt,
      "answer_tokens": run.data.answer_buckets[-1],
    },
    "parameters": {
      name: sum(leaf.size for leaf in tree.flatten(params).values())
      for name, params in (("trainable", state.trainable), ("frozen", frozen))
    },
    "compute": dataclasses.asdict(model.compute),
    "kernels": kernels_of(compiled),
    "hbm_gb_per_chip": memory["peak"],
    "gb_means": "2**30 bytes; everything that is in use at once, as XLA planned it",
    "hbm_of_chip_gb": of_chip,
    "hbm_spare_share": round(1 - memory["peak"] / of_chip, 3) if of_chip else None,
    "memory_gb_per_chip": memory,
    "flops_per_chip": counted / chips,
    "flops_per_chip_means": (
      "matrix products and convolutions of one optimizer step as traced, recomputation included,"
      " loop bodies once per iteration, divided by the chips"
    ),
    "flops_needed_per_chip": needed / chips,
    "flops_needed_means": "the same without recomputation",
    "xla_flops_per_chip_loops_once": (compiled.cost_analysis() or {}).get("flops"),
    **roofline.estimate(
      Program(compiled.as_text()),
      list(mesh.devices.flat),
      slices=slices,
      flops=counted / chips,
      flops_needed=needed / chips,
      llm_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["decoder"])),
    ),
    "trace_and_lower_seconds": round(lowered_at - start, 1),
    "compile_seconds": round(compiled_at - lowered_at, 1),
    "compile_cpu_seconds": round(cpu_seconds, 1),
  }


def _lengths(batch: Batch, model: SpeechLLMConfig) -> dict[str, int]:
  """Frames of a batch for every encoder; with waveforms also their samples."""
  sizes = [x.shape[1] for x in batch.features]
  names = [f"{encoder.kind}_frames" for encoder in model.encoders]
  if not batch.has_waveforms:
    return dict(zip(names, sizes, strict=True))
  frames = [frontend.num_frames(sizes[0]) for frontend in model.frontends]
  return {"samples": sizes[0], **dict(zip(names, frames, strict=True))}


def table(result: dict) -> Table:
  rows = memory_table("train step", result)
  rows.add_row("FLOPs a step, recomputation included", f"{result['flops_per_chip']:.3e}")
  rows.add_row("FLOPs a step, without recomputation", f"{result['flops_needed_per_chip']:.3e}")
  roofline.add_rows(rows, result)
  seconds, of_cpu = result["compile_seconds"], result["compile_cpu_seconds"]
  rows.add_row("compile time", f"{seconds:.1f} s ({of_cpu:.1f} s of CPU)")
  return rows


def main():
  run = Run.read(_CONFIG.value)
  prompt = prompt_tokens(run) if _PROMPT.value is None else _PROMPT.value
  if _PROGRAM.value == "decode":
    if _SLICES.value > 1:
      raise app.UsageError("--slices has no effect with --program=decode: each slice decodes alone")
    result = aot_decode.compile_decode(
      run, _TOPOLOGY.value, prompt=prompt, num_beams=_NUM_BEAMS.value
    )
    rows = aot_decode.table(result)
  else:
    if _NUM_BEAMS.value is not None:
      raise app.UsageError("--num_beams has no effect without --program=decode")
    result = compile_step(run, _TOPOLOGY.value, prompt=prompt, slices=_SLICES.value)
    rows = table(result)
  result["versions"] = versions("jax", "jaxlib", "libtpu", "flax", "optax")
  Console().print(rows)
  if _JSON.value:
    config = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    write_result(Path(_JSON.value), result, (*SOURCES_OF[_PROGRAM.value], config))


if __name__ == "__main__":
  run_program(main, needs=["config"])
