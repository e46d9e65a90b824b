"""An encoder as a newcomer adds it: one file, and one entry in `encoders.KINDS`."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax

from mooer_jax.audio.fbank import FbankConfig
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.nn.layers import Dense, split_outputs


@dataclasses.dataclass(frozen=True)
class ToyConfig:
  """One dense layer on pairs of frames."""

  kind: ClassVar[str] = "toy"
  SIZES: ClassVar[Mapping[str, "ToyConfig"]]
  RUN_FIELDS: ClassVar = ("gain",)
  SHARDING: ClassVar = split_outputs("dense")
  max_frames: ClassVar[int | None] = None
  input_width: int = 56
  hidden_size: int = 24
  gain: float = 1.0

  def num_outputs(self, frames: int) -> int:
    return frames // 2

  def frontend(self) -> FrontendConfig:
    return FrontendConfig(fbank=FbankConfig(bins=self.input_width // 7))

  def module(self, compute: ExecutionConfig) -> "ToyEncoder":
    return ToyEncoder(self, compute)


ToyConfig.SIZES = {"toy_small": ToyConfig(), "toy_large": ToyConfig(hidden_size=48)}


class ToyEncoder(nn.Module):
  config: ToyConfig
  compute: ExecutionConfig

  @nn.compact
  def __call__(self, features_BTF: jax.Array, valid_BT: jax.Array):
    c, pairs = self.config, features_BTF.shape[1] // 2 * 2
    dense = Dense(c.hidden_size, use_bias=True, dtype=self.compute.jnp_dtype, name="dense")
    return c.gain * dense(features_BTF[:, 1:pairs:2]), valid_BT[:, 1:pairs:2]
