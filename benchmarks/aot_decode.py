"""Generation compiled for TPU chips: memory, and the bytes that a decode step reads."""

import dataclasses
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

from benchmarks.chips import GIB, MEMORY, kernels_of, memory_of, memory_table, topology_devices
from mooer_jax import speech_llm, tree
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.batches import Batcher
from mooer_jax.generation import generate
from mooer_jax.generation.loading import merge_options
from mooer_jax.prompts import SPEECH_TASKS
from mooer_jax.run.config import Run
from mooer_jax.run.decoding import eval_data
from mooer_jax.sharding import (
  batch_sharding,
  cache_shardings,
  make_mesh,
  param_shardings,
  row_parts,
)
from mooer_jax.speech_llm import Batch, pad_rows

EOS = (0,)  # any token; the config has no tokenizer


def compile_decode(run: Run, topology: str, *, prompt: int, num_beams: int | None = None) -> dict:
  """Compile `generate` as `eval.py` would run it, for a batch of the longest clips.

  Prefill and decode loop are one program. A model with tasks of speech returns the hidden states of
  the tokens, for a vocoder. `prompt` is the number of text tokens in the prompt, `num_beams`
  overrides that of the config. Returns the content of the JSON file.
  """
  devices = topology_devices(topology)
  mesh = make_mesh(**dataclasses.asdict(run.mesh), devices=devices)
  decoder = dataclasses.replace(run.model.decoder, lora_rank=0)
  compute = dataclasses.replace(run.compute, platform="tpu")
  model = run.model.replace(compute=compute, decoder=decoder)
  given = run.generation if num_beams is None else {**run.generation, "num_beams": num_beams}
  options = merge_options({}, given)
  options = dataclasses.replace(
    options,
    eos_token_id=options.eos_token_id or EOS,
    return_hidden=any(task in SPEECH_TASKS for task, _ in model.prompts),
  )
  params, batch = abstract_params(model, mesh), abstract_batch(run, model, prompt, mesh)

  start = time.perf_counter()
  lowered = generate.trace(params, batch, model, options, mesh=mesh).lower()
  lowered_at = time.perf_counter()
  compiled = lowered.compile()
  compiled_at = time.perf_counter()
  rows, kind = batch.frames[0].shape[0], devices[0].device_kind
  tokens = speech_llm.prompt_slots(batch, model) - prompt
  # The last token is not read, except for its hidden state.
  read = options.max_new_tokens - (0 if options.return_hidden else 1)
  slots = tokens + prompt + options.width * max(read, 1)
  memory = memory_of(compiled)
  return {
    "topology": topology,
    "chip": kind,
    "chips": len(devices),
    "mesh": dict(mesh.shape),
    "batch": {
      "rows": rows,
      **{
        f"{encoder.kind}_frames": features.shape[1]
        for encoder, features in zip(model.encoders, batch.features, strict=True)
      },
      "speech_tokens": tokens,
      "prompt_tokens": prompt,
      "num_beams": options.num_beams,
      "max_new_tokens": options.max_new_tokens,
      "return_hidden": options.return_hidden,
      "cache_slots": slots,
    },
    "parameters": sum(leaf.size for leaf in tree.flatten(params).values()),
    "compute": dataclasses.asdict(model.compute),
    "kernels": kernels_of(compiled),
    "hbm_gb_per_chip": memory["peak"],
    "gb_means": "2**30 bytes; everything that is in use at once, as XLA planned it",
    "hbm_of_chip_gb": MEMORY[kind].gib if kind in MEMORY else None,
    "memory_gb_per_chip": memory,
    "decode_step": step_bytes(params, model, mesh, rows=rows, slots=slots, kind=kind),
    "xla_bytes_accessed_per_chip_loops_once": (compiled.cost_analysis() or {}).get(
      "bytes accessed"
    ),
    "trace_and_lower_seconds": round(lowered_at - start, 1),
    "compile_seconds": round(compiled_at - lowered_at, 1),
  }


def abstract_params(model: SpeechLLMConfig, mesh) -> dict:
  """The parameters that `load_model` returns, as `ShapeDtypeStruct`s with shardings.

  `model` has no LoRA, as it is merged.
  """
  shapes = speech_llm.param_shapes(model)
  shapes["encoders"] = tree.stack_layers(shapes["encoders"])

  def loaded(x, sharding):
    dtype = model.compute.jnp_dtype if x.ndim > 1 else jnp.float32
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)

  params = jax.tree.map(loaded, shapes, param_shardings(mesh, shapes))
  if model.compute.quantization == "int8":
    leaves = tree.flatten(params)
    for path in [p for p in leaves if p.startswith("decoder/") and p.endswith("/kernel")]:
      kernel = leaves.pop(path)
      of_outputs = NamedSharding(mesh, P(kernel.sharding.spec[-1]))
      leaves[f"{path}_int8"] = kernel.update(dtype=jnp.int8)
      leaves[f"{path}_scale"] = jax.ShapeDtypeStruct(
        kernel.shape[-1:], jnp.float32, sharding=of_outputs
      )
    params = tree.unflatten(leaves)
  return params


def abstract_batch(run: Run, model: SpeechLLMConfig, prompt: int, mesh) -> Batch:
  """The largest batch of evaluation, as `ShapeDtypeStruct`s with shardings."""
  data = eval_data(run, run.eval, model)
  # The prompt costs the same on either side of the speech.
  batch = Batcher(data, model, (0, prompt)).shapes()[0]
  batch = jax.eval_shape(lambda b: pad_rows(b, row_parts(mesh)), batch)
  by_rows = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows), batch)


def step_bytes(
  params: Mapping, model: SpeechLLMConfig, mesh, *, rows: int, slots: int, kind: str
) -> dict:
  """The bytes that one chip must read in one decode step, and the time that its memory takes.

  These are its shards of the decoder's weights, without the embedding table of a model that has an
  output head (a step reads a few of its rows), and of the cache with all slots filled. A step
  generates one token of each of the rows; all beams of a row share it.
  """
  weights = {
    path: leaf
    for path, leaf in tree.flatten(params["decoder"]).items()
    if path != "embed/embedding" or model.decoder.tie_word_embeddings
  }
  dtype = model.compute.jnp_dtype
  cache = jax.eval_shape(lambda: model.decoder.empty_cache(rows=rows, slots=slots, dtype=dtype))
  shardings = cache_shardings(cache, model.decoder.kv_heads, mesh)
  of_weights = sum(_shard_bytes(leaf, leaf.sharding) for leaf in weights.values())
  of_cache = sum(jax.tree.leaves(jax.tree.map(_shard_bytes, cache.layers, shardings.layers)))
  read = of_weights + of_cache
  found = {
    "weights_bytes_per_chip": of_weights,
    "cache_bytes_per_chip": of_cache,
    "read_bytes_per_chip": read,
    "read_means": (
      "the chip's shards of the decoder's weights and of the filled cache, once; activations, and"
      " shards that fsdp gathers, are not counted"
    ),
    "read_bytes_per_token": read * mesh.size // rows,
    "read_per_token_means": "of all chips, for one token of one clip, all its beams included",
  }
  if kind in MEMORY:
    seconds = read / (MEMORY[kind].gb_per_s * 1e9)
    found |= {
      "bandwidth_of_chip_gb_per_s": MEMORY[kind].gb_per_s,
      "ms_per_step_at_full_bandwidth": round(1e3 * seconds, 2),
      "tokens_per_s_at_full_bandwidth": round(rows / seconds),
    }
  return found


def _shard_bytes(x, sharding: NamedSharding) -> int:
  return int(np.prod(sharding.shard_shape(x.shape))) * x.dtype.itemsize


def table(result: dict) -> Table:
  rows = memory_table("generation", result)
  step = result["decode_step"]
  rows.add_row("a step reads: weights", f"{step['weights_bytes_per_chip'] / GIB:.3f} GiB")
  rows.add_row("a step reads: full cache", f"{step['cache_bytes_per_chip'] / GIB:.3f} GiB")
  rows.add_row("read per token, all chips", f"{step['read_bytes_per_token'] / GIB:.3f} GiB")
  if "bandwidth_of_chip_gb_per_s" in step:
    rows.add_row("memory bandwidth of a chip", f"{step['bandwidth_of_chip_gb_per_s']} GB/s")
    rows.add_row("a step takes at least", f"{step['ms_per_step_at_full_bandwidth']:.2f} ms")
    rows.add_row("tokens at most", f"{step['tokens_per_s_at_full_bandwidth']} /s, all chips")
  rows.add_row("compile time", f"{result['compile_seconds']:.1f} s")
  return rows
