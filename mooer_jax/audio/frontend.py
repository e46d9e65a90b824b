"""Front ends, from waveforms to encoder features. A new one is one file and one entry in KINDS.

Normalization (CMVN) is part of the model, as its values are parameters.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax.audio.augment import NO_MASKS, Masks, mask_spectrogram
from mooer_jax.audio.decode import AudioError
from mooer_jax.audio.fbank import FbankConfig, as_waveform, fbank, fbank_jax, num_fbank_frames
from mooer_jax.audio.logmel import LogMelConfig


def num_stacks(frames, stride: int):
  """Number of frames from `stack_frames`: ceil(frames / stride); for ints or arrays."""
  return -(-frames // stride)


def stack_frames(fbank_TF: np.ndarray, *, window: int = 7, stride: int = 6) -> np.ndarray:
  """Stack neighbouring frames: float32 [T, F] to fewer and wider ones.

  Args:
    fbank_TF: log-mel energies, one frame every 10 ms.
    window: number of frames in an output (MooER: 7).
    stride: input frames from one output to the next, at most `window` (MooER: 6, so 60 ms).

  Returns:
    float32 [ceil(T / stride), window * F]. The left edge is padded with (window - 1) // 2 copies of
    frame 0, the right edge with copies of the last frame.

  Raises:
    ValueError: if T is 0 or window < stride.

  Source: Paraformer's low-frame-rate features (Gao et al., 2022, section 3).
  """
  _check(window, stride)
  frames = len(fbank_TF)
  if not frames:
    raise ValueError("stack_frames got 0 frames; the clip is shorter than one frame")
  steps = num_stacks(frames, stride)
  index_TW = np.arange(steps)[:, None] * stride + np.arange(window) - (window - 1) // 2
  return fbank_TF[np.clip(index_TW, 0, frames - 1)].reshape(steps, -1)


def stack_frames_jax(
  fbank_BTF: jax.Array, frames_B: jax.Array, *, window: int = 7, stride: int = 6
) -> tuple[jax.Array, jax.Array]:
  """`stack_frames` for each row of a padded batch, for use inside `jit`.

  Args:
    fbank_BTF: float32 [B, T, F]; frames after a row's end are ignored.
    frames_B: int32 [B], valid frames of each row, at most T.
    window, stride: as for `stack_frames`.

  Returns:
    float32 [B, ceil(T / stride), window * F], 0 after a row's end; and int32 [B], valid ones.
  """
  _check(window, stride)
  batch, frames, bins = fbank_BTF.shape
  frames_B = jnp.asarray(frames_B, jnp.int32)
  steps_B = num_stacks(frames_B, stride)
  steps = num_stacks(frames, stride)
  if not steps:
    return jnp.zeros((batch, 0, window * bins), fbank_BTF.dtype), steps_B

  # Slices instead of a gather, which is slow on accelerators.
  last_B11 = jnp.maximum(frames_B - 1, 0)[:, None, None]
  last_B1F = jnp.take_along_axis(fbank_BTF, last_B11, axis=1)
  valid_BT1 = jnp.arange(frames)[:, None] < frames_B[:, None, None]
  fbank_BTF = jnp.where(valid_BT1, fbank_BTF, last_B1F)
  left = (window - 1) // 2
  right = max(0, (steps - 1) * stride + window - left - frames)
  padded_BTF = jnp.pad(fbank_BTF, ((0, 0), (left, right), (0, 0)), mode="edge")
  end = (steps - 1) * stride + 1
  shifted = [padded_BTF[:, i : i + end : stride] for i in range(window)]
  stacked_BTF = jnp.concatenate(shifted, axis=-1)
  valid_BT1 = jnp.arange(steps)[:, None] < steps_B[:, None, None]
  return jnp.where(valid_BT1, stacked_BTF, 0), steps_B


def _check(window: int, stride: int) -> None:
  if stride < 1 or window < stride:
    raise ValueError(
      f"lfr_window={window}, lfr_stride={stride}: must be 1 <= stride <= window, or frames are lost"
    )


@runtime_checkable
class Frontend(Protocol):
  """The frozen config of an encoder's features: all that the rest of the project knows of them."""

  kind: ClassVar[str]  # its name in checkpoints
  RUN_FIELDS: ClassVar[tuple[str, ...]]  # may differ between a checkpoint and a run from it
  normalised: ClassVar[bool]  # whether CMVN, whose values are parameters of the model, follows

  @property
  def sample_rate_hz(self) -> int:
    """Sample rate of the waveforms."""

  @property
  def width(self) -> int:
    """Number of values in a frame."""

  @property
  def bins(self) -> int:
    """Number of mel bins of the spectrogram, which frames consist of."""

  def num_frames(self, samples: int) -> int:
    """Number of frames that `features` returns; 0 for a clip that is too short."""

  def check(self, waveform_N: np.ndarray, *, name: str = "waveform") -> np.ndarray:
    """The clip as an array, if `features` accepts it; arguments and errors as there."""

  def features(
    self, waveform_N: np.ndarray, *, name: str = "waveform", masks: Masks = NO_MASKS
  ) -> np.ndarray:
    """Features of one clip in NumPy, before normalisation: float32 [num_frames(N), width].

    Args:
      waveform_N: float [N], full scale = 1, at the config's sample rate.
      name: name of the clip in errors.
      masks: parts of the spectrogram that SpecAugment hides.

    Raises:
      AudioError: if the clip is too short for one frame ("too short", "empty audio").
      ValueError: if the waveform is not float [N], or too long for the front end.
    """

  def features_jax(
    self, waveform_BN: jax.Array, samples_B: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Features of a padded batch in JAX, before normalisation; for use inside `jit`.

    Args:
      waveform_BN: float32 [B, N], full scale = 1; samples behind a row's end are ignored.
      samples_B: int32 [B], valid samples of each row, at most N.

    Returns:
      float32 [B, num_frames(N), width], 0 behind a row's frames; and int32 [B], num_frames of each
      row: 0 for a row that `features` would refuse.
    """


@dataclasses.dataclass(frozen=True)
class FrontendConfig:
  """MooER's (and Paraformer's) features by default: 560 values every 60 ms.

  Attributes:
    lfr_window, lfr_stride: fbank frames in one frame, and from one frame to the next.
  """

  kind: ClassVar[str] = "fbank"
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ()
  normalised: ClassVar[bool] = True
  fbank: FbankConfig = FbankConfig()
  lfr_window: int = 7
  lfr_stride: int = 6

  def __post_init__(self):
    _check(self.lfr_window, self.lfr_stride)

  @property
  def sample_rate_hz(self) -> int:
    return self.fbank.sample_rate_hz

  @property
  def width(self) -> int:
    return self.bins * self.lfr_window

  @property
  def bins(self) -> int:
    return self.fbank.bins

  def num_frames(self, samples: int) -> int:
    return num_stacks(num_fbank_frames(samples, self.fbank), self.lfr_stride)

  def check(self, waveform_N: np.ndarray, *, name: str = "waveform") -> np.ndarray:
    waveform_N = as_waveform(waveform_N, name)
    if not self.num_frames(len(waveform_N)):
      raise AudioError(
        f"{name}: {len(waveform_N)} samples; must be at least {self.fbank.frame_length}"
        f" ({self.fbank.frame_ms:g} ms at {self.fbank.sample_rate_hz} Hz)",
        "too short",
      )
    return waveform_N

  def features(
    self, waveform_N: np.ndarray, *, name: str = "waveform", masks: Masks = NO_MASKS
  ) -> np.ndarray:
    fbank_TF = fbank(self.check(waveform_N, name=name), self.fbank)
    fbank_TF = mask_spectrogram(fbank_TF, masks, hop_length=self.fbank.hop_length)
    return stack_frames(fbank_TF, window=self.lfr_window, stride=self.lfr_stride)

  def features_jax(
    self, waveform_BN: jax.Array, samples_B: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    fbank_BTF, frames_B = fbank_jax(waveform_BN, samples_B, self.fbank)
    return stack_frames_jax(fbank_BTF, frames_B, window=self.lfr_window, stride=self.lfr_stride)


KINDS: tuple[type[Frontend], ...] = (FrontendConfig, LogMelConfig)
