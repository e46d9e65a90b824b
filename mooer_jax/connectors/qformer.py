"""SALMONN's window-level Q-Former: each window of frames gives the same number of tokens."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from mooer_jax import kernels
from mooer_jax.nn.compute import LAYER, ExecutionConfig, repeat_layer, run_layers
from mooer_jax.nn.layers import Dense, FeedForward, LayerNorm, check_sizes, dense_sharding, gelu

# BERT's initializer of kernels and queries.
_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
  """Sizes of the Q-Former; encoders and LLM determine those of input and output.

  Attributes:
    window: frames in a window; 17 frames of 20 ms are a third of a second.
    stride: frames from one window to the next, at most `window`.
    queries: tokens for each window.
    edge: "drop" drops frames at the end that do not fill a window (SALMONN's released code), "pad"
      pads the last window with zeros (SALMONN's paper).
    dropout: of attention weights and residual branches, in training.
  """

  kind: ClassVar[str] = "qformer"
  RENAMED: ClassVar = {"width": "hidden_size", "mlp_width": "intermediate_size"}
  SIZES: ClassVar[Mapping[str, "QFormerConfig"]]
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ("dropout",)
  SHARDING: ClassVar = dense_sharding(
    outputs=rf"qformer/{LAYER}/(\w*attention/[qkv]|feed_forward/up)",
    inputs=rf"qformer/{LAYER}/(\w*attention/out|feed_forward/down)",
    whole=rf"queries|project/.*|qformer/({LAYER}/\w+_)?norm/(scale|bias)",
  )
  window: int = 17
  stride: int = 17
  queries: int = 1
  hidden_size: int = 768
  layers: int = 2
  heads: int = 12
  intermediate_size: int = 3072
  norm_eps: float = 1e-12
  edge: Literal["drop", "pad"] = "drop"
  dropout: float = 0.0

  def __post_init__(self):
    sizes = [field.name for field in dataclasses.fields(self) if field.type is int]
    check_sizes(self, *sizes, divisible={"hidden_size": "heads"})
    if self.stride > self.window:
      limit = f"qformer.window={self.window}; frames between the windows would be lost"
      raise ValueError(f"qformer.stride={self.stride} must be at most {limit}")
    if self.edge not in ("drop", "pad"):
      raise ValueError(f"qformer.edge={self.edge!r}: use 'drop' or 'pad'")

  @property
  def min_frames(self) -> int:
    return self.window if self.edge == "drop" else 1

  def num_tokens(self, frames: int) -> int:
    # As torch's unfold counts: floor((frames - window) / stride) + 1 windows where the edge is
    # dropped, ceil instead of floor where it is padded.
    if frames < self.min_frames:
      return 0
    beyond = max(frames - self.window, 0)
    rounded = beyond if self.edge == "drop" else beyond + self.stride - 1
    return self.queries * (rounded // self.stride + 1)

  def module(self, output_width: int, compute: ExecutionConfig) -> "WindowedQFormer":
    return WindowedQFormer(self, output_width, compute)


QFormerConfig.SIZES = {"qformer": QFormerConfig()}


def cut_windows(frames_BTD: jax.Array, config: QFormerConfig) -> jax.Array:
  """Cut frames [B, T, D] into windows [B, W, L, D]; a padded edge is zeros.

  Raises ValueError if T frames give no window.
  """
  c = config
  T = frames_BTD.shape[1]
  windows = c.num_tokens(T) // c.queries
  if not windows:
    raise ValueError(
      f"qformer.window={c.window} with qformer.edge={c.edge!r} needs {c.min_frames} encoder frames,"
      f" got {T}: give longer audio" + (", or set qformer.edge='pad'" if c.edge == "drop" else "")
    )
  end = (windows - 1) * c.stride + c.window
  frames_BTD = jnp.pad(frames_BTD, ((0, 0), (0, max(end - T, 0)), (0, 0)))[:, :end]
  if c.stride == c.window:  # a gather would copy, and its gradient scatter
    return rearrange(frames_BTD, "B (W L) D -> B W L D", L=c.window)
  return frames_BTD[:, c.stride * np.arange(windows)[:, None] + np.arange(c.window)]


def valid_windows(frames_B: jax.Array, windows: int, config: QFormerConfig) -> jax.Array:
  """bool [B, W], True for the windows that the frames of each clip give without padding."""
  starts_W = config.stride * np.arange(windows)
  # A dropped edge needs the whole window, a padded one a frame after the previous window.
  if config.edge == "drop":
    needed_W = starts_W + config.window
  else:
    needed_W = np.where(starts_W > 0, starts_W - config.stride + config.window + 1, 1)
  return frames_B[:, None] >= needed_W


class QFormerAttention(nn.Module):
  """Multi-head attention; keys may have another width than queries and output."""

  config: QFormerConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_NQD: jax.Array, keys_NSE: jax.Array) -> jax.Array:
    c = self.config
    dense = functools.partial(
      Dense, c.hidden_size, use_bias=True, dtype=self.compute.jnp_dtype, kernel_init=_INIT
    )

    def project(inputs, name):
      y = dense(name=name)(inputs)
      return rearrange(y, "N S (H C) -> N S H C", H=c.heads)

    N, Q, S = *x_NQD.shape[:2], keys_NSE.shape[1]
    scale_NHQS = None
    if c.dropout and self.has_rng("dropout"):
      keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - c.dropout, (N, c.heads, Q, S))
      scale_NHQS = keep / (1 - c.dropout)
    out_NQHC = kernels.window_attention(
      project(x_NQD, "q"),
      project(keys_NSE, "k"),
      project(keys_NSE, "v"),
      weight_scale_NHQL=scale_NHQS,
      **self.compute.attention_options,
    )
    return dense(name="out")(rearrange(out_NQHC, "N Q H C -> N Q (H C)"))


class QFormerLayer(nn.Module):
  """Self-attention of the queries, cross-attention to the window, feed-forward; post-norm."""

  config: QFormerConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_NQD: jax.Array, windows_NLE: jax.Array, cache: None = None):
    c, dtype = self.config, self.compute.jnp_dtype
    dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))

    def add(x, change, name):
      return LayerNorm(c.norm_eps, dtype=dtype, name=f"{name}_norm")(x + dropout(change))

    attention = QFormerAttention(c, self.compute, name="attention")
    cross_attention = QFormerAttention(c, self.compute, name="cross_attention")
    x_NQD = add(x_NQD, attention(x_NQD, x_NQD), "attention")
    x_NQD = add(x_NQD, cross_attention(x_NQD, windows_NLE), "cross_attention")
    mlp = FeedForward(
      c.intermediate_size, gelu, dtype=dtype, kernel_init=_INIT, name="feed_forward"
    )
    return add(x_NQD, mlp(x_NQD), "feed_forward"), cache


class QFormer(nn.Module):
  """Queries [Q, D] and independent windows [N, L, E] to [N, Q, D].

  Queries attend to all frames of a window, also to zeros at its end, as in the original.

  Source: BLIP-2 (Li et al., 2023), here with cross-attention in every layer.
  """

  config: QFormerConfig
  compute: ExecutionConfig

  def setup(self):
    c = self.config
    self.norm = LayerNorm(c.norm_eps, dtype=self.compute.jnp_dtype)
    self.layers = repeat_layer(QFormerLayer, c.layers, self.compute)(c, self.compute)
    self.dropout = nn.Dropout(c.dropout)

  def __call__(self, queries_QD: jax.Array, windows_NLE: jax.Array) -> jax.Array:
    dtype = self.compute.jnp_dtype
    x_QD = self.norm(queries_QD.astype(dtype))
    x_NQD = jnp.broadcast_to(x_QD, (windows_NLE.shape[0], *x_QD.shape))
    x_NQD = self.dropout(x_NQD, deterministic=not self.has_rng("dropout"))
    x_NQD, _ = run_layers(self.layers, x_NQD, windows_NLE.astype(dtype))
    return x_NQD


class WindowedQFormer(nn.Module):
  """Encoder frames to speech tokens, window by window: [B, T, D] to [B, W * Q, output_width].

  `apply({"params": params}, frames_BTD, valid_BT)`; valid frames are the first ones of each row,
  the others are set to zero. The tokens of a clip do not depend on the padding. Dropout is active
  only if a "dropout" RNG is given.

  Source: SALMONN (Tang et al., 2023), section 3.1.
  """

  config: QFormerConfig
  output_width: int
  compute: ExecutionConfig = ExecutionConfig()

  @nn.compact
  def __call__(self, frames_BTD: jax.Array, valid_BT: jax.Array):
    """Returns tokens and their validity, bool [B, W * Q]; ValueError if T frames give no token."""
    c = self.config
    frames_BTD = jnp.where(valid_BT[..., None], frames_BTD, 0)
    windows_BWLD = cut_windows(frames_BTD, c)
    W = windows_BWLD.shape[1]
    valid_BW = valid_windows(valid_BT.sum(1), W, c)
    queries_QD = self.param("queries", _INIT, (c.queries, c.hidden_size))
    qformer = QFormer(c, self.compute, name="qformer")
    hidden_NQD = qformer(queries_QD, rearrange(windows_BWLD, "B W L D -> (B W) L D"))
    project = Dense(self.output_width, use_bias=True, dtype=self.compute.jnp_dtype, name="project")
    tokens_BSD = rearrange(project(hidden_NQD), "(B W) Q D -> B (W Q) D", W=W)
    return tokens_BSD, repeat(valid_BW, "B W -> B (W Q)", Q=c.queries)
