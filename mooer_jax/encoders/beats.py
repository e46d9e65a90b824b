"""BEATs, an encoder of general audio: a post-norm transformer over patches of a spectrogram."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat

from mooer_jax import kernels
from mooer_jax.audio.fbank import FbankConfig
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.kernels.arrays import precision
from mooer_jax.kernels.attention import Bias
from mooer_jax.nn.compute import LAYER, ExecutionConfig, repeat_layer, run_layers
from mooer_jax.nn.layers import Dense, LayerNorm, check_sizes, dense_sharding, gelu

# Each of the two gates of a query is a sum of this number of outputs of a linear layer.
_GATE_TERMS = 4


@dataclasses.dataclass(frozen=True)
class BEATsConfig:
  """Sizes of the encoder; the defaults are BEATs iter3, 90.31 M parameters.

  Attributes:
    input_width: mel bins of a frame.
    patch: frames, and bins, of a patch.
    patch_width: width of a patch before the projection to `hidden_size`; none if they are equal.
    conv_pos, conv_pos_groups: taps and groups of the positional convolution.
    buckets: rows of the relative position bias, half of them for each direction.
    max_distance: distance in patches from which on keys share the last bucket.
    dropout: of the sum of patches and positions, and of residual branches.
  """

  kind: ClassVar[str] = "beats"
  RENAMED: ClassVar = {"width": "hidden_size", "mlp_width": "intermediate_size"}
  SIZES: ClassVar[Mapping[str, "BEATsConfig"]]
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ("dropout",)
  SHARDING: ClassVar = dense_sharding(
    outputs=rf"{LAYER}/(attention/[qkv]|up)",
    inputs=rf"{LAYER}/(attention/out|down)",
    whole=rf"{LAYER}/(\w+_norm|attention/gate)/.*|(patch|position|input|relative).*",
  )
  input_width: int = 128
  hidden_size: int = 768
  layers: int = 12
  heads: int = 12
  intermediate_size: int = 3072
  patch: int = 16
  patch_width: int = 512
  conv_pos: int = 128
  conv_pos_groups: int = 16
  buckets: int = 320
  max_distance: int = 800
  norm_eps: float = 1e-5
  dropout: float = 0.0

  def __post_init__(self):
    sizes = [field.name for field in dataclasses.fields(self) if field.type is int]
    check_sizes(self, *sizes, divisible={"hidden_size": "heads", "input_width": "patch"})
    check_sizes(self, divisible={"hidden_size": "conv_pos_groups"})
    if self.buckets % 2 or self.buckets < 4:
      raise ValueError(f"beats.buckets={self.buckets} must be even and at least 4")
    if self.max_distance <= self.buckets // 4:
      raise ValueError(
        f"beats.max_distance={self.max_distance} must exceed a quarter of beats.buckets,"
        f" {self.buckets // 4}: shorter distances have a bucket each"
      )

  @property
  def bands(self) -> int:
    """Number of patches on the frequency axis: tokens for `patch` frames."""
    return self.input_width // self.patch

  @property
  def max_frames(self) -> None:
    return None

  def num_outputs(self, frames: int) -> int:
    return frames // self.patch * self.bands

  def frontend(self) -> FrontendConfig:
    # Frames of fbank, not stacked; the converter writes CMVN, which is one mean and deviation.
    fbank = FbankConfig(bins=self.input_width, window="povey")
    return FrontendConfig(fbank=fbank, lfr_window=1, lfr_stride=1)

  def module(self, compute: ExecutionConfig) -> "BEATsEncoder":
    return BEATsEncoder(self, compute)


BEATsConfig.SIZES = {"beats_iter3": BEATsConfig()}


def distance_buckets(length: int, *, buckets: int, max_distance: int) -> np.ndarray:
  """Row of the bias table for each distance key - query: int32 [2T - 1], for -(T - 1) … T - 1.

  Short distances have a bucket each; longer ones share buckets of logarithmic size, and all from
  `max_distance` on the last one. The second half of the buckets is for keys after the query.

  Source: T5 (Raffel et al., 2020), in float32 as there, because the logarithm is truncated.
  """
  distance = np.arange(1 - length, length)
  half = buckets // 2
  exact = half // 2
  size = np.abs(distance)
  ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
  steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
  far = np.minimum(exact + steps.astype(np.int32), half - 1)
  return (half * (distance > 0) + np.where(size < exact, size, far)).astype(np.int32)


class RelativeBias(nn.Module):
  """Relative position bias by distance, shared by all layers: float32 [H, 2T - 1]."""

  config: BEATsConfig

  @nn.compact
  def __call__(self, length: int) -> jax.Array:
    c = self.config
    table = self.param("embedding", nn.initializers.normal(0.02), (c.buckets, c.heads))
    rows = distance_buckets(length, buckets=c.buckets, max_distance=c.max_distance)
    return jnp.take(table.astype(jnp.float32), rows, axis=0).T


class PositionConv(nn.Module):
  """Positional embedding: a grouped convolution over the tokens, then GELU.

  The kernel has weight normalization: at each tap, its norm over all channels is `scale`. Kernel
  and scale are separate parameters, so that an export equals the import.
  """

  config: BEATsConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    taps, groups, width = self.config.conv_pos, self.config.conv_pos_groups, x_BTD.shape[-1]
    start = nn.initializers.normal(2 * (taps * width) ** -0.5)
    kernel_KCD = self.param("kernel", start, (taps, width // groups, width)).astype(jnp.float32)
    norm_K = jnp.sqrt(jnp.sum(jnp.square(kernel_KCD), axis=(1, 2)))
    scale_K = self.param("scale", lambda key, shape: norm_K, (taps,)).astype(jnp.float32)
    bias_D = self.param("bias", nn.initializers.zeros, (width,)).astype(x_BTD.dtype)
    kernel_KCD = (kernel_KCD * (scale_K / norm_K)[:, None, None]).astype(x_BTD.dtype)

    def convolve(inputs):  # one group
      return jax.lax.conv_general_dilated(
        *inputs,
        window_strides=(1,),
        # An even kernel would give one more step, which the original drops at the end.
        padding=[(taps // 2, (taps - 1) // 2)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=precision(x_BTD.dtype),
      )

    # Group by group: XLA does not partition a grouped convolution by rows, so every device would
    # gather the whole batch.
    split = [rearrange(x, "B T (G D) -> G B T D", G=groups) for x in (x_BTD, kernel_KCD)]
    out_BTD = rearrange(jax.lax.map(convolve, split), "G B T D -> B T (G D)")
    return gelu(out_BTD + bias_D)


class Gate(nn.Module):
  """Gate of the position bias for each query: float32 [B, T, H].

  Source: WavLM's gated relative position bias (Chen et al., 2022), equations 3 to 5.
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, q_BTHC: jax.Array) -> jax.Array:
    scale_H = self.param("scale", nn.initializers.ones, (q_BTHC.shape[2],)).astype(jnp.float32)
    terms = Dense(2 * _GATE_TERMS, use_bias=True, dtype=self.dtype, name="linear")(q_BTHC)
    sums = reduce(terms.astype(jnp.float32), "B T H (n terms) -> n B T H", "sum", n=2)
    update_BTH, reset_BTH = jax.nn.sigmoid(sums)
    return update_BTH * (reset_BTH * scale_H - 1) + 2


class BEATsAttention(nn.Module):
  """Multi-head self-attention over the valid tokens with a gated relative position bias."""

  config: BEATsConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array, table_HR: jax.Array) -> jax.Array:
    c, dtype = self.config, self.compute.jnp_dtype
    q_BTHC, k_BTHC, v_BTHC = (
      rearrange(dense(x_BTD), "B T (H C) -> B T H C", H=c.heads)
      for name in "qkv"
      for dense in [Dense(c.hidden_size, use_bias=True, dtype=dtype, name=name)]
    )
    gate_BTH = Gate(dtype, name="gate")(q_BTHC)
    out_BTHC = kernels.attention(
      q_BTHC,
      k_BTHC,
      v_BTHC,
      valid_BS=valid_BT,
      bias=Bias(gate_BTH, table_HR),
      **self.compute.attention_options,
    )
    out_BTD = rearrange(out_BTHC, "B T H C -> B T (H C)")
    return Dense(c.hidden_size, use_bias=True, dtype=dtype, name="out")(out_BTD)


class BEATsLayer(nn.Module):
  """Attention and feed-forward with post-norm and scaled residual connections.

  Source: DeepNorm (Wang et al., 2022), for an encoder: the residual times (2 N)^(1/4).
  """

  config: BEATsConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: tuple[jax.Array, jax.Array], cache: None = None):
    c, dtype = self.config, self.compute.jnp_dtype
    valid_BT, table_HR = context
    weight = (2 * c.layers) ** 0.25
    dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
    out_BTD = BEATsAttention(c, self.compute, name="attention")(x_BTD, valid_BT, table_HR)
    norm = functools.partial(LayerNorm, c.norm_eps, dtype=dtype)
    x_BTD = norm(name="attention_norm")(x_BTD * weight + dropout(out_BTD))
    hidden = gelu(Dense(c.intermediate_size, use_bias=True, dtype=dtype, name="up")(x_BTD))
    out_BTD = Dense(c.hidden_size, use_bias=True, dtype=dtype, name="down")(hidden)
    return norm(name="mlp_norm")(x_BTD * weight + dropout(out_BTD)), cache


class BEATsEncoder(nn.Module):
  """Normalized filter bank energies to tokens, `bands` (8) for each 16 frames.

  `apply({"params": params}, features_BTF, valid_BT)` takes float features [B, T, input_width],
  Kaldi's 128 bins with the Povey window after (x - 15.41663) / (2 * 6.55582), and bool valid_BT. It
  returns (tokens [B, S, hidden_size], valid_BS) with S = T // patch * bands: all bands of a step,
  from low to high, then the next step. A patch is valid if all its frames are, so frames at
  the end that do not fill a patch are dropped. Values at invalid tokens are undefined but finite.
  Dropout is active only if a "dropout" RNG is given.

  The tokens of a clip do not depend on the padding: it is replaced by zeros before the positional
  convolution, unlike in the original.

  Raises ValueError for features of another width or a batch of fewer than `patch` frames.

  Source: BEATs (Chen et al., 2023).
  """

  config: BEATsConfig = BEATsConfig()
  compute: ExecutionConfig = ExecutionConfig()

  def setup(self):
    c, dtype = self.config, self.compute.jnp_dtype
    self.patch = Dense(c.patch_width, dtype=dtype)
    self.patch_norm = LayerNorm(c.norm_eps, dtype=dtype)
    if c.patch_width != c.hidden_size:
      self.patch_out = Dense(c.hidden_size, use_bias=True, dtype=dtype)
    self.position = PositionConv(c)
    self.input_norm = LayerNorm(c.norm_eps, dtype=dtype)
    self.dropout = nn.Dropout(c.dropout)
    self.relative_bias = RelativeBias(c)
    self.layers = repeat_layer(BEATsLayer, c.layers, self.compute)(c, self.compute)

  def __call__(self, features_BTF: jax.Array, valid_BT: jax.Array):
    c = self.config
    patches_BSP, valid_BS = _cut_patches(features_BTF, valid_BT, c)
    x_BSD = self.patch_norm(self.patch(patches_BSP))
    if c.patch_width != c.hidden_size:
      x_BSD = self.patch_out(x_BSD)
    x_BSD = jnp.where(valid_BS[..., None], x_BSD, 0)
    x_BSD = self.input_norm(x_BSD + self.position(x_BSD))
    x_BSD = self.dropout(x_BSD, deterministic=not self.has_rng("dropout"))
    context = valid_BS, self.relative_bias(x_BSD.shape[1])
    x_BSD, _ = run_layers(self.layers, x_BSD, context)
    return x_BSD, valid_BS


def _cut_patches(features_BTF, valid_BT, c: BEATsConfig):
  """Patches [B, S, patch * patch], frame by frame within a patch, and valid_BS."""
  _, T, F = features_BTF.shape
  if F != c.input_width:
    raise ValueError(f"beats takes features of width {c.input_width}, got {F}")
  steps = T // c.patch
  if not steps:
    raise ValueError(
      f"beats takes at least {c.patch} frames, got T={T}; pad the batch (clips shorter than"
      f" {c.patch} frames have no valid token)"
    )
  used = steps * c.patch
  patches_BSP = rearrange(
    features_BTF[:, :used], "B (steps t) (bands f) -> B (steps bands) (t f)", t=c.patch, f=c.patch
  )
  valid_steps = reduce(valid_BT[:, :used], "B (steps t) -> B steps", "all", t=c.patch)
  return patches_BSP, repeat(valid_steps, "B steps -> B (steps bands)", bands=c.bands)
