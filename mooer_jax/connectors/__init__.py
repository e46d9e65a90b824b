"""Connectors: encoder frames to speech tokens. A new one is one file and one entry in KINDS."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn

from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.nn.layers import ShardingRules


@runtime_checkable
class Connector(Protocol):
  """The frozen config of a connector: all that the rest of the project knows about it."""

  kind: ClassVar[str]  # in configs (`model.KIND`) and checkpoints
  SIZES: ClassVar[Mapping[str, Any]]  # published sizes by name, for `model.connector`
  RUN_FIELDS: ClassVar[tuple[str, ...]]  # may differ between a checkpoint and a run from it
  SHARDING: ClassVar[ShardingRules]  # for the paths below `connector/`; each must be used

  @property
  def min_frames(self) -> int:
    """Encoder frames that the first speech token needs."""

  def num_tokens(self, frames: int) -> int:
    """Number of speech tokens for this number of encoder frames; 0 below `min_frames`."""

  def module(self, output_width: int, compute: ExecutionConfig) -> nn.Module:
    """A module that maps (frames [B, T, D], valid [B, T]) to (tokens, valid [B, S]).

    Tokens are [B, S, output_width].
    """


KINDS: tuple[type[Connector], ...] = (LinearConfig, QFormerConfig)
