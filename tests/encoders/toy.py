"""An encoder as a newcomer adds it: one file, and one entry in `encoders.KINDS`."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax

from mooer_jax.audio.fbank import FbankConfig
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.nn.layers import Dense, dense_sharding


@dataclasses.dataclass(frozen=True)
class ToyConfig:
  """Two dense layers on every second frame."""

  kind: ClassVar[str] = "toy"
  SIZES: ClassVar[Mapping[str, "ToyConfig"]]
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ("gain",)
  SHARDING: ClassVar = dense_sharding(outputs="up", inputs="down")
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
    up = Dense(32, use_bias=True, dtype=self.compute.jnp_dtype, name="up")
    down = Dense(c.hidden_size, use_bias=True, dtype=self.compute.jnp_dtype, name="down")
    hidden_BTM = jax.nn.relu(up(features_BTF[:, 1:pairs:2]))
    return c.gain * down(hidden_BTM), valid_BT[:, 1:pairs:2]
