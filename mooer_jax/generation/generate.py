"""Decoding of one batch in one compiled program: prefill, then a loop of decode steps."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation import search
from mooer_jax.generation.options import GenerationConfig
from mooer_jax.generation.steps import Rows, Steps, last_tokens, row_keys
from mooer_jax.sharding import constrain_rows, in_mesh, row_parts
from mooer_jax.speech_llm import Batch, pad_rows

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
    lora_scale: scalar, [B] or [B, rank] (`Adapters.scale`); None is the scale of training.
    mesh: from `make_mesh`, with params sharded by `param_shardings`. Rows are split over `data` and
      `fsdp`; the batch is padded internally to a multiple of their sizes.

  Raises:
    ValueError: if params are stacked, or sampling has no key; for a lora_scale of another number
      of rows; for a mesh with other axes.
  """
  Steps(params, config, options).check(key=key)
  rows = batch.frames[0].shape[0]
  lora_scale = pad_scale(lora_scale, rows, row_parts(mesh))
  batch = constrain_rows(pad_rows(batch, row_parts(mesh)), mesh)
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


def pad_scale(lora_scale, rows: int, multiple: int):
  """The `lora_scale` of a batch after `pad_rows`; None and scalars remain as they are.

  Raises:
    ValueError: if it has another number of rows than the batch.
  """
  if lora_scale is None or not jnp.ndim(lora_scale):
    return lora_scale
  if len(lora_scale) != rows:
    raise ValueError(f"lora_scale has {len(lora_scale)} rows, but the batch has {rows}")
  if not (more := -rows % multiple):
    return lora_scale
  return jnp.pad(lora_scale, [(0, more)] + [(0, 0)] * (jnp.ndim(lora_scale) - 1))


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
  rows = valid_BS.shape[0]
  if rows % row_parts(mesh):
    raise ValueError(f"{rows} rows are not divisible by mesh.data x mesh.fsdp={row_parts(mesh)}")
  steps = Steps(params, config, options, mesh)
  steps.check(key=key)
  prefilled, hidden_BSD = steps.prefill(
    inputs_BSD,
    valid_BS,
    keys_B=row_keys(key, rows),
    lora_scale=lora_scale,
    padding_B=padding_B,
  )
  prefilled = steps.place(prefilled.replace(cache=prefilled.cache.grow(steps.ring_slots)))
  read_BYD = None
  if options.return_hidden:
    read_BYD = jnp.zeros((rows, steps.ring_slots, hidden_BSD.shape[-1]), hidden_BSD.dtype)

  def step(carry):
    rows, read_BYD = carry
    now = rows.clock * options.width
    rows, hidden_BRD = steps.step(rows)
    if options.return_hidden:
      read_BYD = jax.lax.dynamic_update_slice_in_dim(read_BYD, hidden_BRD, now, axis=1)
    return rows, constrain_rows(read_BYD, mesh)

  ended, read_BYD = jax.lax.while_loop(
    lambda carry: ~carry[0].state.done_B.all(), step, (prefilled, read_BYD)
  )
  output = output_of(ended.state, options)
  if options.return_hidden:
    found = search.best(ended.state, options)
    last_BRD = _read_last(steps, ended, found)
    hidden_BRSD = _collect(read_BYD, last_BRD, found, width=options.width)
    output = output.replace(hidden_BRSD=hidden_BRSD)  # type: ignore[attr-defined]
  return output


def output_of(state: search.State, options: GenerationConfig) -> GenerateOutput:
  """The hypotheses of a search that has ended."""
  found = search.best(state, options)
  is_empty_BR = found.lengths_BR == 0
  is_eos_BR = search.is_eos(last_tokens(found), options)
  return GenerateOutput(
    tokens_BRS=found.tokens_BRS,
    lengths_BR=found.lengths_BR,
    scores_BR=jnp.where(is_empty_BR, 0, found.scores_BR),
    finished_BR=is_eos_BR | is_empty_BR,
  )


def _read_last(steps: Steps, rows: Rows, found: search.Hypotheses) -> jax.Array:
  """Hidden states [B, R, D] of the last tokens, which no step has read."""
  S = steps.options.max_new_tokens
  last_BR = jnp.maximum(found.lengths_BR - 1, 0)
  # They go into the slots of the last step, one per hypothesis.
  slots_BRS = found.slots_BRS.at[..., -1].set(jnp.arange(steps.options.num_return_sequences))
  hidden_BRD, _ = steps.read(
    rows,
    last_tokens(found),
    last_BR=last_BR,
    past_BRS=(jnp.arange(S) < last_BR[..., None]) | (jnp.arange(S) == S - 1),
    slots_BRS=slots_BRS,
    clock=jnp.int32(S - 1),
  )
  return hidden_BRD


def _collect(read_BYD, last_BRD, found: search.Hypotheses, *, width: int) -> jax.Array:
  """Hidden states [B, R, S, D] of hypotheses, from those of all slots and of the last tokens."""
  rows, number, steps = found.slots_BRS.shape
  index_BY = (jnp.arange(steps) * width + found.slots_BRS).reshape(rows, -1)
  hidden_BRSD = jnp.take_along_axis(read_BYD, index_BY[..., None], axis=1)
  hidden_BRSD = hidden_BRSD.reshape(rows, number, steps, -1)
  order_S1, lengths_BR11 = jnp.arange(steps)[:, None], found.lengths_BR[..., None, None]
  hidden_BRSD = jnp.where(order_S1 == lengths_BR11 - 1, last_BRD[:, :, None], hidden_BRSD)
  return jnp.where(order_S1 < lengths_BR11, hidden_BRSD, 0)
