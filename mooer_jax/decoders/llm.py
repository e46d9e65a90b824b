"""The language model: LLaMA and Qwen2, with LoRA and an explicit KV cache."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P

from mooer_jax import kernels
from mooer_jax.kernels.arrays import precision
from mooer_jax.nn.compute import LAYER, ExecutionConfig, repeat_layer, run_layers
from mooer_jax.nn.layers import FSDP, TENSOR, Dense, RMSNorm, check_sizes
from mooer_jax.nn.positions import rope_angles, rotate


@flax.struct.dataclass
class KVCache:
  """Keys and values of all layers, in slots that are filled from the left.

  Attributes:
    layers: (keys, values) of each layer, each [B, S, K * C] with S slots.
    valid_BS: bool, True for filled slots that may be attended to.
    filled: int32 scalar, number of filled slots, the same for all rows.
    positions_B: int32, rotary position of the next token of each row.
  """

  layers: tuple[tuple[jax.Array, jax.Array], ...]
  valid_BS: jax.Array
  filled: jax.Array
  positions_B: jax.Array

  def grow(self, slots: int) -> "KVCache":
    """Append empty slots, for tokens after the prompt."""
    layers, valid_BS = jax.tree.map(
      lambda x: jnp.pad(x, [(0, 0), (0, slots), *[(0, 0)] * (x.ndim - 2)]),
      (self.layers, self.valid_BS),
    )
    return dataclasses.replace(self, layers=layers, valid_BS=valid_BS)


def write(slots_BSE: jax.Array, new_BTE: jax.Array, filled: jax.Array) -> jax.Array:
  """Write T new entries after the filled slots; XLA does it in place inside a loop."""
  new_BTE = new_BTE.astype(slots_BSE.dtype)
  return jax.lax.dynamic_update_slice_in_dim(slots_BSE, new_BTE, filled, axis=1)


LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LLMConfig:
  """Sizes of the decoder; the defaults are Qwen2-7B.

  Attributes:
    qkv_bias: Qwen2 has a bias on q, k and v, LLaMA has none.
    tie_word_embeddings: use the embedding table as the output head.
    lora_rank: rank of LoRA, 0 for none; lora_alpha / lora_rank is the scale in training.
  """

  kind: ClassVar[str] = "llm"
  RENAMED: ClassVar = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "tied": "tie_word_embeddings",
  }
  SIZES: ClassVar[Mapping[str, "LLMConfig"]]
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ("lora_dropout",)
  SHARDING: ClassVar = (
    ("embed/embedding", P(TENSOR, FSDP)),
    (rf"{LAYER}/(attention/[qkv]|mlp/(gate|up))/kernel(_int8)?", P(FSDP, TENSOR)),
    (rf"{LAYER}/(attention/[qkv]|mlp/(gate|up))/(bias|kernel_scale)", P(TENSOR)),
    (rf"{LAYER}/(attention/[qkv]|mlp/(gate|up))/lora_a", P(FSDP, None)),
    (rf"{LAYER}/(attention/[qkv]|mlp/(gate|up))/lora_b", P(None, TENSOR)),
    (rf"{LAYER}/(attention/o|mlp/down)/kernel(_int8)?", P(TENSOR, FSDP)),
    (rf"{LAYER}/(attention/o|mlp/down)/kernel_scale", P()),
    (rf"{LAYER}/(attention/o|mlp/down)/lora_a", P(TENSOR, None)),
    (rf"{LAYER}/(attention/o|mlp/down)/lora_b", P(None, FSDP)),
    (rf"({LAYER}/(input_norm|mlp_norm)|final_norm)/scale", P()),
    ("head/kernel(_int8)?", P(FSDP, TENSOR)),
    ("head/kernel_scale", P(TENSOR)),
  )
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
    sizes = ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_dim")
    check_sizes(self, *sizes, "intermediate_size", divisible={"heads": "kv_heads"})
    if self.lora_rank < 0:
      raise ValueError(f"llm.lora_rank={self.lora_rank} must be 0 or more")
    if not self.rope_theta:
      raise ValueError(f"llm.rope_theta={self.rope_theta} must be positive")
    if self.head_dim % 2:
      raise ValueError(f"llm.head_dim={self.head_dim} must be even, because RoPE rotates pairs")
    if unknown := set(self.lora_targets) - set(LORA_TARGETS):
      raise ValueError(f"llm.lora_targets: unknown {sorted(unknown)}; choose from {LORA_TARGETS}")

  @property
  def lora_scale(self) -> float:
    return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0

  def module(self, compute: ExecutionConfig) -> "LLM":
    return LLM(self, compute)

  def empty_cache(self, *, rows: int, slots: int, dtype: Any) -> KVCache:
    """A cache without entries; `slots` bounds the number of prompt and generated tokens."""
    shape = (rows, slots, self.kv_heads * self.head_dim)
    layers = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(self.layers))
    filled, positions_B = jnp.zeros((), jnp.int32), jnp.zeros((rows,), jnp.int32)
    return KVCache(layers, jnp.zeros((rows, slots), bool), filled=filled, positions_B=positions_B)


_SMALL_QWEN2 = LLMConfig(vocab_size=151936, kv_heads=2, tie_word_embeddings=True)
_LLAMA = LLMConfig(vocab_size=32000, rope_theta=1e4, norm_eps=1e-5, qkv_bias=False)
_SMOLLM2 = dataclasses.replace(_LLAMA, vocab_size=49152, rope_theta=1e5, tie_word_embeddings=True)
_VICUNA_13B = dataclasses.replace(_LLAMA, layers=40, heads=40, kv_heads=40, norm_eps=1e-6)  # v1.1
LLMConfig.SIZES = {
  "qwen2_7b": LLMConfig(),
  "qwen2_1.5b": dataclasses.replace(
    _SMALL_QWEN2, hidden_size=1536, heads=12, intermediate_size=8960
  ),
  "qwen2_0.5b": dataclasses.replace(
    _SMALL_QWEN2, hidden_size=896, layers=24, heads=14, head_dim=64, intermediate_size=4864
  ),
  "vicuna_7b": dataclasses.replace(  # v1.5
    _LLAMA, hidden_size=4096, layers=32, heads=32, kv_heads=32, intermediate_size=11008
  ),
  "vicuna_13b": dataclasses.replace(_VICUNA_13B, hidden_size=5120, intermediate_size=13824),
  "smollm2_135m": dataclasses.replace(
    _SMOLLM2, hidden_size=576, layers=30, heads=9, kv_heads=3, head_dim=64, intermediate_size=1536
  ),
}


class Placement(NamedTuple):
  """Positions and mask of inputs that are not consecutive tokens, such as beams of one prompt."""

  positions_BS: jax.Array  # int32, rotary positions of the new inputs
  # bool [B, S, slots of the cache], True where an input may attend to a slot; input s is in slot
  # filled + s.
  attention_mask_BST: jax.Array
  end: jax.Array | int  # number of slots, from the first, that may have been filled


class Context(NamedTuple):
  """Inputs that are the same for all layers."""

  angles_BSC: jax.Array
  valid_BS: jax.Array
  filled: Any  # array, or the int 0
  lora_scale: jax.Array | float
  attention_mask_BST: jax.Array | None
  end: jax.Array | int  # of the slots that may be attended to, if there is a mask


class _Block(nn.Module):
  config: LLMConfig
  compute: ExecutionConfig

  def dense(self, name: str, features: int, *, use_bias: bool = False) -> Dense:
    c, dtype = self.config, self.compute.jnp_dtype
    rank = c.lora_rank if name in c.lora_targets else 0
    return Dense(
      features, use_bias=use_bias, rank=rank, dropout=c.lora_dropout, dtype=dtype, name=name
    )


class Attention(_Block):
  """Causal self-attention with rotary positions, grouped KV heads and an optional cache."""

  @nn.compact
  def __call__(self, x_BSD: jax.Array, context: Context, cache: tuple | None):
    c, scale = self.config, context.lora_scale
    q = self.dense("q", c.heads * c.head_dim, use_bias=c.qkv_bias)(x_BSD, scale)
    k = self.dense("k", c.kv_heads * c.head_dim, use_bias=c.qkv_bias)(x_BSD, scale)
    v = self.dense("v", c.kv_heads * c.head_dim, use_bias=c.qkv_bias)(x_BSD, scale)
    split = functools.partial(rearrange, pattern="B S (H C) -> B S H C", C=c.head_dim)
    q_BSHC = rotate(split(q), context.angles_BSC)
    k_BSE = rearrange(rotate(split(k), context.angles_BSC), "B S K C -> B S (K C)")
    v_BSE = v
    if cache is not None:
      cache = tuple(
        write(slots, new, context.filled) for slots, new in zip(cache, (k_BSE, v_BSE), strict=True)
      )
      k_BSE, v_BSE = (x.astype(q_BSHC.dtype) for x in cache)
    if context.attention_mask_BST is None:
      out_BSHC = kernels.attention(
        q_BSHC,
        split(k_BSE),
        split(v_BSE),
        valid_BS=context.valid_BS,
        causal=True,
        first_query=context.filled,
        **self.compute.attention_options,
      )
    else:
      out_BSHC = kernels.decode_attention(
        q_BSHC,
        k_BSE,
        v_BSE,
        kv_heads=c.kv_heads,
        mask_BTS=context.valid_BS[:, None] & context.attention_mask_BST,
        end=context.end,
        **self.compute.attention_options,
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
    c, dtype = self.config, self.compute.jnp_dtype
    normed = RMSNorm(c.norm_eps, dtype=dtype, name="input_norm")(x_BSD)
    out_BSD, cache = Attention(c, self.compute, name="attention")(normed, context, cache)
    x_BSD = x_BSD + out_BSD
    normed = RMSNorm(c.norm_eps, dtype=dtype, name="mlp_norm")(x_BSD)
    return x_BSD + MLP(c, self.compute, name="mlp")(normed, context.lora_scale), cache


class LLM(nn.Module):
  """Decoder-only transformer over embeddings; a pure function of (params, inputs, cache).

  Rows may contain invalid slots anywhere. These are not attended to and have no position, so the
  result of a row does not depend on padding.

  Source: LLaMA (Touvron et al., 2023); Qwen2 (Yang et al., 2024).
  """

  config: LLMConfig = LLMConfig()
  compute: ExecutionConfig = ExecutionConfig()

  def setup(self):
    c = self.config
    # With the usual 0.02, small models trained from scratch stay at chance level for hundreds of
    # steps.
    spread = nn.initializers.normal(c.hidden_size**-0.5)
    self.embed = nn.Embed(
      c.vocab_size, c.hidden_size, dtype=self.compute.jnp_dtype, embedding_init=spread
    )
    self.layers = repeat_layer(Layer, c.layers, self.compute)(c, self.compute)
    self.final_norm = RMSNorm(c.norm_eps, dtype=self.compute.jnp_dtype)
    # Params for decoding may contain a head for tied embeddings, too (`generation.weights`).
    has_head = not c.tie_word_embeddings or self.has_variable("params", "head")
    self.head = None
    if has_head:
      dtype = self.compute.jnp_dtype
      self.head = Dense(c.vocab_size, dtype=dtype, output_dtype=jnp.float32, kernel_init=spread)

  def __call__(
    self,
    inputs_BSD: jax.Array,
    valid_BS: jax.Array,
    cache: KVCache | None = None,
    *,
    lora_scale: jax.Array | float | None = None,
    placement: Placement | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Run the layers over new inputs that follow those in the cache.

    Args:
      inputs_BSD: embeddings of the new slots.
      valid_BS: bool, True for new slots with a token.
      cache: previous keys and values, or None; must have S empty slots.
      lora_scale: scalar, [B] or [B, rank]; default: the scale of training, alpha / rank.
      placement: positions and mask of inputs that are not consecutive; the position of the cache
        does not change then.

    Returns:
      (hidden [B, S, D] after the final norm, the cache with the new slots, or None).
    """
    c = self.config
    scale = c.lora_scale if lora_scale is None else lora_scale
    counts_BS = jnp.cumsum(valid_BS, axis=1, dtype=jnp.int32)
    filled: Any = 0
    cached_valid_BS, start_B1 = valid_BS, jnp.zeros((valid_BS.shape[0], 1), jnp.int32)
    if cache is not None:
      filled, start_B1 = cache.filled, cache.positions_B[:, None]
      cached_valid_BS = write(cache.valid_BS, valid_BS, filled)
    end: Any = 0
    end_B1, attention_mask_BST = start_B1 + counts_BS[:, -1:], None
    positions_BS = jnp.maximum(start_B1 + counts_BS - 1, 0)
    if placement is not None:
      end_B1, (positions_BS, attention_mask_BST, end) = start_B1, placement
    angles_BSC = rope_angles(positions_BS, c.head_dim, c.rope_theta)
    context = Context(angles_BSC, cached_valid_BS, filled, scale, attention_mask_BST, end)
    x_BSD = inputs_BSD.astype(self.compute.jnp_dtype)
    caches = None if cache is None else cache.layers
    x_BSD, layers = run_layers(self.layers, x_BSD, context, caches=caches)
    if cache is not None:
      filled += inputs_BSD.shape[1]
      cache = KVCache(layers, cached_valid_BS, filled=filled, positions_B=end_B1[:, 0])
    return self.final_norm(x_BSD), cache

  def embed_tokens(self, tokens_BS: jax.Array) -> jax.Array:
    """Embeddings [B, S, D]; those of negative ids (padding) must be masked."""
    return self.embed(jnp.maximum(tokens_BS, 0))

  def logits(self, hidden_BSD: jax.Array) -> jax.Array:
    """Logits, float32 [B, S, V]."""
    if self.head is not None:
      return self.head(hidden_BSD)
    return jnp.matmul(
      hidden_BSD,
      self.embed.embedding.T.astype(hidden_BSD.dtype),
      precision=precision(hidden_BSD.dtype),
      preferred_element_type=jnp.float32,
    )

  def init_all_params(self, inputs_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
    """Use every parameter, for `init`."""
    tokens_B1 = jnp.zeros((inputs_BSD.shape[0], 1), jnp.int32)
    hidden_BSD, _ = self(inputs_BSD + self.embed_tokens(tokens_B1), valid_BS)
    return self.logits(hidden_BSD)
