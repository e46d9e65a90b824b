"""Autoregressive decoding over an explicit KV cache: prefill, then one while loop."""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.decoders.kv_cache import KVCache
from mooer_jax.generation.sampling import Sampling, choose
from mooer_jax.speech_llm import Batch

PAD = -1


@flax.struct.dataclass
class Generated:
  """What was generated, one row an utterance.

  Attributes:
    tokens_BS: int32 [B, max_new_tokens], the eos included where one came; -1 after the end.
    lengths_B: int32, tokens in each row, the eos included.
    finished_B: bool, False where max_new_tokens cut the answer off.
  """

  tokens_BS: jax.Array
  lengths_B: jax.Array
  finished_B: jax.Array


class _State(NamedTuple):
  step: jax.Array  # tokens written so far
  token_B: jax.Array  # the last one written
  tokens_BS: jax.Array
  finished_B: jax.Array
  cache: KVCache


@functools.partial(jax.jit, static_argnames=("config", "options"))
def generate(
  params: dict,
  batch: Batch,
  config: SpeechLLMConfig,
  options: Sampling,
  *,
  key: jax.Array | None = None,
  lora_scale: jax.Array | float | None = None,
) -> Generated:
  """Answers a batch of prompts; compiled once for each shape of batch, config and options.

  Args:
    params: per-layer parameters (`tree.unstack_layers`), config.compute.scan False.
    batch: prompts; `answer_BS` is not read. Rows of padding give rows of padding.
    config: the model.
    options: greedy or sampling, and when to stop.
    key: PRNG key, needed when sampling; row i draws from fold_in(key, i) whatever the batch size.
    lora_scale: scalar or [B]; None is the scale of training.

  Raises:
    ValueError: if params are stacked, or sampling is asked for without a key.
  """
  if config.compute.scan or "layers" in params["decoder"]:
    raise ValueError("generate needs compute.scan=False and per-layer params: tree.unstack_layers")
  if options.do_sample and key is None:
    raise ValueError("do_sample=True needs a PRNG key: generate(..., key=jax.random.key(seed))")
  inputs_BSD, valid_BS = speech_llm.prompt(params, batch, config)
  rows, prompt_slots = valid_BS.shape
  key = jax.random.key(0) if key is None else key
  row_keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))
  decoder = config.decoder
  cache = KVCache.create(
    layers=decoder.layers,
    batch=rows,
    slots=prompt_slots + options.max_new_tokens,
    kv_heads=decoder.kv_heads,
    channels=decoder.head_width,
    dtype=config.compute.jnp_dtype,
  )
  eos_E = jnp.array(options.eos_ids, jnp.int32)

  def advance(step, inputs_BSD, valid_BS, tokens_BS, finished_B, cache) -> _State:
    hidden_BSD, cache = speech_llm.decode(
      params, inputs_BSD, valid_BS, config, cache=cache, lora_scale=lora_scale
    )
    logits_BV = speech_llm.logits(params, hidden_BSD[:, -1:], config)[:, 0]
    keys_B = jax.vmap(lambda row_key: jax.random.fold_in(row_key, step))(row_keys_B)
    token_B = jnp.where(finished_B, PAD, choose(logits_BV, options, keys_B))
    tokens_BS = jax.lax.dynamic_update_slice_in_dim(tokens_BS, token_B[:, None], step, axis=1)
    finished_B = finished_B | jnp.isin(token_B, eos_E)
    return _State(step + 1, token_B, tokens_BS, finished_B, cache)

  def unfinished(state: _State) -> jax.Array:
    return (state.step < options.max_new_tokens) & ~state.finished_B.all()

  def body(state: _State) -> _State:
    token_B1 = state.token_B[:, None]
    inputs_B1D = speech_llm.embed(params, token_B1, config)
    return advance(
      state.step, inputs_B1D, token_B1 >= 0, state.tokens_BS, state.finished_B, state.cache
    )

  empty_BS = jnp.full((rows, options.max_new_tokens), PAD, jnp.int32)
  no_audio_B = batch.frames[0] == 0
  step = jnp.zeros((), jnp.int32)
  state = advance(step, inputs_BSD, valid_BS, empty_BS, no_audio_B, cache)
  state = jax.lax.while_loop(unfinished, body, state)
  return Generated(
    tokens_BS=state.tokens_BS,
    lengths_B=(state.tokens_BS >= 0).sum(axis=1),
    finished_B=state.finished_B,
  )
