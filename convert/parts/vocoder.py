"""The vocoder of MooER-omni and its speaker encoder: tables of their released files."""

import numpy as np

from ..core.rules import CONVOLUTION, Rule, Table, Transform, linear

# weight_norm keeps its norms [channels, 1, 1]; ours are [channels].
_NORMS = Transform(lambda x: x[:, 0, 0], lambda x: x[:, None, None])
# nn.ConvTranspose1d keeps [in, out, taps], our kernels are [taps, in, out].
_TRANSPOSED = Transform(lambda x: np.moveaxis(x, 2, 0), lambda x: np.moveaxis(x, 0, 2))
# nn.Conv1d with one tap keeps [out, in, 1], our dense kernels are [in, out].
_ONE_TAP = Transform(lambda x: x[..., 0].T, lambda x: x.T[..., None])
# nn.Conv2d keeps [out, in, frequency, time], our kernels are [frequency, time, in, out].
_PLANE = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def _normalised(torch: str, jax: str, layout: Transform) -> tuple[Rule, ...]:
  return (
    Rule(f"{torch}.weight_v", f"{jax}/v", layout),
    Rule(f"{torch}.weight_g", f"{jax}/g", _NORMS),
    Rule(f"{torch}.bias", f"{jax}/bias"),
  )


def _one_tap(torch: str, jax: str) -> tuple[Rule, ...]:
  return Rule(f"{torch}.weight", f"{jax}/kernel", _ONE_TAP), Rule(f"{torch}.bias", f"{jax}/bias")


def _batch_norm(torch: str, jax: str) -> tuple[Rule, ...]:
  names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
  return tuple(Rule(f"{torch}.{theirs}", f"{jax}/{ours}") for theirs, ours in names.items())


GENERATOR = Table((
  *_normalised("conv_pre", "first", CONVOLUTION),
  *_normalised("ups.{n}", "up_{n}", _TRANSPOSED),
  *_normalised("resblocks.{n}.convs1.{m}", "block_{n}/dilated_{m}", CONVOLUTION),
  *_normalised("resblocks.{n}.convs2.{m}", "block_{n}/plain_{m}", CONVOLUTION),
  *_normalised("conv_post", "last", CONVOLUTION),
  *_one_tap("cond_layer", "speaker"),
  *_one_tap("conds.{n}", "speaker_{n}"),
))  # fmt: skip

_BLOCK, _OURS = "layer{s}.{n}", "block_{s}_{n}"
SPEAKER = Table((
  Rule("conv1.weight", "conv1/kernel", _PLANE),
  Rule("conv1.bias", "conv1/bias"),
  *_batch_norm("bn1", "norm1"),
  Rule(f"{_BLOCK}.conv{{c:1|2}}.weight", f"{_OURS}/conv{{c}}/kernel", _PLANE),
  *_batch_norm(f"{_BLOCK}.bn{{c:1|2}}", f"{_OURS}/norm{{c}}"),
  *linear(f"{_BLOCK}.se.fc.0", f"{_OURS}/squeeze"),
  *linear(f"{_BLOCK}.se.fc.2", f"{_OURS}/excite"),
  Rule(f"{_BLOCK}.downsample.0.weight", f"{_OURS}/shortcut/kernel", _PLANE),
  *_batch_norm(f"{_BLOCK}.downsample.1", f"{_OURS}/shortcut_norm"),
  *_one_tap("attention.0", "pool1"),
  *_batch_norm("attention.2", "pool_norm"),
  *_one_tap("attention.3", "pool2"),
  *linear("fc", "output"),
))  # fmt: skip
