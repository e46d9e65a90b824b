"""Speech encoders: features in, frames out. A new encoder is one file and one entry in KINDS."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn

from mooer_jax.audio.frontend import Frontend
from mooer_jax.encoders.beats import BEATsConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.encoders.whisper import WhisperConfig
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.nn.layers import ShardingRules


@runtime_checkable
class Encoder(Protocol):
  """The frozen config of an encoder: all that the rest of the project knows about it."""

  kind: ClassVar[str]  # in configs (`model.KIND`), checkpoints and parameters (`encoders/KIND/`)
  SIZES: ClassVar[Mapping[str, Any]]  # published sizes by name, for `model.encoders`
  RUN_FIELDS: ClassVar[tuple[str, ...]]  # may differ between a checkpoint and a run from it
  SHARDING: ClassVar[ShardingRules]  # for the paths below `encoders/KIND/`; each must be used

  @property
  def max_frames(self) -> int | None:
    """Longest input, feature frames; None for any length."""

  @property
  def input_width(self) -> int:
    """Number of values in a feature frame."""

  @property
  def hidden_size(self) -> int:
    """Number of values in an output frame."""

  def num_outputs(self, frames: int) -> int:
    """Number of output frames for this number of feature frames."""

  def frontend(self) -> Frontend:
    """The features that the encoder takes by default."""

  def module(self, compute: ExecutionConfig) -> nn.Module:
    """A module that maps (features [B, T, input_width], valid [B, T]) to (frames, valid)."""


KINDS: tuple[type[Encoder], ...] = (SANMConfig, WhisperConfig, BEATsConfig)
