"""MooER's adapter: stacks neighbouring frames and maps them to the LLM's embeddings."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
from einops import rearrange, reduce

from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.nn.layers import Dense, check_sizes, dense_sharding


@dataclasses.dataclass(frozen=True)
class LinearConfig:
  """Sizes of the adapter; encoders and LLM determine those of input and output."""

  kind: ClassVar[str] = "linear"
  RENAMED: ClassVar = {"hidden_width": "hidden_size"}
  SIZES: ClassVar[Mapping[str, "LinearConfig"]]
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ()
  SHARDING: ClassVar = dense_sharding(outputs="linear1", inputs="linear2")
  stack: int = 2
  hidden_size: int = 2048

  def __post_init__(self):
    check_sizes(self, "stack", "hidden_size")

  @property
  def min_frames(self) -> int:
    return self.stack

  def num_tokens(self, frames: int) -> int:
    return frames // self.stack

  def module(self, output_width: int, compute: ExecutionConfig) -> "LinearConnector":
    return LinearConnector(self, output_width, compute)


LinearConfig.SIZES = {"linear": LinearConfig()}


class LinearConnector(nn.Module):
  """Stack frames, then linear, ReLU, linear: [B, T, D] to [B, T // stack, output_width].

  Remaining frames at the end are dropped, as in MooER. A token is valid if all its frames are.
  """

  config: LinearConfig
  output_width: int
  compute: ExecutionConfig = ExecutionConfig()

  @nn.compact
  def __call__(self, frames_BTD: jax.Array, valid_BT: jax.Array):
    c, dtype = self.config, self.compute.jnp_dtype
    used = frames_BTD.shape[1] // c.stack * c.stack
    valid_BS = reduce(valid_BT[:, :used], "B (S stack) -> B S", "all", stack=c.stack)
    joined = rearrange(frames_BTD[:, :used], "B (S stack) D -> B S (stack D)", stack=c.stack)
    hidden = jax.nn.relu(Dense(c.hidden_size, use_bias=True, dtype=dtype, name="linear1")(joined))
    return Dense(self.output_width, use_bias=True, dtype=dtype, name="linear2")(hidden), valid_BS
