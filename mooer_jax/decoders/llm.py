"""The language model: LLaMA's layout with Qwen2's options, LoRA and an explicit KV cache."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from mooer_jax import kernels
from mooer_jax.kernels.attention import precision
from mooer_jax.nn.compute import ExecutionConfig, repeat_layer, run_layers
from mooer_jax.nn.layers import Dense, RMSNorm
from mooer_jax.nn.positions import rope_angles, rotate


@flax.struct.dataclass
class KVCache:
  """Keys and values of every layer, in slots that fill from the left.

  Attributes:
    layers: one (keys, values) pair a layer, each [B, S, K, C], S slots.
    valid_BS: bool, True where a filled slot may be attended to.
    filled: int32 scalar, slots filled so far, the same for all rows.
    positions_B: int32, rotary position of each row's next token.
  """

  layers: tuple[tuple[jax.Array, jax.Array], ...]
  valid_BS: jax.Array
  filled: jax.Array
  positions_B: jax.Array

  @classmethod
  def create(cls, *, layers: int, batch: int, slots: int, kv_heads: int, channels: int, dtype):
    """An empty cache; `slots` bounds prompt plus generated tokens."""
    shape = (batch, slots, kv_heads, channels)
    return cls(
      layers=tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)),
      valid_BS=jnp.zeros((batch, slots), bool),
      filled=jnp.zeros((), jnp.int32),
      positions_B=jnp.zeros((batch,), jnp.int32),
    )

  def grow(self, slots: int) -> "KVCache":
    """The same with room for `slots` more; a prompt read before it attends to no empty slots."""

    def longer(x):
      return jnp.pad(x, [(0, 0), (0, slots), *[(0, 0)] * (x.ndim - 2)])

    return self.replace(  # type: ignore[attr-defined]
      layers=jax.tree.map(longer, self.layers), valid_BS=longer(self.valid_BS)
    )


def write(slots_BSKC: jax.Array, new_BTKC: jax.Array, filled: jax.Array) -> jax.Array:
  """Writes T new entries behind the filled slots; XLA does it in place inside a loop."""
  return jax.lax.dynamic_update_slice_in_dim(
    slots_BSKC, new_BTKC.astype(slots_BSKC.dtype), filled, axis=1
  )


LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LLMConfig:
  """Sizes of the decoder; the defaults are Qwen2-7B.

  Attributes:
    qkv_bias: Qwen2 has a bias on q, k and v, LLaMA has none.
    tie_word_embeddings: logits from the embedding table instead of a head of their own.
    lora_rank: 0 for none; lora_alpha / lora_rank is the scale that training uses.
  """

  kind: ClassVar[str] = "llm"
  RENAMED: ClassVar = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "tied": "tie_word_embeddings",
  }
  vocab_size: int = 152064
  hidden_size: int = 3584
  layers: int = 28
  heads: int = 28
  kv_heads: int = 4
  head_dim: int = 128
  intermediate_size: int = 18944
  rope_theta: float = 1e6
  norm_eps: float = 1e-6
  qkv_bias: bool = True
  tie_word_embeddings: bool = False
  lora_rank: int = 0
  lora_alpha: float = 16.0
  lora_dropout: float = 0.0
  lora_targets: tuple[str, ...] = LORA_TARGETS

  def __post_init__(self):
    for name in (
      "vocab_size",
      "hidden_size",
      "layers",
      "heads",
      "kv_heads",
      "head_dim",
      "intermediate_size",
    ):
      if getattr(self, name) < 1:
        raise ValueError(f"llm.{name}={getattr(self, name)} must be positive")
    if self.lora_rank < 0 or not 0 <= self.lora_dropout < 1:
      raise ValueError(
        f"llm.lora_rank={self.lora_rank} must be 0 or more,"
        f" llm.lora_dropout={self.lora_dropout} in [0, 1)"
      )
    if self.heads % self.kv_heads:
      raise ValueError(f"llm.heads={self.heads} does not divide by llm.kv_heads={self.kv_heads}")
    if self.head_dim % 2:
      raise ValueError(f"llm.head_dim={self.head_dim} must be even: RoPE rotates pairs")
    if unknown := set(self.lora_targets) - set(LORA_TARGETS):
      raise ValueError(f"llm.lora_targets: unknown {sorted(unknown)}; choose from {LORA_TARGETS}")

  @property
  def lora_scale(self) -> float:
    return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0


class Placement(NamedTuple):
  """Where new inputs stand if they do not simply follow one another, as beams of one prompt.

  Attributes:
    positions_BS: int32, rotary positions of the new inputs.
    sees_BST: bool [B, S, slots of the cache], True where an input may see a slot, its own
      included (input s goes into slot filled + s).
  """

  positions_BS: jax.Array
  sees_BST: jax.Array


class Context(NamedTuple):
  """What every layer sees besides its input."""

  angles_BSC: jax.Array
  valid_BS: jax.Array
  filled: Any  # array, or the int 0
  lora_scale: jax.Array | float
  sees_BST: jax.Array | None


class _Block(nn.Module):
  config: LLMConfig
  compute: ExecutionConfig

  def dense(self, name: str, features: int, *, use_bias: bool = False) -> Dense:
    c = self.config
    rank = c.lora_rank if name in c.lora_targets else 0
    return Dense(
      features,
      use_bias=use_bias,
      rank=rank,
      dropout=c.lora_dropout,
      dtype=self.compute.jnp_dtype,
      name=name,
    )


class Attention(_Block):
  """Causal self-attention with rotary positions, grouped KV heads and an optional cache."""

  @nn.compact
  def __call__(self, x_BSD: jax.Array, context: Context, cache: tuple | None):
    c, scale = self.config, context.lora_scale
    q = self.dense("q", c.heads * c.head_dim, use_bias=c.qkv_bias)(x_BSD, scale)
    k = self.dense("k", c.kv_heads * c.head_dim, use_bias=c.qkv_bias)(x_BSD, scale)
    v = self.dense("v", c.kv_heads * c.head_dim, use_bias=c.qkv_bias)(x_BSD, scale)
    q_BSHC, k_BSKC, v_BSKC = (rearrange(x, "B S (H C) -> B S H C", C=c.head_dim) for x in (q, k, v))
    q_BSHC = rotate(q_BSHC, context.angles_BSC)
    k_BSKC = rotate(k_BSKC, context.angles_BSC)
    if cache is not None:
      cache = tuple(
        write(slots, new, context.filled)
        for slots, new in zip(cache, (k_BSKC, v_BSKC), strict=True)
      )
      k_BSKC, v_BSKC = cache
    out_BSHC = kernels.attention(
      q_BSHC,
      k_BSKC.astype(q_BSHC.dtype),
      v_BSKC.astype(q_BSHC.dtype),
      valid_BS=context.valid_BS,
      causal=context.sees_BST is None,
      first_query=context.filled,
      sees_BTS=context.sees_BST,
      implementation=self.compute.attention,
    )
    out_BSD = rearrange(out_BSHC, "B S H C -> B S (H C)")
    return self.dense("o", c.hidden_size)(out_BSD, scale), cache


class MLP(_Block):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  @nn.compact
  def __call__(self, x_BSD: jax.Array, lora_scale: jax.Array | float) -> jax.Array:
    c = self.config
    gate_BSM = self.dense("gate", c.intermediate_size)(x_BSD, lora_scale)
    up_BSM = self.dense("up", c.intermediate_size)(x_BSD, lora_scale)
    return self.dense("down", c.hidden_size)(jax.nn.silu(gate_BSM) * up_BSM, lora_scale)


class Layer(nn.Module):
  """Pre-norm attention and MLP, each with a residual."""

  config: LLMConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array, context: Context, cache: tuple | None = None):
    c = self.config
    normed = RMSNorm(c.norm_eps, name="input_norm")(x_BSD)
    out_BSD, cache = Attention(c, self.compute, name="attention")(normed, context, cache)
    x_BSD = x_BSD + out_BSD
    normed = RMSNorm(c.norm_eps, name="mlp_norm")(x_BSD)
    return x_BSD + MLP(c, self.compute, name="mlp")(normed, context.lora_scale), cache


def _to_vocab(hidden_BSD, table_DV):
  return jnp.matmul(
    hidden_BSD,
    table_DV.astype(hidden_BSD.dtype),
    precision=precision(hidden_BSD.dtype),
    preferred_element_type=jnp.float32,
  )


class Head(nn.Module):
  """Hidden states to float32 logits, for models that do not tie them to the embedding."""

  vocab_size: int

  @nn.compact
  def __call__(self, hidden_BSD: jax.Array) -> jax.Array:
    width = hidden_BSD.shape[-1]
    spread = nn.initializers.normal(width**-0.5)
    return _to_vocab(hidden_BSD, self.param("kernel", spread, (width, self.vocab_size)))


class LLM(nn.Module):
  """Decoder-only transformer over embeddings; a pure function of (params, inputs, cache).

  Rows may hold invalid slots anywhere: they are never attended to and take no position, so a
  padded batch gives every row the result it has alone.

  Source: LLaMA (Touvron et al., 2023); Qwen2 (Yang et al., 2024).
  """

  config: LLMConfig = LLMConfig()
  compute: ExecutionConfig = ExecutionConfig()

  def setup(self):
    c = self.config
    # From scratch, a spread that shrinks with the size: the usual 0.02 leaves small models at the
    # level of guessing for hundreds of updates.
    spread = nn.initializers.normal(c.hidden_size**-0.5)
    self.embed = nn.Embed(
      c.vocab_size, c.hidden_size, dtype=self.compute.jnp_dtype, embedding_init=spread
    )
    self.layers = repeat_layer(Layer, c.layers, self.compute)(c, self.compute)
    self.final_norm = RMSNorm(c.norm_eps)
    if not c.tie_word_embeddings:
      self.head = Head(c.vocab_size)

  def __call__(
    self,
    inputs_BSD: jax.Array,
    valid_BS: jax.Array,
    cache: KVCache | None = None,
    lora_scale: jax.Array | float | None = None,
    placement: Placement | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Runs the layers over new inputs, after what the cache holds.

    Args:
      inputs_BSD: embeddings of the new slots.
      valid_BS: bool, True for the new slots that hold a token.
      cache: what went before, or None; the caller sees to it that S new slots fit.
      lora_scale: scalar or [B]; None is the scale of training, alpha / rank.
      placement: for inputs that are not the next ones of their row in order; the cache's own
        count of positions then stays as it is.

    Returns:
      (hidden [B, S, D] after the final norm, the cache with the new slots, or None).
    """
    c = self.config
    scale = c.lora_scale if lora_scale is None else lora_scale
    counts_BS = jnp.cumsum(valid_BS, axis=1, dtype=jnp.int32)
    filled: Any = 0
    seen_BS, before_B1 = valid_BS, jnp.zeros((valid_BS.shape[0], 1), jnp.int32)
    if cache is not None:
      filled, before_B1 = cache.filled, cache.positions_B[:, None]
      seen_BS = write(cache.valid_BS, valid_BS, filled)
    after_B1, sees_BST = before_B1 + counts_BS[:, -1:], None
    positions_BS = jnp.maximum(before_B1 + counts_BS - 1, 0)
    if placement is not None:
      after_B1, (positions_BS, sees_BST) = before_B1, placement
    angles_BSC = rope_angles(positions_BS, c.head_dim, c.rope_theta)
    context = Context(angles_BSC, seen_BS, filled, scale, sees_BST)
    x_BSD = inputs_BSD.astype(self.compute.jnp_dtype)
    x_BSD, layers = run_layers(self.layers, x_BSD, context, None if cache is None else cache.layers)
    if cache is not None:
      cache = KVCache(
        layers=layers,
        valid_BS=seen_BS,
        filled=filled + inputs_BSD.shape[1],
        positions_B=after_B1[:, 0],
      )
    return self.final_norm(x_BSD), cache

  def embed_tokens(self, tokens_BS: jax.Array) -> jax.Array:
    """Embeddings [B, S, D]; ids below 0 (padding) take row 0, mask them."""
    return self.embed(jnp.maximum(tokens_BS, 0))

  def logits(self, hidden_BSD: jax.Array) -> jax.Array:
    """Float32 [B, S, V]; call it only where logits are needed."""
    if self.config.tie_word_embeddings:
      return _to_vocab(hidden_BSD, self.embed.embedding.T)
    return self.head(hidden_BSD)

  def everything(self, inputs_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
    """Touches every parameter once; `init` runs it."""
    tokens_B1 = jnp.zeros((inputs_BSD.shape[0], 1), jnp.int32)
    hidden_BSD, _ = self(inputs_BSD + self.embed_tokens(tokens_B1), valid_BS)
    return self.logits(hidden_BSD)
