"""Prefill and the decode step, over rows that may begin at different times.

The prompt is read and cached once per utterance, for all R hypotheses. The R hypotheses of an
utterance are R queries of one row; each step writes their keys and values into R new slots, and a
mask selects the slots of a hypothesis' own past. When beams are reordered, only small integers move
(`search.Hypotheses.slots_BRS`), never cache entries.

All rows write into the same slots in a step. Behind the prompt, the slots are a ring: each step
overwrites those of the oldest one. The ring has as many steps as an utterance can take, so an
utterance can begin at any step, and its own slots are overwritten only after it has ended.
"""

import dataclasses
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
from mooer_jax.sharding import constrain_cache, constrain_rows


@flax.struct.dataclass
class Rows:
  """Utterances that are being decoded.

  Attributes:
    state: the search.
    cache: slots of the prompts and, once decoding begins, the ring.
    prompt_B: int32, tokens of the prompts.
    keys_B: PRNG keys.
    begin_B: int32, place in the ring of the first generated token.
    clock: int32 scalar, number of steps so far; from the second round of the ring on, minus those
      of whole rounds.
    lora_scale: float32 scalar, [B] or [B, rank]; None is the scale of training.
  """

  state: search.State
  cache: KVCache
  prompt_B: jax.Array
  keys_B: jax.Array
  begin_B: jax.Array
  clock: jax.Array
  lora_scale: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of decoding with one model and one set of options; see `generate` for the fields."""

  params: dict
  config: SpeechLLMConfig
  options: GenerationConfig
  mesh: jax.sharding.Mesh | None = None

  @property
  def ring(self) -> int:
    """Steps in the ring."""
    S = self.options.max_new_tokens
    # Nothing follows the last token, but return_hidden reads it too.
    return S if self.options.return_hidden else max(S - 1, 1)

  @property
  def ring_slots(self) -> int:
    return self.ring * self.options.width

  def place(self, rows: Rows) -> Rows:
    """Rows split over the mesh, the cache also by heads."""
    cache = constrain_cache(rows.cache, self.config.decoder.kv_heads, self.mesh)
    rest = constrain_rows(rows.replace(cache=None), self.mesh)  # type: ignore[attr-defined]
    return rest.replace(cache=cache)

  def prefill(self, inputs_BSD, valid_BS, *, keys_B, lora_scale=None, padding_B=None):
    """(Rows with their first token, hidden states [B, S, D]), from the embeddings of prompts."""
    rows, slots = valid_BS.shape
    cache = self.config.decoder.empty_cache(
      rows=rows, slots=slots, dtype=self.config.compute.jnp_dtype
    )
    inputs_BSD, valid_BS = constrain_rows((inputs_BSD, valid_BS), self.mesh)
    cache = constrain_cache(cache, self.config.decoder.kv_heads, self.mesh)
    if lora_scale is not None:
      lora_scale = constrain_rows(jnp.asarray(lora_scale, jnp.float32), self.mesh)
    hidden_BSD, cache = speech_llm.decode(
      self.params, inputs_BSD, valid_BS, self.config, cache=cache, lora_scale=lora_scale
    )
    prefilled = Rows(
      state=search.start(rows, self.options, padding_B),
      cache=cache,
      prompt_B=valid_BS.sum(axis=1, dtype=jnp.int32),
      keys_B=keys_B,
      begin_B=jnp.zeros(rows, jnp.int32),
      clock=jnp.zeros((), jnp.int32),
      lora_scale=lora_scale,
    )
    return self.choose(prefilled, hidden_BSD[:, -1:]), hidden_BSD

  def choose(self, rows: Rows, hidden_BRD) -> Rows:
    """Chooses the next tokens; the hidden states have one entry for all R hypotheses, or R."""
    logits_BRV = speech_llm.logits(self.params, hidden_BRD, self.config)
    shape = logits_BRV.shape[0], self.options.width, logits_BRV.shape[2]
    with jax.named_scope("search"):
      state = search.advance(
        rows.state,
        jnp.broadcast_to(logits_BRV, shape),
        self.options,
        min_new_B=min_new_tokens(rows.prompt_B, self.options),
        keys_B=jax.vmap(jax.random.fold_in)(rows.keys_B, rows.state.step_B),
      )
    return rows.replace(state=state)  # type: ignore[attr-defined]

  def step(self, rows: Rows):
    """Reads the tokens chosen last and chooses the next ones: (Rows, hidden states [B, R, D])."""
    state = rows.state
    last_B11 = jnp.maximum(state.step_B - 1, 0)[:, None, None]
    hidden_BRD, cache = self.read(
      rows,
      jnp.take_along_axis(state.running.tokens_BRS, last_B11, axis=-1)[..., 0],
      last_BR=jnp.broadcast_to(last_B11[..., 0], state.running.lengths_BR.shape),
      past_BRS=jnp.arange(self.options.max_new_tokens) <= last_B11,
      slots_BRS=state.running.slots_BRS,
      clock=rows.clock,
    )
    clock = rows.clock + 1
    clock = jnp.where(clock < 2 * self.ring, clock, clock - self.ring)  # so that it never overflows
    rows = self.choose(rows.replace(cache=cache, clock=clock), hidden_BRD)  # type: ignore[attr-defined]
    return self.place(rows), hidden_BRD

  def read(self, rows: Rows, tokens_BR, *, last_BR, past_BRS, slots_BRS, clock):
    """(hidden [B, R, D], cache) of tokens that attend to the prompt, their past and themselves.

    Args:
      last_BR: place of each token among the generated ones of its hypothesis, from 0.
      past_BRS: bool, the places that it attends to, its own included.
      slots_BRS: which of the R slots of its step the token at each place was written to.
      clock: the step of the ring that the keys and values are written to; see `Rows`.
    """
    R, slots = self.options.width, rows.cache.valid_BS.shape[1]
    prompt_slots = slots - self.ring_slots
    seen_BRSR = past_BRS[..., None] & (slots_BRS[..., None] == jnp.arange(R))
    # Step n of the ring holds the tokens at this place.
    place_BS = (jnp.arange(self.ring) - rows.begin_B[:, None]) % self.ring
    seen_BRSR = jnp.take_along_axis(seen_BRSR, place_BS[:, None, :, None], axis=2)
    seen_BRT = seen_BRSR.reshape(*tokens_BR.shape, -1)
    prompt_BRT = jnp.ones((*tokens_BR.shape, prompt_slots), bool)
    placement = Placement(
      rows.prompt_B[:, None] + last_BR,
      jnp.concatenate([prompt_BRT, seen_BRT], axis=-1),
      end=prompt_slots + jnp.minimum(clock + 1, self.ring) * R,
    )
    cache = rows.cache.replace(filled=prompt_slots + clock % self.ring * R)  # type: ignore[attr-defined]
    inputs_BRD = constrain_rows(speech_llm.embed(self.params, tokens_BR, self.config), self.mesh)
    valid_BR = jnp.ones(tokens_BR.shape, bool)
    options = dict(cache=cache, placement=placement, lora_scale=rows.lora_scale)
    return speech_llm.decode(self.params, inputs_BRD, valid_BR, self.config, **options)

  def check(self, *, key: jax.Array | None) -> None:
    """Raises ValueError if the params are stacked, or sampling has no key."""
    if self.config.compute.scan or "layers" in self.params["decoder"]:
      raise ValueError(
        "generate needs compute.scan=False and per-layer params: tree.unstack_layers"
      )
    if self.options.do_sample and key is None:
      raise ValueError("do_sample=True needs a PRNG key: generate(..., key=jax.random.key(seed))")


def row_keys(key: jax.Array | None, rows: int) -> jax.Array:
  """A key for each row: fold_in(key, row)."""
  key = jax.random.key(0) if key is None else key
  return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))


def last_tokens(found: search.Hypotheses) -> jax.Array:
  """The last token of each hypothesis, [B, R]."""
  last_BR1 = jnp.maximum(found.lengths_BR - 1, 0)[..., None]
  return jnp.take_along_axis(found.tokens_BRS, last_BR1, axis=-1)[..., 0]
