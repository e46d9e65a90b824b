"""How the next token is chosen from logits."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Decoding options, named and meant as in `transformers.generate`.

  Attributes:
    max_new_tokens: upper bound on generated tokens, eos included.
    eos_ids: tokens that end an answer.
    do_sample: False takes the most probable token (greedy), True draws.
    temperature: divides the logits before drawing, > 0.
    top_k: draws from the k most probable tokens only; 0 = all.
    top_p: draws from the smallest set of most probable tokens that holds this much mass.
  """

  max_new_tokens: int = 200
  eos_ids: tuple[int, ...] = ()
  do_sample: bool = False
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise ValueError(f"generation.max_new_tokens={self.max_new_tokens}: at least 1")
    if self.temperature <= 0:
      raise ValueError(
        f"generation.temperature={self.temperature}: must be > 0; for greedy set do_sample=False"
      )
    if self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(
        f"generation.top_k={self.top_k} must be >= 0 and top_p={self.top_p} in (0, 1]"
      )


def choose(logits_BV: jax.Array, options: Sampling, keys_B: jax.Array) -> jax.Array:
  """Picks one token a row: int32 [B].

  Args:
    logits_BV: float32.
    options: see Sampling.
    keys_B: one PRNG key a row, so that a row's draw does not depend on its neighbours.
  """
  if not options.do_sample:
    return logits_BV.argmax(-1).astype(jnp.int32)
  logits_BV = restrict(logits_BV / options.temperature, top_k=options.top_k, top_p=options.top_p)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def restrict(logits_BV: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
  """Sets logits outside the k most probable, then outside the nucleus of mass p, to -inf.

  Ties with the k-th logit stay in. The nucleus always holds the most probable token; of equal
  logits at its edge, those with the lower ids are in.

  Source: nucleus sampling (Holtzman et al., 2020).
  """
  vocab = logits_BV.shape[-1]
  if 0 < top_k < vocab:
    kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if top_p < 1:
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    probs_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    mass_before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    rank_BV = jnp.argsort(order_BV, axis=-1)
    keep_BV = jnp.take_along_axis(mass_before_BV < top_p, rank_BV, axis=-1)
    logits_BV = jnp.where(keep_BV, logits_BV, -jnp.inf)
  return logits_BV
