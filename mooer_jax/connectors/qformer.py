"""SALMONN's window-level Q-Former: each window of frames becomes the same number of tokens."""

import dataclasses
import functools
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from mooer_jax import kernels
from mooer_jax.nn.compute import ExecutionConfig, repeat_layer, run_layers
from mooer_jax.nn.layers import Dense, LayerNorm

# What BERT's kernels and queries start from.
_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
  """Sizes of the Q-Former; input and output width follow from its neighbours.

  Attributes:
    window: frames that one window holds; 17 frames of 20 ms are a third of a second.
    stride: frames from one window to the next, at most `window`.
    queries: tokens made of each window.
    edge: "drop" leaves out frames that fill no whole window (SALMONN's released code), "pad" adds
      zeros so that the last window holds them (SALMONN's paper).
    dropout: of attention weights and of what is added to a residual, while training.
  """

  kind: ClassVar[str] = "qformer"
  RENAMED: ClassVar = {"width": "hidden_size", "mlp_width": "intermediate_size"}
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
    for name in (
      "window",
      "stride",
      "queries",
      "hidden_size",
      "layers",
      "heads",
      "intermediate_size",
    ):
      if getattr(self, name) < 1:
        raise ValueError(f"qformer.{name}={getattr(self, name)} must be positive")
    if self.stride > self.window:
      raise ValueError(
        f"qformer.stride={self.stride} leaves frames between windows of"
        f" qformer.window={self.window} unheard; it may be at most {self.window}"
      )
    if self.hidden_size % self.heads:
      raise ValueError(
        f"qformer.hidden_size={self.hidden_size} does not divide into qformer.heads={self.heads}"
      )
    if self.edge not in ("drop", "pad"):
      raise ValueError(f"qformer.edge={self.edge!r}: use 'drop' or 'pad'")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"qformer.dropout={self.dropout} must be at least 0 and below 1")

  def num_tokens(self, frames: int) -> int:
    """Speech tokens that so many encoder frames become."""
    return num_tokens(frames, self)


QFORMER_SIZES = {"qformer": QFormerConfig()}


def num_tokens(frames: int, config: QFormerConfig) -> int:
  """Tokens that a clip of so many encoder frames gives; 0 if it is shorter than the first window.

  As torch's unfold counts: floor((frames - window) / stride) + 1 windows where the edge is
  dropped, ceil instead of floor where it is padded.
  """
  if frames < shortest_frames(config):
    return 0
  beyond = max(frames - config.window, 0)
  rounded = beyond if config.edge == "drop" else beyond + config.stride - 1
  return config.queries * (rounded // config.stride + 1)


def shortest_frames(config: QFormerConfig) -> int:
  """Encoder frames that the first token needs."""
  return config.window if config.edge == "drop" else 1


def cut_windows(frames_BTD: jax.Array, config: QFormerConfig) -> jax.Array:
  """Windows [B, W, L, D] of frames [B, T, D]; a padded edge is filled with zeros.

  Raises:
    ValueError: if T frames give no window.
  """
  c = config
  T = frames_BTD.shape[1]
  windows = num_tokens(T, c) // c.queries
  if not windows:
    raise ValueError(
      f"qformer.window={c.window} with qformer.edge={c.edge!r} makes no token of {T} encoder"
      f" frames; {shortest_frames(c)} are needed: give longer audio"
      + (", or set qformer.edge='pad'" if c.edge == "drop" else "")
    )
  end = (windows - 1) * c.stride + c.window
  frames_BTD = jnp.pad(frames_BTD, ((0, 0), (0, max(end - T, 0)), (0, 0)))[:, :end]
  if c.stride == c.window:  # a gather would copy, and its gradient scatter
    return rearrange(frames_BTD, "B (W L) D -> B W L D", L=c.window)
  return frames_BTD[:, c.stride * np.arange(windows)[:, None] + np.arange(c.window)]


def valid_windows(frames_B: jax.Array, windows: int, config: QFormerConfig) -> jax.Array:
  """bool [B, W]: the windows that a clip of so many frames has when it is alone."""
  starts_W = config.stride * np.arange(windows)
  # A dropped edge needs the whole window; a padded one a frame that the window before lacks.
  if config.edge == "drop":
    needed_W = starts_W + config.window
  else:
    needed_W = np.where(starts_W > 0, starts_W - config.stride + config.window + 1, 1)
  return frames_B[:, None] >= needed_W


class QFormerAttention(nn.Module):
  """Multi-head attention of queries to keys of any width, back to the queries' width."""

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
    out_NQHC = kernels.attention(
      project(x_NQD, "q"),
      project(keys_NSE, "k"),
      project(keys_NSE, "v"),
      valid_BS=jnp.ones((N, S), bool),
      weight_scale_BHTS=scale_NHQS,
      implementation=self.compute.attention,
    )
    return dense(name="out")(rearrange(out_NQHC, "N Q H C -> N Q (H C)"))


class FeedForward(nn.Module):
  """Linear, GELU, linear."""

  config: QFormerConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_NQD: jax.Array) -> jax.Array:
    c, dtype = self.config, self.compute.jnp_dtype
    hidden = Dense(c.intermediate_size, use_bias=True, dtype=dtype, kernel_init=_INIT, name="up")(
      x_NQD
    )
    hidden = jax.nn.gelu(hidden, approximate=False)
    return Dense(c.hidden_size, use_bias=True, dtype=dtype, kernel_init=_INIT, name="down")(hidden)


class QFormerLayer(nn.Module):
  """Among the queries, to the window, feed-forward: each added, then normalised."""

  config: QFormerConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_NQD: jax.Array, windows_NLE: jax.Array, cache: None = None):
    c = self.config
    dropout = nn.Dropout(c.dropout, deterministic=not (c.dropout and self.has_rng("dropout")))

    def add(x, change, name):
      return LayerNorm(c.norm_eps, name=f"{name}_norm")(x + dropout(change))

    attention = QFormerAttention(c, self.compute, name="attention")
    cross_attention = QFormerAttention(c, self.compute, name="cross_attention")
    x_NQD = add(x_NQD, attention(x_NQD, x_NQD), "attention")
    x_NQD = add(x_NQD, cross_attention(x_NQD, windows_NLE), "cross_attention")
    x_NQD = add(x_NQD, FeedForward(c, self.compute, name="feed_forward")(x_NQD), "feed_forward")
    return x_NQD, cache


class QFormer(nn.Module):
  """A pure function of one window, for many: queries [Q, D], windows [N, L, E] to [N, Q, D].

  All frames of a window are attended, zeros at its end too, as in the original.

  Source: BLIP-2 (Li et al., 2023), whose BERT layers attend to the input in every layer here.
  """

  config: QFormerConfig
  compute: ExecutionConfig

  def setup(self):
    c = self.config
    self.norm = LayerNorm(c.norm_eps)
    self.layers = repeat_layer(QFormerLayer, c.layers, self.compute)(c, self.compute)
    self.dropout = nn.Dropout(c.dropout)

  def __call__(self, queries_QD: jax.Array, windows_NLE: jax.Array) -> jax.Array:
    c, dtype = self.config, self.compute.jnp_dtype
    x_QD = self.norm(queries_QD.astype(dtype))
    x_NQD = jnp.broadcast_to(x_QD, (windows_NLE.shape[0], *x_QD.shape))
    dropped = c.dropout and self.has_rng("dropout")
    x_NQD = self.dropout(x_NQD, deterministic=not dropped)
    x_NQD, _ = run_layers(self.layers, x_NQD, windows_NLE.astype(dtype))
    return x_NQD


class WindowedQFormer(nn.Module):
  """Encoder frames to speech tokens, window by window: [B, T, D] to [B, W * Q, output_width].

  `apply({"params": params}, frames_BTD, valid_BT)`; the valid frames are the first of each row,
  what stands at the others is taken as zeros, and a clip has the tokens that it has alone. Dropout
  acts only when a "dropout" RNG is given.

  Source: SALMONN (Tang et al., 2023), section 3.1.
  """

  config: QFormerConfig
  output_width: int
  compute: ExecutionConfig = ExecutionConfig()

  @nn.compact
  def __call__(self, frames_BTD: jax.Array, valid_BT: jax.Array):
    """Returns (tokens [B, W * Q, output_width], valid bool [B, W * Q]), in the order of time.

    Raises:
      ValueError: if T frames give no token.
    """
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
