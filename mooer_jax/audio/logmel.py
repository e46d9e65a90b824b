"""Whisper's log-mel features, in NumPy for data workers and in JAX for compiled steps.

Whisper pads clips with digital silence to 30 s. Here, only frames that overlap the clip have
features; the encoder fills in those of the silence, which are `max(-1.5, m - 2)` with m the clip's
largest feature. Axes are those of `fbank`.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax.audio.augment import NO_MASKS, Masks, mask_spectrogram
from mooer_jax.audio.decode import AudioError
from mooer_jax.audio.fbank import as_waveform, check_frames, cut_frames, matmul, rows_at_a_time

# Smallest power, also that of digital silence.
FLOOR = 1e-10
# Range of the values of a clip, in powers of ten.
RANGE = 8.0


@dataclasses.dataclass(frozen=True)
class LogMelConfig:
  """Whisper's features: Hann windows of 25 ms around every 10 ms, Slaney's mel bins.

  Attributes:
    bins: mel bins F: 80, large-v3 128.
    frame_ms, hop_ms: length of a frame, and time from one frame to the next.
    chunk_s: longest clip; the encoder pads to this length.
  """

  kind: ClassVar[str] = "logmel"
  RUN_FIELDS: ClassVar[tuple[str, ...]] = ("chunk_s",)
  normalised: ClassVar[bool] = False  # there is no CMVN
  bins: int = 80
  sample_rate_hz: int = 16000
  frame_ms: float = 25
  hop_ms: float = 10
  chunk_s: float = 30.0

  def __post_init__(self):
    check_frames(self, "logmel")
    if self.frame_length % 2:
      raise ValueError(
        f"logmel frame_ms={self.frame_ms} is {self.frame_length} samples at {self.sample_rate_hz}"
        " Hz; the number must be even"
      )
    if self.chunk_samples < self.frame_length + self.hop_length:
      raise ValueError(
        f"logmel chunk_s={self.chunk_s} is {self.chunk_samples} samples; must be at least a frame"
        f" and a hop, {self.frame_length + self.hop_length}"
      )

  @property
  def frame_length(self) -> int:
    """Samples in a frame."""
    return int(self.sample_rate_hz * self.frame_ms / 1000)

  @property
  def hop_length(self) -> int:
    """Samples from one frame to the next."""
    return int(self.sample_rate_hz * self.hop_ms / 1000)

  @property
  def chunk_samples(self) -> int:
    """Samples in the longest clip."""
    return round(self.chunk_s * self.sample_rate_hz)

  @property
  def chunk_frames(self) -> int:
    """Frames of the longest clip."""
    return self.chunk_samples // self.hop_length

  @property
  def width(self) -> int:
    return self.bins

  def num_frames(self, samples: int) -> int:
    # Increases also for clips longer than chunk_s, which `features` refuses, so that a search for
    # the longest clip with a number of frames finds it.
    if not samples:
      return 0
    overlapping = -(-(samples + self.frame_length // 2) // self.hop_length)
    return min(overlapping, self.chunk_frames) if samples <= self.chunk_samples else overlapping

  def check(self, waveform_N: np.ndarray, *, name: str = "waveform") -> np.ndarray:
    waveform_N = as_waveform(waveform_N, name)
    if not len(waveform_N):
      raise AudioError(f"{name}: no samples", "empty audio")
    if len(waveform_N) > self.chunk_samples:
      raise ValueError(
        f"{name}: {len(waveform_N) / self.sample_rate_hz:.2f} s, but Whisper takes at most "
        f"{self.chunk_s:g} s at a time; split the clip into chunks first"
      )
    return waveform_N

  def features(
    self, waveform_N: np.ndarray, *, name: str = "waveform", masks: Masks = NO_MASKS
  ) -> np.ndarray:
    # Equal to transformers' WhisperFeatureExtractor.
    import scipy.fft  # several times as fast as numpy.fft

    waveform_N = self.check(waveform_N, name=name)
    window_L, mel_KF = constants(self)
    length, hop = self.frame_length, self.hop_length
    frames = self.num_frames(len(waveform_N))
    left, inside, right = _padding(frames, self)
    padded_N = np.zeros(inside)
    padded_N[: len(waveform_N)] = waveform_N
    padded_N = np.pad(padded_N, (left, right), mode="reflect")
    framed_TL = np.lib.stride_tricks.sliding_window_view(padded_N, length)[::hop]
    log_TF = np.empty((frames, self.bins), np.float32)
    rows = rows_at_a_time(mel_KF)
    for start in range(0, frames, rows):
      spectrum_TK = scipy.fft.rfft(framed_TL[start : start + rows] * window_L)
      power_TK = spectrum_TK.real**2 + spectrum_TK.imag**2
      log_TF[start : start + rows] = np.log10(np.maximum(power_TK @ mel_KF, FLOOR))
    logmel_TF = (np.maximum(log_TF, log_TF.max() - np.float32(RANGE)) + 4) / 4
    return mask_spectrogram(logmel_TF, masks, hop_length=hop)

  def features_jax(
    self, waveform_BN: jax.Array, samples_B: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    samples_B = jnp.asarray(samples_B, jnp.int32)
    samples_B = jnp.where(samples_B > self.chunk_samples, 0, samples_B)
    waveform_BN = waveform_BN[:, : self.chunk_samples].astype(jnp.float32)
    batch, longest = waveform_BN.shape
    overlapping_B = -(-(samples_B + self.frame_length // 2) // self.hop_length)
    frames_B = jnp.where(samples_B > 0, jnp.minimum(overlapping_B, self.chunk_frames), 0)
    frames = self.num_frames(longest)
    if not frames:
      return jnp.zeros((batch, 0, self.bins), jnp.float32), frames_B

    waveform_BN = jnp.where(jnp.arange(longest) < samples_B[:, None], waveform_BN, 0)
    left, inside, right = _padding(frames, self)
    waveform_BN = jnp.pad(waveform_BN, ((0, 0), (0, inside - longest)))
    waveform_BN = jnp.pad(waveform_BN, ((0, 0), (left, right)), mode="reflect")
    length, hop = self.frame_length, self.hop_length
    frames_BTL = cut_frames(waveform_BN, frames, length=length, hop=hop)
    matrix_LK, of_ones_K = _windowed_dft(self)
    # Without the mean, whose magnitude may exceed that of the sound: float32 would round to it.
    mean_BT1 = frames_BTL.mean(-1, keepdims=True)
    spectrum_BTK = matmul(frames_BTL - mean_BT1, matrix_LK) + mean_BT1 * of_ones_K
    real_BTK, imaginary_BTK = jnp.split(spectrum_BTK, 2, axis=-1)
    _, mel_KF = constants(self)
    power_BTF = matmul(real_BTK**2 + imaginary_BTK**2, mel_KF.astype(np.float32))
    log_BTF = jnp.log10(jnp.maximum(power_BTF, FLOOR))
    valid_BT1 = (jnp.arange(frames) < frames_B[:, None])[..., None]
    largest_B11 = log_BTF.max((1, 2), keepdims=True, where=valid_BT1, initial=np.log10(FLOOR))
    features_BTF = (jnp.maximum(log_BTF, largest_B11 - RANGE) + 4) / 4
    return jnp.where(valid_BT1, features_BTF, 0), frames_B


def _padding(frames: int, config: LogMelConfig) -> tuple[int, int, int]:
  """Number of samples mirrored on the left, of clip and silence, and mirrored on the right.

  Only the last frame of a full chunk reaches samples that are mirrored on the right.
  """
  half = config.frame_length // 2
  needed = (frames - 1) * config.hop_length + half
  inside = min(needed, config.chunk_samples)
  return half, inside, needed - inside


@functools.cache
def constants(config: LogMelConfig) -> tuple[np.ndarray, np.ndarray]:
  """The window [L] and the mel filter bank [K, F], both in float64.

  Source: Slaney's Auditory Toolbox, as librosa implements it.
  """
  import librosa.filters

  window_L = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.frame_length) / config.frame_length)
  mel_FK = librosa.filters.mel(
    sr=config.sample_rate_hz, n_fft=config.frame_length, n_mels=config.bins, dtype=np.float64
  )
  return window_L, np.ascontiguousarray(mel_FK.T)


@functools.cache
def _windowed_dft(config: LogMelConfig) -> tuple[np.ndarray, np.ndarray]:
  """DFT matrix, real and imaginary parts: float32 [L, 2 K]; and the spectrum of ones, [2 K].

  With a Hann window, the spectrum of ones is exactly 0 except at frequencies 0 and 1.
  """
  length = config.frame_length
  turns_LK = np.outer(np.arange(length), np.arange(length // 2 + 1)) / length
  angle_LK = 2 * np.pi * (turns_LK % 1)
  window_L, _ = constants(config)
  dft_LK = window_L[:, None] * np.hstack([np.cos(angle_LK), np.sin(angle_LK)])
  return dft_LK.astype(np.float32), np.round(dft_LK.sum(0), 6).astype(np.float32)
