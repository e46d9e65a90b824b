"""Autoregressive decoding over an explicit KV cache: prefill, then one while loop.

The prompt is read and cached once per utterance, for all R hypotheses. The R hypotheses of an
utterance are R queries of one row; each step writes their keys and values into R new slots, and a
mask selects the slots of a hypothesis' own past. When beams are reordered, only small integers move
(`search.Hypotheses.slots_BRS`), never cache entries.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.decoders.llm import Placement
from mooer_jax.generation import search
from mooer_jax.generation.options import GenerationConfig
from mooer_jax.generation.processors import min_new_tokens
from mooer_jax.sharding import batch_sharding, constrain_cache, constrain_rows, in_mesh, row_parts
from mooer_jax.speech_llm import Batch, pad_rows

T = TypeVar("T")

# Error for an utterance whose scores are NaN or infinite; its tokens mean nothing.
NOT_FINITE = (
  "the model's scores are not finite; its weights are damaged or diverged, the dtype overflows"
  " (try float32), or the temperature is too low"
)


@flax.struct.dataclass
class GenerateOutput:
  """Generated tokens: R = num_return_sequences hypotheses per utterance, the best first.

  Attributes:
    tokens_BRS: int32 [B, R, max_new_tokens], including the eos if there is one; -1 after the end.
    lengths_BR: int32, number of tokens, including the eos.
    scores_BR: float32, summed log-probabilities of the tokens / length ** length_penalty. With
      beams they are transformers' `sequences_scores`, sums of processed log-probabilities; with
      one beam, of the processed distribution from which each token was taken.
    finished_BR: bool, False where generation stopped at max_new_tokens.
    hidden_BRSD: with return_hidden, the last hidden state (after the final norm) at each generated
      token, as in a pass over prompt and tokens; 0 after the end. Else None.
  """

  tokens_BRS: jax.Array
  lengths_BR: jax.Array
  scores_BR: jax.Array
  finished_BR: jax.Array
  hidden_BRSD: jax.Array | None = None

  # The first hypothesis of each utterance.
  @property
  def tokens_BS(self) -> jax.Array:
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


@functools.partial(jax.jit, static_argnames=("config", "options", "mesh"))
@in_mesh
def generate(
  params: dict,
  batch: Batch,
  config: SpeechLLMConfig,
  options: GenerationConfig,
  *,
  key: jax.Array | None = None,
  lora_scale: jax.Array | float | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> GenerateOutput:
  """Generates text for a batch; compiled once for each shape of batch, config and options.

  Args:
    params: per-layer parameters (`tree.unstack_layers`).
    batch: speech and prompts; `labels_BS` is not read. Padding rows give padding rows.
    config: the model, with compute.scan False.
    options: decoding options.
    key: PRNG key, required for sampling; row i uses fold_in(key, i), for every batch size.
    lora_scale: scalar or [B]; None is the scale of training.
    mesh: from `make_mesh`, with params sharded by `param_shardings`. Rows are split over `data` and
      `fsdp`; the batch is padded internally to a multiple of their sizes.

  Raises:
    ValueError: if params are stacked, or sampling has no key; for a mesh with other axes.
  """
  _check(params, config, options, key=key)
  rows = batch.frames[0].shape[0]
  batch = constrain_rows(pad_rows(batch, row_parts(mesh)), mesh)
  if lora_scale is not None and jnp.ndim(lora_scale):
    lora_scale = jnp.pad(lora_scale, (0, batch.frames[0].shape[0] - rows), mode="edge")
  inputs_BSD, valid_BS = speech_llm.prompt(params, batch, config)
  output = generate_from(
    params,
    inputs_BSD,
    valid_BS,
    config,
    options,
    padding_B=batch.frames[0] == 0,
    key=key,
    lora_scale=lora_scale,
    mesh=mesh,
  )
  return jax.tree.map(lambda x: x[:rows], output)


@in_mesh
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
  mesh: jax.sharding.Mesh | None = None,
) -> GenerateOutput:
  """Generates text for prompts given as embeddings; the part of `generate` after the connector.

  Args:
    params, config, options, key, lora_scale, mesh: as in `generate`; only params["decoder"] is
      read. Rows must be divisible by the sizes of `data` and `fsdp`.
    inputs_BSD: embeddings of the prompts; generation continues after the last slot.
    valid_BS: bool, True for slots that hold a token; the last slot must.
    padding_B: bool, True for padding rows, for which nothing is generated.
  """
  _check(params, config, options, key=key)
  rows, prompt_slots = valid_BS.shape
  if rows % row_parts(mesh):
    raise ValueError(f"{rows} rows are not divisible by mesh.data x mesh.fsdp={row_parts(mesh)}")
  key = jax.random.key(0) if key is None else key
  steps = _Steps(
    params=params,
    config=config,
    options=options,
    decode=functools.partial(speech_llm.decode, params, config=config, lora_scale=lora_scale),
    prompt_slots=prompt_slots,
    prompt_B=valid_BS.sum(axis=1, dtype=jnp.int32),
    keys_B=jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows)),
    mesh=mesh,
  )
  dtype = config.compute.jnp_dtype
  cache = config.decoder.empty_cache(rows=rows, slots=prompt_slots, dtype=dtype)
  (inputs_BSD, valid_BS), cache = steps.place((inputs_BSD, valid_BS), cache)
  hidden_BSD, cache = steps.decode(inputs_BSD, valid_BS, cache=cache)
  cache = cache.grow(steps.slots)
  state = steps.choose(search.start(rows, options, padding_B), hidden_BSD[:, -1:])
  read_BYD = None
  if options.return_hidden:
    slots = options.max_new_tokens * options.width
    read_BYD = jnp.zeros((rows, slots, hidden_BSD.shape[-1]), hidden_BSD.dtype)
  (state, read_BYD), cache = steps.place((state, read_BYD), cache)
  state, cache, read_BYD = jax.lax.while_loop(
    lambda carry: search.unfinished(carry[0], options), steps.step, (state, cache, read_BYD)
  )
  found = search.best(state, options)
  hidden_BRSD = None
  if options.return_hidden:
    hidden_BRSD = _collect(read_BYD, steps.read_last(found, cache), found, width=options.width)
  is_empty_BR = found.lengths_BR == 0
  is_eos_BR = search.is_eos(_last_tokens(found), options)
  return GenerateOutput(
    tokens_BRS=found.tokens_BRS,
    lengths_BR=found.lengths_BR,
    scores_BR=jnp.where(is_empty_BR, 0, found.scores_BR),
    finished_BR=is_eos_BR | is_empty_BR,
    hidden_BRSD=hidden_BRSD,
  )


@dataclasses.dataclass(frozen=True)
class _Steps:
  """The steps of one call of `generate_from`; R hypotheses of S = max_new_tokens slots each.

  `decode` is `speech_llm.decode` of this model; `prompt_B` has the tokens of each prompt, of
  `prompt_slots` slots, `keys_B` the PRNG key of each row; `mesh` is that of `generate`.
  """

  params: dict
  config: SpeechLLMConfig
  options: GenerationConfig
  decode: Callable
  prompt_slots: int
  prompt_B: jax.Array
  keys_B: jax.Array
  mesh: jax.sharding.Mesh | None

  def place(self, arrays, cache):
    """(arrays, cache), both split by rows over the mesh, the cache also by heads."""
    cache = constrain_cache(cache, self.config.decoder.kv_heads, self.mesh)
    return constrain_rows(arrays, self.mesh), cache

  @property
  def slots(self) -> int:
    S = self.options.max_new_tokens
    # Nothing follows the last token, but return_hidden reads it too.
    return self.options.width * (S if self.options.return_hidden else max(S - 1, 1))

  def choose(self, state: search.State, hidden_BRD) -> search.State:
    """Chooses the next tokens; the hidden states have one entry for all R hypotheses, or R."""
    logits_BRV = speech_llm.logits(self.params, hidden_BRD, self.config)
    rows, _, vocab = logits_BRV.shape
    logits_BRV = jnp.broadcast_to(logits_BRV, (rows, self.options.width, vocab))
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(self.keys_B)
    min_new_B = min_new_tokens(self.prompt_B, self.options)
    return search.advance(state, logits_BRV, self.options, min_new_B=min_new_B, keys_B=keys_B)

  def step(self, carry):
    """Reads the tokens that were chosen last and chooses the next ones."""
    state, cache, read_BYD = carry
    last, S, R = state.step - 1, self.options.max_new_tokens, self.options.width
    tokens_BRS = state.running.tokens_BRS
    hidden_BRD, cache = self.read_tokens(
      jax.lax.dynamic_index_in_dim(tokens_BRS, last, axis=-1, keepdims=False),
      jnp.broadcast_to(self.prompt_B[:, None] + last, tokens_BRS.shape[:2]),
      past_BRS=jnp.arange(S) <= last,
      slots_BRS=state.running.slots_BRS,
      cache=cache,
    )
    if self.options.return_hidden:
      read_BYD = jax.lax.dynamic_update_slice_in_dim(read_BYD, hidden_BRD, last * R, axis=1)
    state = self.choose(state, hidden_BRD)
    (state, read_BYD), cache = self.place((state, read_BYD), cache)
    return state, cache, read_BYD

  def read_tokens(self, tokens_BR, positions_BR, *, past_BRS, slots_BRS, cache):
    """(hidden [B, R, D], cache) of tokens that attend to the prompt, their past and themselves."""
    own_BRSR = past_BRS[..., None] & (slots_BRS[..., None] == jnp.arange(self.options.width))
    own_BRT = own_BRSR.reshape(*tokens_BR.shape, -1)[..., : self.slots]
    prompt_BRT = jnp.ones((*tokens_BR.shape, self.prompt_slots), bool)
    placement = Placement(positions_BR, jnp.concatenate([prompt_BRT, own_BRT], axis=-1))
    inputs_BRD = constrain_rows(speech_llm.embed(self.params, tokens_BR, self.config), self.mesh)
    valid_BR = jnp.ones(tokens_BR.shape, bool)
    return self.decode(inputs_BRD, valid_BR, cache=cache, placement=placement)

  def read_last(self, found: search.Hypotheses, cache) -> jax.Array:
    """Hidden states [B, R, D] of the last tokens, which `step` never read."""
    S, R = self.options.max_new_tokens, self.options.width
    last_BR1 = jnp.maximum(found.lengths_BR - 1, 0)[..., None]
    # They go into the slots of the last step, one per hypothesis.
    slots_BRS = found.slots_BRS.at[..., -1].set(jnp.arange(self.options.num_return_sequences))
    hidden_BRD, _ = self.read_tokens(
      _last_tokens(found),
      self.prompt_B[:, None] + last_BR1[..., 0],
      past_BRS=(jnp.arange(S) < last_BR1) | (jnp.arange(S) == S - 1),
      slots_BRS=slots_BRS,
      cache=cache.replace(filled=jnp.int32(self.prompt_slots + (S - 1) * R)),  # type: ignore[attr-defined]
    )
    return hidden_BRD


def _last_tokens(found: search.Hypotheses) -> jax.Array:
  last_BR1 = jnp.maximum(found.lengths_BR - 1, 0)[..., None]
  return jnp.take_along_axis(found.tokens_BRS, last_BR1, axis=-1)[..., 0]


def _collect(read_BYD, last_BRD, found: search.Hypotheses, *, width: int) -> jax.Array:
  """Hidden states [B, R, S, D] of hypotheses, from those of all slots and of the last tokens."""
  rows, number, steps = found.slots_BRS.shape
  index_BY = (jnp.arange(steps) * width + found.slots_BRS).reshape(rows, -1)
  hidden_BRSD = jnp.take_along_axis(read_BYD, index_BY[..., None], axis=1)
  hidden_BRSD = hidden_BRSD.reshape(rows, number, steps, -1)
  order_S1, lengths_BR11 = jnp.arange(steps)[:, None], found.lengths_BR[..., None, None]
  hidden_BRSD = jnp.where(order_S1 == lengths_BR11 - 1, last_BRD[:, :, None], hidden_BRSD)
  return jnp.where(order_S1 < lengths_BR11, hidden_BRSD, 0)


def _check(params, config, options, *, key):
  if config.compute.scan or "layers" in params["decoder"]:
    raise ValueError("generate needs compute.scan=False and per-layer params: tree.unstack_layers")
  if options.do_sample and key is None:
    raise ValueError("do_sample=True needs a PRNG key: generate(..., key=jax.random.key(seed))")


def decode_batches(
  params: dict,
  batches: Iterable[tuple[T, Batch]],
  config: SpeechLLMConfig,
  options: GenerationConfig,
  *,
  key: jax.Array,
  lora_scale: float | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Generator[tuple[T, GenerateOutput]]:
  """Generates text for batch after batch; a thread makes the next one while the device decodes.

  Close the generator to stop early: it waits for the batch that is being made, and makes no other.

  Args:
    params, config, options, lora_scale, mesh: as in `generate`.
    batches: (value that is passed on, batch) pairs; iterated in a thread, and at most one batch
      ahead. Its exceptions are raised here.
    key: PRNG key; batch n uses fold_in(key, n).

  Yields:
    (the value that came with the batch, output in NumPy).
  """
  with concurrent.futures.ThreadPoolExecutor(1, "next batch") as thread:
    iterator = iter(batches)
    coming = thread.submit(next, iterator, None)
    for number in itertools.count():
      if (item := coming.result()) is None:
        return
      coming = thread.submit(next, iterator, None)
      of_batch = jax.random.fold_in(key, number)
      output = _generate_on_host(
        params, item[1], config, options, key=of_batch, lora_scale=lora_scale, mesh=mesh
      )
      yield item[0], output


def compile_batch(
  params: dict,
  batch: Batch,
  config: SpeechLLMConfig,
  options: GenerationConfig,
  *,
  mesh: jax.sharding.Mesh | None = None,
) -> None:
  """Compiles the program that `decode_batches` runs for batches of this shape; decodes nothing.

  The program goes into the persistent compilation cache of JAX. Arguments as in `generate`.
  """
  batch, key = _placed(batch, mesh), jax.random.key(0)
  generate.lower(params, batch, config, options, key=key, mesh=mesh).compile()


def _placed(batch: Batch, mesh: jax.sharding.Mesh | None) -> Batch:
  """A batch of which each device has only its own rows."""
  if mesh is None:
    return batch
  return jax.device_put(pad_rows(batch, row_parts(mesh)), batch_sharding(mesh))


def _generate_on_host(params, batch: Batch, config, options, *, mesh, **more) -> GenerateOutput:
  """The output of `generate` in NumPy, without padding rows."""
  if mesh is None:
    return jax.device_get(generate(params, batch, config, options, **more))
  rows = batch.frames[0].shape[0]
  output = generate(params, _placed(batch, mesh), config, options, mesh=mesh, **more)
  return jax.tree.map(lambda x: x[:rows], jax.device_get(output))
