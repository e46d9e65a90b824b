"""Compiles a run's train step for TPU chips that are not there, and says what it takes."""

import dataclasses
import time

import jax
from jax.experimental import topologies

from benchmarks import flops
from mooer_jax import tree
from mooer_jax.data.batches import Batcher
from mooer_jax.run.config import Run
from mooer_jax.speech_llm import Batch
from mooer_jax.training.program import abstract_state, jitted_step
from mooer_jax.training.sharding import make_mesh

GIB = 2**30
# What one chip has, in GiB; the compiler keeps a little of it for itself.
HBM_GIB = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v4": 32, "TPU v6 lite": 32}


def topology_devices(name: str):
  """The chips of a named topology, such as "v5e:4x4".

  Raises:
    ValueError: if libtpu does not know the name.
  """
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except jax.errors.JaxRuntimeError as error:
    if "INVALID_ARGUMENT" not in str(error):
      raise
    raise ValueError(
      f"--topology={name}: {error}. Names are KIND:SHAPE, as in v5e:4x4, v6e:2x2, v5p:8x8x8"
    ) from error


def largest_batch(run: Run, prompt: int) -> Batch:
  """Shapes of a batch in the longest buckets, with so many tokens of text in the prompt."""
  lengths = (0, prompt)  # on either side of the speech they cost the same
  return Batcher(run.data, run.model, lengths, encoded=bool(run.data.cache_features)).shapes()[0]


def prompt_tokens(run: Run) -> int:
  """Text of the longest prompt: MooER's for ASR has 26 tokens of Qwen2.

  Prompts that may hold a question are padded, and a few tokens stand before the speech (of Vicuna's
  template with SALMONN's prompts 8).
  """
  return 8 + run.data.prompt_tokens if run.data.prompt_tokens else 26


def compile_step(run: Run, topology: str, *, prompt: int) -> dict:
  """Traces, lowers and compiles the step that `train.py` would run.

  Args:
    run: a config that was read.
    topology: name of the chips and their arrangement.
    prompt: tokens of the prompt's text.

  Returns:
    What goes into the JSON file; bytes are those of one chip.
  """
  devices = topology_devices(topology)
  mesh = make_mesh(**dataclasses.asdict(run.mesh), devices=devices)
  (state, frozen), shardings = abstract_state(
    run.model, run.optimizer, trainable=run.trainable, mesh=mesh
  )
  batch = largest_batch(run, prompt)
  step = jitted_step(
    run.model,
    run.optimizer,
    accumulation=run.train.gradient_accumulation_steps,
    mesh=mesh,
    shardings=shardings,
  )
  start = time.perf_counter()
  traced = step.trace(state, frozen, batch)
  lowered = traced.lower()
  seconds = {"trace_and_lower_seconds": time.perf_counter() - start}
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds["compile_seconds"] = time.perf_counter() - start
  chips = len(devices)
  counted = flops.traced(traced.jaxpr)
  needed = flops.train_step(run.model, batch)
  memory = memory_of(compiled)
  kind = devices[0].device_kind
  return {
    "topology": topology,
    "chip": kind,
    "chips": chips,
    "mesh": dict(mesh.shape),
    "batch": {
      "rows": run.data.batch_size,
      "micro_batches": run.train.gradient_accumulation_steps,
      "rows_per_chip_and_micro_batch": run.data.batch_size
      / (run.train.gradient_accumulation_steps * mesh.shape["data"] * mesh.shape["fsdp"]),
      **{
        f"{encoder.kind}_frames": features.shape[1]
        for encoder, features in zip(run.model.encoders, batch.features, strict=True)
      },
      "prompt_tokens": prompt,
      "answer_tokens": run.data.answer_buckets[-1],
    },
    "parameters": {
      "trainable": _elements(state.trainable),
      "frozen": _elements(frozen),
    },
    "compute": dataclasses.asdict(run.model.compute),
    "hbm_gb_per_chip": memory["peak"],
    "gb_means": "2**30 bytes; everything that is alive at once, as XLA planned it",
    "hbm_of_chip_gb": HBM_GIB.get(kind),
    "memory_gb_per_chip": memory,
    "flops_per_chip": counted / chips,
    "flops_per_chip_means": (
      "matrix products and convolutions of the traced step, rematerialisation included, loop bodies"
      " as often as they run, divided by the chips; one update"
    ),
    "flops_needed_per_chip": needed / chips,
    "flops_needed_means": "the same by hand, without rematerialisation; see benchmarks/flops.py",
    "xla_flops_per_chip_loops_once": (compiled.cost_analysis() or {}).get("flops"),
    **{name: round(value, 1) for name, value in seconds.items()},
  }


def memory_of(compiled) -> dict[str, float]:
  """GiB on one chip: what XLA planned for the program; peak = everything that is alive at once."""
  stats = compiled.memory_analysis()
  parts = {
    "arguments": stats.argument_size_in_bytes,
    "outputs": stats.output_size_in_bytes,
    "aliased": stats.alias_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "code": stats.generated_code_size_in_bytes,
  }
  alive = sum(parts.values()) - 2 * parts["aliased"]  # aliased outputs lie in their arguments
  return {name: round(size / GIB, 4) for name, size in {**parts, "peak": alive}.items()}


def _elements(params) -> int:
  return sum(leaf.size for leaf in tree.flatten(params).values())
