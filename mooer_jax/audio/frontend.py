"""Waveform to encoder features: Kaldi fbank and low frame rate, or Whisper's log-mel.

Normalisation (CMVN) is not here: it is the encoder's first step.
"""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from mooer_jax.audio import lfr, logmel
from mooer_jax.audio.decode import AudioError
from mooer_jax.audio.fbank import FbankConfig, fbank, fbank_jax, num_fbank_frames
from mooer_jax.audio.logmel import LogMelConfig


@dataclasses.dataclass(frozen=True)
class FrontendConfig:
  """MooER's (and Paraformer's) features by default: 560 values every 60 ms.

  Attributes:
    fbank: FbankConfig.
    lfr_window: frames joined in one step.
    lfr_stride: frames from one step to the next.
  """

  kind: ClassVar[str] = "fbank"
  normalised: ClassVar[bool] = True  # by CMVN, which stands among the model's parameters
  fbank: FbankConfig = FbankConfig()
  lfr_window: int = 7
  lfr_stride: int = 6

  def __post_init__(self):
    if not 1 <= self.lfr_stride <= self.lfr_window:
      raise ValueError(
        f"frontend lfr_window={self.lfr_window}, lfr_stride={self.lfr_stride}; "
        "needed 1 <= stride <= window, or frames would be lost"
      )

  @property
  def sample_rate_hz(self) -> int:
    return self.fbank.sample_rate_hz


Frontend = FrontendConfig | LogMelConfig


def width(config: Frontend = FrontendConfig()) -> int:
  """Values in one step."""
  if isinstance(config, LogMelConfig):
    return logmel.width(config)
  return config.fbank.bins * config.lfr_window


def num_frames(samples: int, config: Frontend = FrontendConfig()) -> int:
  """Steps that `features` makes of so many samples; 0 where it refuses the clip as too short."""
  if isinstance(config, LogMelConfig):
    return logmel.num_frames(samples, config)
  return lfr.num_stacks(num_fbank_frames(samples, config.fbank), config.lfr_stride)


def features(
  waveform_N: np.ndarray,
  config: Frontend = FrontendConfig(),
  *,
  name: str = "waveform",
) -> np.ndarray:
  """Features of one clip in NumPy, before normalisation.

  Args:
    waveform_N: float [N], full scale = 1, at the config's sample rate.
    config: FrontendConfig or LogMelConfig.
    name: what errors call the clip.

  Returns:
    float32 [num_frames(N), width(config)].

  Raises:
    AudioError: cause "too short", if not one fbank frame fits (MooER: 400 samples).
    ValueError: if the waveform is not one axis of floats, or too long for log-mel.
  """
  if isinstance(config, LogMelConfig):
    return logmel.features(waveform_N, config, name=name)
  fbank_TF = fbank(waveform_N, config.fbank)
  if not len(fbank_TF):
    raise AudioError(
      f"{name}: {len(waveform_N)} samples; at least {config.fbank.frame_length} "
      f"({config.fbank.frame_ms:g} ms at {config.fbank.sample_rate_hz} Hz) are needed",
      "too short",
    )
  return lfr.stack_frames(fbank_TF, window=config.lfr_window, stride=config.lfr_stride)


def features_jax(
  waveform_BN: jax.Array, samples_B: jax.Array, config: Frontend = FrontendConfig()
) -> tuple[jax.Array, jax.Array]:
  """Features of a padded batch in JAX, before normalisation; for use inside `jit`.

  Args:
    waveform_BN: float32 [B, N], full scale = 1; what stands behind a row's samples does not matter.
    samples_B: int32 [B], valid samples of each row, at most N.
    config: FrontendConfig or LogMelConfig.

  Returns:
    features_BTF: float32 [B, num_frames(N), width(config)]; 0 behind a row's steps.
    steps_B: int32 [B], num_frames of each row: 0 for a row that `features` would refuse.
  """
  if isinstance(config, LogMelConfig):
    return logmel.features_jax(waveform_BN, samples_B, config)
  fbank_BTF, frames_B = fbank_jax(waveform_BN, samples_B, config.fbank)
  return lfr.stack_frames_jax(
    fbank_BTF, frames_B, window=config.lfr_window, stride=config.lfr_stride
  )
