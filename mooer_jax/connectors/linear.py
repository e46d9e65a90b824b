"""MooER's adapter: joins neighbouring frames and maps them to the LLM's width."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax

from mooer_jax.nn.compute import Compute
from mooer_jax.nn.dense import Dense


@dataclasses.dataclass(frozen=True)
class LinearConfig:
  """Sizes of the adapter; input and output width follow from its neighbours."""

  kind: ClassVar[str] = "linear"
  stack: int = 2
  hidden_width: int = 2048

  def __post_init__(self):
    for name in ("stack", "hidden_width"):
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
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, frames_BTD: jax.Array, valid_BT: jax.Array):
    """Returns (tokens [B, T // stack, output_width], valid bool [B, T // stack])."""
    c, dtype = self.config, self.compute.jnp_dtype
    B, T, D = frames_BTD.shape
    S = T // c.stack
    valid_BS = valid_BT[:, : S * c.stack].reshape(B, S, c.stack).all(-1)
    joined = frames_BTD[:, : S * c.stack].reshape(B, S, c.stack * D)
    hidden = jax.nn.relu(Dense(c.hidden_width, True, dtype=dtype, name="linear1")(joined))
    return Dense(self.output_width, True, dtype=dtype, name="linear2")(hidden), valid_BS
