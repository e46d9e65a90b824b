"""Autoregressive decoding over an explicit KV cache: prefill, then one while loop.

The prompt is read once and cached once an utterance, however many answers grow from it. The R
answers of an utterance are R queries of one row; each step writes their keys and values into R new
slots, and a mask says which of the slots hold an answer's own past. A beam that takes over the past
of another takes over small integers (`search.Answers.slots_BRS`); no cache entry is ever moved.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.decoders.llm import KVCache, Placement
from mooer_jax.generation import search
from mooer_jax.generation.options import GenerationConfig
from mooer_jax.generation.processors import min_new_tokens
from mooer_jax.speech_llm import Batch


@flax.struct.dataclass
class Generated:
  """What was generated: R = num_return_sequences answers an utterance, the best first.

  Attributes:
    tokens_BRS: int32 [B, R, max_new_tokens], the eos included where one came; -1 after the end.
    lengths_BR: int32, tokens in each answer, the eos included.
    scores_BR: float32, summed log-probabilities of the tokens / length ** length_penalty. With
      beams they are transformers' `sequences_scores`, sums of processed log-probabilities; with
      one beam, of the processed distribution that each token was taken from.
    finished_BR: bool, False where max_new_tokens cut the answer off.
    hidden_BRSD: with return_hidden, the last hidden state (after the final norm) at each token of
      the answer, as a pass over prompt and answer gives it; 0 after the end. Else None.
  """

  tokens_BRS: jax.Array
  lengths_BR: jax.Array
  scores_BR: jax.Array
  finished_BR: jax.Array
  hidden_BRSD: jax.Array | None = None

  @property
  def tokens_BS(self) -> jax.Array:
    """Of each utterance's first answer, as are the other fields without R."""
    return self.tokens_BRS[:, 0]

  @property
  def lengths_B(self) -> jax.Array:
    return self.lengths_BR[:, 0]

  @property
  def scores_B(self) -> jax.Array:
    return self.scores_BR[:, 0]

  @property
  def finished_B(self) -> jax.Array:
    return self.finished_BR[:, 0]


@functools.partial(jax.jit, static_argnames=("config", "options"))
def generate(
  params: dict,
  batch: Batch,
  config: SpeechLLMConfig,
  options: GenerationConfig,
  *,
  key: jax.Array | None = None,
  lora_scale: jax.Array | float | None = None,
) -> Generated:
  """Answers a batch of prompts; compiled once for each shape of batch, config and options.

  Args:
    params: per-layer parameters (`tree.unstack_layers`), config.compute.scan False.
    batch: prompts; `answer_BS` is not read. Rows of padding give rows of padding.
    config: the model.
    options: how answers are searched for, and when to stop.
    key: PRNG key, needed when sampling; row i draws from fold_in(key, i) whatever the batch size.
    lora_scale: scalar or [B]; None is the scale of training.

  Raises:
    ValueError: if params are stacked, or sampling is asked for without a key.
  """
  _check(params, config, options, key)
  inputs_BSD, valid_BS = speech_llm.prompt(params, batch, config)
  return generate_from(
    params,
    inputs_BSD,
    valid_BS,
    config,
    options,
    padding_B=batch.frames[0] == 0,
    key=key,
    lora_scale=lora_scale,
  )


def generate_from(
  params: dict,
  inputs_BSD: jax.Array,
  valid_BS: jax.Array,
  config: SpeechLLMConfig,
  options: GenerationConfig,
  *,
  padding_B: jax.Array | None = None,
  key: jax.Array | None = None,
  lora_scale: jax.Array | float | None = None,
) -> Generated:
  """Answers prompts given as embeddings; what `generate` does behind the connector.

  Args:
    params, config, options, key, lora_scale: as of `generate`; only params["decoder"] is read.
    inputs_BSD: the prompts' embeddings; the answer follows the last slot.
    valid_BS: bool, True for the slots that hold a token; the last slot must.
    padding_B: bool, True for rows that get no answer.
  """
  _check(params, config, options, key)
  rows, prompt_slots = valid_BS.shape
  R, S = options.width, options.max_new_tokens
  key = jax.random.key(0) if key is None else key
  row_keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))
  prompt_B = valid_BS.sum(axis=1, dtype=jnp.int32)
  min_new_B = min_new_tokens(prompt_B, options)
  # No answer goes on after its last token, but with return_hidden it is read all the same.
  read = S if options.return_hidden else max(S - 1, 1)
  decoder = config.decoder
  cache = KVCache.create(
    layers=decoder.layers,
    batch=rows,
    slots=prompt_slots,
    kv_heads=decoder.kv_heads,
    channels=decoder.head_dim,
    dtype=config.compute.jnp_dtype,
  )
  decode = functools.partial(speech_llm.decode, config=config, lora_scale=lora_scale)

  def choose(state, hidden_BRD):
    logits_BRV = speech_llm.logits(params, hidden_BRD, config)
    logits_BRV = jnp.broadcast_to(logits_BRV, (rows, R, logits_BRV.shape[-1]))
    keys_B = jax.vmap(lambda row_key: jax.random.fold_in(row_key, state.step))(row_keys_B)
    return search.advance(state, logits_BRV, options, min_new_B=min_new_B, keys_B=keys_B)

  def read_tokens(tokens_BR, positions_BR, past_BRS, slots_BRS, cache):
    """(hidden [B, R, D], cache) of tokens that see the prompt, their past and themselves."""
    own_BRSR = past_BRS[..., None] & (slots_BRS[..., None] == jnp.arange(R))
    own_BRT = own_BRSR.reshape(*tokens_BR.shape, S * R)[..., : read * R]
    prompt_BRT = jnp.ones((*tokens_BR.shape, prompt_slots), bool)
    placement = Placement(positions_BR, jnp.concatenate([prompt_BRT, own_BRT], axis=-1))
    inputs_BRD = speech_llm.embed(params, tokens_BR, config)
    valid_BR = jnp.ones(tokens_BR.shape, bool)
    return decode(params, inputs_BRD, valid_BR, cache=cache, placement=placement)

  def body(carry):
    state, cache, read_BYD = carry
    last = state.step - 1
    positions_BR = jnp.broadcast_to(prompt_B[:, None] + last, (rows, R))
    hidden_BRD, cache = read_tokens(
      jax.lax.dynamic_index_in_dim(state.running.tokens_BRS, last, axis=-1, keepdims=False),
      positions_BR,
      jnp.arange(S) <= last,
      state.running.slots_BRS,
      cache,
    )
    if options.return_hidden:
      read_BYD = jax.lax.dynamic_update_slice_in_dim(read_BYD, hidden_BRD, last * R, axis=1)
    return choose(state, hidden_BRD), cache, read_BYD

  hidden_BSD, cache = decode(params, inputs_BSD, valid_BS, cache=cache)
  state = choose(search.start(rows, options, padding_B), hidden_BSD[:, -1:])
  cache = cache.grow(read * R)
  read_BYD = None
  if options.return_hidden:
    read_BYD = jnp.zeros((rows, S * R, decoder.hidden_size), hidden_BSD.dtype)
  state, cache, read_BYD = jax.lax.while_loop(
    lambda carry: search.unfinished(carry[0], options), body, (state, cache, read_BYD)
  )
  answers = search.best(state, options)
  last_BR1 = jnp.maximum(answers.lengths_BR - 1, 0)[..., None]
  last_tokens_BR = jnp.take_along_axis(answers.tokens_BRS, last_BR1, axis=-1)[..., 0]
  hidden_BRSD = None
  if options.return_hidden:
    # The last tokens were never read: they go into the slots of the last step, one an answer.
    place_BRS = answers.slots_BRS.at[..., -1].set(jnp.arange(options.num_return_sequences))
    past_BRS = (jnp.arange(S) < last_BR1) | (jnp.arange(S) == S - 1)
    cache = cache.replace(filled=jnp.int32(prompt_slots + (S - 1) * R))
    final_BRD, _ = read_tokens(
      last_tokens_BR, prompt_B[:, None] + last_BR1[..., 0], past_BRS, place_BRS, cache
    )
    hidden_BRSD = _collect(read_BYD, final_BRD, answers, R)
  is_empty_BR = answers.lengths_BR == 0
  is_eos_BR = jnp.isin(last_tokens_BR, jnp.array(options.eos_token_id, jnp.int32))
  return Generated(
    tokens_BRS=answers.tokens_BRS,
    lengths_BR=answers.lengths_BR,
    scores_BR=jnp.where(is_empty_BR, 0, answers.scores_BR),
    finished_BR=is_eos_BR | is_empty_BR,
    hidden_BRSD=hidden_BRSD,
  )


def _collect(read_BYD, final_BRD, answers: search.Answers, places: int) -> jax.Array:
  """Hidden states [B, R, S, D] of answers, from those of all slots and of the last tokens."""
  rows, count, steps = answers.slots_BRS.shape
  index_BY = (jnp.arange(steps) * places + answers.slots_BRS).reshape(rows, -1)
  hidden_BRSD = jnp.take_along_axis(read_BYD, index_BY[..., None], axis=1)
  hidden_BRSD = hidden_BRSD.reshape(rows, count, steps, -1)
  order_S1, lengths_BR11 = jnp.arange(steps)[:, None], answers.lengths_BR[..., None, None]
  hidden_BRSD = jnp.where(order_S1 == lengths_BR11 - 1, final_BRD[:, :, None], hidden_BRSD)
  return jnp.where(order_S1 < lengths_BR11, hidden_BRSD, 0)


def _check(params, config, options, key):
  if config.compute.scan or "layers" in params["decoder"]:
    raise ValueError("generate needs compute.scan=False and per-layer params: tree.unstack_layers")
  if options.do_sample and key is None:
    raise ValueError("do_sample=True needs a PRNG key: generate(..., key=jax.random.key(seed))")
