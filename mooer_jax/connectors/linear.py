"""MooER's adapter: joins neighbouring frames and maps them to the LLM's width."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
from einops import rearrange, reduce

from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.nn.layers import Dense


@dataclasses.dataclass(frozen=True)
class LinearConfig:
  """Sizes of the adapter; input and output width follow from its neighbours."""

  kind: ClassVar[str] = "linear"
  RENAMED: ClassVar = {"hidden_width": "hidden_size"}
  stack: int = 2
  hidden_size: int = 2048

  def __post_init__(self):
    for name in ("stack", "hidden_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"linear.{name}={getattr(self, name)} must be positive")

  def num_tokens(self, frames: int) -> int:
    """Speech tokens that so many encoder frames become."""
    return frames // self.stack


class LinearConnector(nn.Module):
  """Joins `stack` frames, then linear, ReLU, linear: [B, T, D] to [B, T // stack, output_width].

  Frames left over at the end are dropped, as in MooER; a token is valid when all its frames are.
  """

  config: LinearConfig
  output_width: int
  compute: ExecutionConfig = ExecutionConfig()

  @nn.compact
  def __call__(self, frames_BTD: jax.Array, valid_BT: jax.Array):
    """Returns (tokens [B, T // stack, output_width], valid bool [B, T // stack])."""
    c, dtype = self.config, self.compute.jnp_dtype
    used = frames_BTD.shape[1] // c.stack * c.stack
    valid_BS = reduce(valid_BT[:, :used], "B (S stack) -> B S", "all", stack=c.stack)
    joined = rearrange(frames_BTD[:, :used], "B (S stack) D -> B S (stack D)", stack=c.stack)
    hidden = jax.nn.relu(Dense(c.hidden_size, use_bias=True, dtype=dtype, name="linear1")(joined))
    return Dense(self.output_width, use_bias=True, dtype=dtype, name="linear2")(hidden), valid_BS
