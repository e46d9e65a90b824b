"""Beam search with one prompt cache per utterance, and with a copy of the cache for every beam.

    JAX_PLATFORMS=cpu python -m benchmarks.beam_cache --json out/beam_cache.json

The model has the width of Qwen2-0.5B, few layers, a small vocabulary and random weights. All
outputs have the full length. Both versions run the same search and must return the same tokens.
"""

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.provenance import MODEL, write_result
from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.decoders.llm import LLM, KVCache, LLMConfig
from mooer_jax.generation import GenerationConfig, generate_from, search
from mooer_jax.nn.compute import ExecutionConfig

SOURCES = (*MODEL, "benchmarks/beam_cache.py", "mooer_jax/generation")


def copying(params, inputs_BSD, valid_BS, *, config, options):
  """Beam search with beams as rows: reordering them moves their keys and values."""
  (rows, prompt), R = valid_BS.shape, options.num_beams
  decoder = config.decoder
  cache = decoder.empty_cache(rows=rows, slots=prompt, dtype=config.compute.jnp_dtype)
  none_B = jnp.zeros(rows, jnp.int32)

  def choose(state, hidden_BRD):
    logits_BRV = speech_llm.logits(params, hidden_BRD, config)
    logits_BRV = jnp.broadcast_to(logits_BRV, (rows, R, decoder.vocab_size))
    return search.advance(state, logits_BRV, options, min_new_B=none_B)

  def body(carry):
    state, cache = carry
    last = state.step - 1
    # The rows of the beams' parents in the cache.
    parent_BR = jnp.where(last > 0, state.running.slots_BRS[..., jnp.maximum(last - 1, 0)], 0)
    row_X = (jnp.arange(rows)[:, None] * R + parent_BR).reshape(-1)
    cache = cache.replace(layers=jax.tree.map(lambda x: x[row_X], cache.layers))
    tokens_X1 = state.running.tokens_BRS[..., last].reshape(-1, 1)
    inputs_X1D = speech_llm.embed(params, tokens_X1, config)
    valid_X1 = jnp.ones(tokens_X1.shape, bool)
    hidden_X1D, cache = speech_llm.decode(params, inputs_X1D, valid_X1, config, cache=cache)
    return choose(state, hidden_X1D.reshape(rows, R, -1)), cache

  hidden_BSD, cache = speech_llm.decode(params, inputs_BSD, valid_BS, config, cache=cache)
  state = choose(search.start(rows, options), hidden_BSD[:, -1:])
  cache = cache.grow(options.max_new_tokens - 1)
  repeat = functools.partial(jnp.repeat, repeats=R, axis=0)
  cache = KVCache(
    layers=jax.tree.map(repeat, cache.layers),
    valid_BS=repeat(cache.valid_BS),
    filled=cache.filled,
    positions_B=repeat(cache.positions_B),
  )
  state, _ = jax.lax.while_loop(
    lambda carry: search.unfinished(carry[0], options), body, (state, cache)
  )
  return search.best(state, options)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  sizes = {"rows": 2, "beams": 4, "new": 64, "prompt": 200, "layers": 4, "vocab": 4096}
  for name, default in (*sizes.items(), ("dtype", "float32"), ("repeats", 5)):
    parser.add_argument(
      f"--{name}", type=type(default), default=default, help="default: %(default)s"
    )
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  decoder = dataclasses.replace(
    LLMConfig.SIZES["qwen2_0.5b"], layers=args.layers, vocab_size=args.vocab
  )
  config = SpeechLLMConfig(decoder=decoder, compute=ExecutionConfig(dtype=args.dtype))
  inputs_BSD = jax.random.normal(jax.random.key(0), (args.rows, args.prompt, decoder.hidden_size))
  valid_BS = jnp.ones(inputs_BSD.shape[:2], bool)
  init = functools.partial(LLM(decoder).init, method=LLM.init_all_params)
  params = {"decoder": init(jax.random.key(1), inputs_BSD[:, :2], valid_BS[:, :2])["params"]}
  params = jax.tree.map(lambda x: x.astype(config.compute.jnp_dtype), params)
  options = GenerationConfig(max_new_tokens=args.new, num_beams=args.beams)
  programs = {}
  for name, function in (("shared", generate_from), ("copied", copying)):
    call = functools.partial(function, config=config, options=options)
    programs[name] = jax.jit(call).lower(params, inputs_BSD, valid_BS).compile()
  tokens = {name: run(params, inputs_BSD, valid_BS) for name, run in programs.items()}
  np.testing.assert_array_equal(tokens["shared"].tokens_BRS, tokens["copied"].tokens_BRS[:, :1])
  times: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(args.repeats):  # alternately, so that other load affects both
    for name, run in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(run(params, inputs_BSD, valid_BS))
      times[name].append(1e3 * (time.perf_counter() - start) / args.new)
  result = {
    "device": f"{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}",
    "jax": jax.__version__,
    **{name: value for name, value in vars(args).items() if name != "json"},
    "ms_per_step": {name: statistics.median(each) for name, each in times.items()},
    "fastest_ms_per_step": {name: min(each) for name, each in times.items()},
    "temporary_mb": {
      name: run.memory_analysis().temp_size_in_bytes / 1e6 for name, run in programs.items()
    },
  }
  print(json.dumps(result, indent=2))
  write_result(args.json, result, SOURCES)


if __name__ == "__main__":
  main()
