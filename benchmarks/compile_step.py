"""Compile the train step of a run for TPU chips, without the chips."""

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
# Memory of one chip in GiB, of which the compiler reserves a little.
HBM_GIB = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v4": 32, "TPU v6 lite": 32}


def topology_devices(name: str):
  """Return the chips of a named topology, such as "v5e:4x4".

  Raises:
    ValueError: for an unknown name.
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
  """Shapes of a batch in the longest buckets, with `prompt` text tokens in the prompt."""
  lengths = (0, prompt)  # on either side of the speech they cost the same
  return Batcher(run.data, run.model, lengths, encoded=bool(run.data.cache_features)).shapes()[0]


def prompt_tokens(run: Run) -> int:
  """Text tokens of the longest prompt: 26 for MooER's ASR prompt with Qwen2's tokenizer.

  Prompts with questions are padded, and up to 8 tokens precede the speech (Vicuna's template with
  SALMONN's prompts).
  """
  return 8 + run.data.prompt_tokens if run.data.prompt_tokens else 26


def compile_step(run: Run, topology: str, *, prompt: int) -> dict:
  """Compile the step that `train.py` would run.

  Args:
    run: the config.
    topology: name of the chips and their arrangement.
    prompt: number of text tokens in the prompt.

  Returns:
    The content of the JSON file; memory is that of one chip.
  """
  devices = topology_devices(topology)
  mesh = make_mesh(**dataclasses.asdict(run.mesh), devices=devices)
  (state, frozen), shardings = abstract_state(
    run.model, run.optimizer, trainable=run.trainable, mesh=mesh
  )
  batch = largest_batch(run, prompt)

  def trace(model):
    accumulation = run.train.gradient_accumulation_steps
    step = jitted_step(
      model, run.optimizer, accumulation=accumulation, mesh=mesh, shardings=shardings
    )
    return step.trace(state, frozen, batch)

  start = time.perf_counter()
  traced = trace(run.model)
  lowered = traced.lower()
  seconds = {"trace_and_lower_seconds": time.perf_counter() - start}
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds["compile_seconds"] = time.perf_counter() - start
  chips = len(devices)
  # Counted without kernels: a kernel's body is traced once, whatever its grid.
  counted = flops.traced(trace(run.model.with_compute(attention="xla")).jaxpr)
  needed = flops.traced(trace(run.model.with_compute(attention="xla", remat="none")).jaxpr)
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
    "gb_means": "2**30 bytes; everything that is in use at once, as XLA planned it",
    "hbm_of_chip_gb": HBM_GIB.get(kind),
    "memory_gb_per_chip": memory,
    "flops_per_chip": counted / chips,
    "flops_per_chip_means": (
      "matrix products and convolutions of one optimizer step as traced, recomputation included,"
      " loop bodies once per iteration, divided by the chips"
    ),
    "flops_needed_per_chip": needed / chips,
    "flops_needed_means": "the same without recomputation",
    "xla_flops_per_chip_loops_once": (compiled.cost_analysis() or {}).get("flops"),
    **{name: round(value, 1) for name, value in seconds.items()},
  }


def memory_of(compiled) -> dict[str, float]:
  """XLA's memory plan for one chip in GiB; peak = everything that is in use at once."""
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
