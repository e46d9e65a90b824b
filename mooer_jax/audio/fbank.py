"""Kaldi's log-mel filter bank energies: NumPy for data workers, JAX for compiled steps.

Axes: N samples, T frames, L samples of one frame, F mel bins, K frequencies of the DFT (or real and
imaginary parts, if both are in one array).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

WINDOWS = ("hamming", "povey", "hanning")

# Kaldi works on 16-bit integers.
FULL_SCALE = 32768.0
# Kaldi's floor before the logarithm, float32's epsilon: digital silence is ln(1.19e-7) = -15.94.
FLOOR = np.float32(np.finfo(np.float32).eps)
# Largest number of frames in a block: bounds the memory for long clips, fits in the cache.
_BLOCK = 48
# Multiplications above which OpenBLAS starts threads, which here takes several times longer.
_THREADED = 10**6


def check_frames(config, kind: str) -> None:
  """Raises ValueError if the frames of a front end are too short, or it has no bins."""
  for name in ("sample_rate_hz", "bins"):
    if getattr(config, name) < 1:
      raise ValueError(f"{kind} {name} is {getattr(config, name)}; it must be at least 1")
  if config.frame_length < 2 or config.hop_length < 1:
    raise ValueError(
      f"{kind} frame_ms={config.frame_ms}, hop_ms={config.hop_ms} are {config.frame_length} and"
      f" {config.hop_length} samples at {config.sample_rate_hz} Hz; at least 2 and 1 are needed"
    )


@dataclasses.dataclass(frozen=True)
class FbankConfig:
  """Kaldi's options for a filter bank, without dither and with complete frames only.

  Attributes:
    bins: mel bins F.
    frame_ms, hop_ms: length of a frame, and time from one frame to the next.
    window: one of WINDOWS.
    low_hz, high_hz: lower edge of the lowest bin, upper edge of the highest; 0 is half the rate.
    preemphasis: x[n] - preemphasis * x[n - 1], within each frame.
  """

  sample_rate_hz: int = 16000
  bins: int = 80
  frame_ms: float = 25
  hop_ms: float = 10
  window: str = "hamming"
  low_hz: float = 20
  high_hz: float = 0
  preemphasis: float = 0.97

  def __post_init__(self):
    if self.window not in WINDOWS:
      raise ValueError(f"fbank window is {self.window!r}; allowed: {', '.join(WINDOWS)}")
    check_frames(self, "fbank")
    nyquist_hz = self.sample_rate_hz / 2
    if not 0 <= self.low_hz < (self.high_hz or nyquist_hz) <= nyquist_hz:
      limits = f"0 <= low_hz < high_hz <= {nyquist_hz:g} (high_hz=0 means half the sample rate)"
      raise ValueError(f"fbank low_hz={self.low_hz}, high_hz={self.high_hz}: must be {limits}")
    if not 0 <= self.preemphasis <= 1:
      raise ValueError(f"fbank preemphasis is {self.preemphasis}; it must lie between 0 and 1")

  @property
  def frame_length(self) -> int:
    """Samples in a frame."""
    return int(self.sample_rate_hz * self.frame_ms / 1000)

  @property
  def hop_length(self) -> int:
    """Samples from one frame to the next."""
    return int(self.sample_rate_hz * self.hop_ms / 1000)

  @property
  def fft_length(self) -> int:
    return 1 << (self.frame_length - 1).bit_length()  # the next power of two


@functools.cache
def constants(config: FbankConfig) -> tuple[np.ndarray, np.ndarray]:
  """Window [L] and mel filter bank [K, F] in float64; K ends before half the sample rate.

  Source: the Kaldi toolkit's mel scale, 1127 ln(1 + f / 700); triangles are straight in mel.
  """
  cosine_L = np.cos(2 * np.pi * np.arange(config.frame_length) / (config.frame_length - 1))
  if config.window == "hamming":
    window_L = 0.54 - 0.46 * cosine_L
  else:
    # The maximum keeps a rounding error below 0 away from the power.
    exponent = {"hanning": 1.0, "povey": 0.85}[config.window]
    window_L = np.maximum(0.5 - 0.5 * cosine_L, 0) ** exponent

  hz_K = np.arange(config.fft_length // 2) * (config.sample_rate_hz / config.fft_length)
  high_hz = config.high_hz or config.sample_rate_hz / 2
  edges = np.linspace(_mel(config.low_hz), _mel(high_hz), config.bins + 2)
  left_F, centre_F, right_F = edges[:-2], edges[1:-1], edges[2:]
  mel_K1 = _mel(hz_K)[:, None]
  rising_KF = (mel_K1 - left_F) / (centre_F - left_F)
  falling_KF = (right_F - mel_K1) / (right_F - centre_F)
  return window_L, np.maximum(0, np.minimum(rising_KF, falling_KF))


def num_fbank_frames(samples: int, config: FbankConfig) -> int:
  """Number of complete frames in a clip of `samples`."""
  return max(0, 1 + (samples - config.frame_length) // config.hop_length)


def rows_at_a_time(mel_KF: np.ndarray) -> int:
  """Number of frames in a block that is multiplied with a mel matrix."""
  return max(1, min(_BLOCK, _THREADED // mel_KF.size))


def as_waveform(waveform_N: np.ndarray, name: str = "waveform") -> np.ndarray:
  """The waveform as an array; raises ValueError, with its name, unless it is float [N]."""
  waveform_N = np.asarray(waveform_N)
  if waveform_N.ndim != 1 or not np.issubdtype(waveform_N.dtype, np.floating):
    raise ValueError(
      f"{name} is {waveform_N.dtype} {list(waveform_N.shape)}; a front end takes mono floats [N]"
      " with full scale 1 (divide 16-bit integers by 32768, average channels)"
    )
  return waveform_N


def fbank(waveform_N: np.ndarray, config: FbankConfig = FbankConfig()) -> np.ndarray:
  """Log-mel energies in NumPy.

  Args:
    waveform_N: float [N], full scale = 1.
    config: options.

  Returns:
    float32 [T, F] with T = `num_fbank_frames(N, config)`.

  Raises:
    ValueError: if the waveform is not float [N].

  Computes in float64 up to the power; Kaldi's own float32 errs by up to a percent in bins 110 dB
  below the peak of their frame.

  Source: Kaldi's compute-fbank-feats (package kaldi-native-fbank).
  """
  import scipy.fft  # several times as fast as numpy.fft

  waveform_N = as_waveform(waveform_N)
  window_L, mel_KF = constants(config)
  mel_KF = mel_KF.astype(np.float32)
  length, hop, emphasis = config.frame_length, config.hop_length, config.preemphasis
  frames = num_fbank_frames(len(waveform_N), config)
  fbank_TF = np.empty((frames, config.bins), np.float32)
  rows = rows_at_a_time(mel_KF)
  padded_TL = np.zeros((min(frames, rows), config.fft_length))
  for start in range(0, frames, rows):
    stop = min(start + rows, frames)
    block_N = waveform_N[start * hop : (stop - 1) * hop + length].astype(np.float64) * FULL_SCALE
    first_T = np.arange(stop - start) * hop
    sums_N = np.concatenate([[0.0], np.cumsum(block_N)])
    mean_T = (sums_N[first_T + length] - sums_N[first_T]) / length
    emphasized_N = block_N.copy()
    emphasized_N[1:] -= emphasis * block_N[:-1]

    frames_TL = padded_TL[: stop - start, :length]
    frames_TL[:] = np.lib.stride_tricks.sliding_window_view(emphasized_N, length)[::hop]
    # Kaldi lets the first sample of a frame precede itself.
    frames_TL[:, 0] = (1 - emphasis) * block_N[first_T]
    # Kaldi subtracts the mean first; this is what pre-emphasis makes of the mean.
    frames_TL -= (1 - emphasis) * mean_T[:, None]
    frames_TL *= window_L
    spectrum_TK = scipy.fft.rfft(padded_TL[: stop - start])[:, :-1]
    power_TK = (spectrum_TK.real**2 + spectrum_TK.imag**2).astype(np.float32)
    fbank_TF[start:stop] = np.log(np.maximum(power_TK @ mel_KF, FLOOR))
  return fbank_TF


def fbank_jax(waveform_BN: jax.Array, samples_B: jax.Array, config: FbankConfig = FbankConfig()):
  """Log-mel energies of a padded batch in JAX; for use inside `jit`.

  Args:
    waveform_BN: float32 [B, N], full scale = 1; values in the padding do not matter.
    samples_B: int32 [B], valid samples of each row, at most N.
    config: options.

  Returns:
    fbank_BTF: float32 [B, T, F] with T = num_fbank_frames(N); 0 after the valid frames of a row.
    frames_B: int32 [B], valid frames.

  In bins 100 dB below the peak of their frame, plain float32 errs by percents, and differently on
  each machine. All linear operations (mean, pre-emphasis, window, DFT) are therefore one float64
  matrix A, and x @ A is split: x = x0 + x1, A = A0 + A1, where x0 and A0 keep 9 bits. x0 @ A0 is
  exact in float32, because its products and sums are integers below 2^24 times a step; x0 @ A1 +
  x1 @ A is small, and so is its rounding error.
  """
  length, hop = config.frame_length, config.hop_length
  frames = num_fbank_frames(waveform_BN.shape[1], config)
  samples_B = jnp.asarray(samples_B, jnp.int32)
  frames_B = jnp.maximum(0, 1 + (samples_B - length) // hop)
  if not frames:
    return jnp.zeros((waveform_BN.shape[0], 0, config.bins), jnp.float32), frames_B

  scaled_BN = waveform_BN.astype(jnp.float32) * FULL_SCALE
  frames_BTL = cut_frames(scaled_BN, frames, length=length, hop=hop)
  valid_BT1 = (jnp.arange(frames) < frames_B[:, None])[..., None]
  # Masked here and at the end: in the gradient, a NaN in the padding would pass the last mask.
  frames_BTL = jnp.where(valid_BT1, frames_BTL, 0)
  coarse_BTL, fine_BTL = _split(frames_BTL)
  matrix_LK, coarse_LK, fine_LK = _matrices(config)
  spectrum_BTK = matmul(coarse_BTL, coarse_LK) + matmul(
    jnp.concatenate([coarse_BTL, fine_BTL], axis=-1), np.concatenate([fine_LK, matrix_LK])
  )
  real_BTK, imaginary_BTK = jnp.split(spectrum_BTK, 2, axis=-1)
  _, mel_KF = constants(config)
  energies_BTF = matmul(real_BTK**2 + imaginary_BTK**2, mel_KF.astype(np.float32))
  fbank_BTF = jnp.log(jnp.maximum(energies_BTF, np.float32(FLOOR)))
  return jnp.where(valid_BT1, fbank_BTF, 0), frames_B


matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _split(frames_BTL):
  """Split each frame, without most of its mean, into 9 bits and the exact remainder."""
  # The matrix subtracts the mean, but the rounding error of a large one would mask digital silence.
  mean_BT1 = frames_BTL.mean(axis=-1, keepdims=True)
  frames_BTL -= _round(mean_BT1, frames_BTL)
  coarse_BTL = _round(frames_BTL, frames_BTL)
  return coarse_BTL, frames_BTL - coarse_BTL


def _round(values_BTX, frames_BTL):
  """Round to multiples of 2^-8 of the power of two above the peak of each frame."""
  peak_BT1 = jnp.abs(frames_BTL).max(axis=-1, keepdims=True)
  # Such a peak is far below the floor, and a step that underflows to 0 would give NaN.
  _, exponent_BT1 = jnp.frexp(jnp.maximum(peak_BT1, 1e-20))
  step_BT1 = jnp.ldexp(jnp.float32(1), exponent_BT1 - 8)
  return jnp.round(values_BTX / step_BT1) * step_BT1


@functools.cache
def _matrices(config: FbankConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Matrix from frames to spectra (real parts, then imaginary), its first 9 bits, and the rest."""
  length = config.frame_length
  without_mean_LL = np.eye(length) - 1 / length
  before_LL = np.eye(length, k=1)
  # Kaldi lets the first sample of a frame precede itself.
  before_LL[0, 0] = 1
  emphasis_LL = np.eye(length) - config.preemphasis * before_LL
  turns_LK = np.outer(np.arange(length), np.arange(config.fft_length // 2)) / config.fft_length
  angle_LK = 2 * np.pi * (turns_LK % 1)
  window_L, _ = constants(config)
  dft_LK = window_L[:, None] * np.hstack([np.cos(angle_LK), np.sin(angle_LK)])
  matrix_LK = without_mean_LL @ emphasis_LL @ dft_LK
  # Steps by column, because pre-emphasis attenuates the low frequencies.
  step_K = 2.0 ** (np.frexp(np.abs(matrix_LK).max(axis=0))[1] - 8)
  coarse_LK = np.round(matrix_LK / step_K) * step_K
  return tuple(m.astype(np.float32) for m in (matrix_LK, coarse_LK, matrix_LK - coarse_LK))


def cut_frames(waveform_BN, frames: int, *, length: int, hop: int):
  """Cut [B, N] into [B, T, L] with slices of whole hops, because accelerators gather slowly."""
  hops_per_frame = -(-length // hop)
  hops = frames - 1 + hops_per_frame
  missing = max(0, hops * hop - waveform_BN.shape[1])
  waveform_BN = jnp.pad(waveform_BN, ((0, 0), (0, missing)))[:, : hops * hop]
  hops_BTL = waveform_BN.reshape(waveform_BN.shape[0], hops, hop)
  shifted = [hops_BTL[:, i : i + frames] for i in range(hops_per_frame)]
  return jnp.concatenate(shifted, axis=-1)[..., :length]


def _mel(hz):
  return 1127 * np.log(1 + np.asarray(hz, np.float64) / 700)
