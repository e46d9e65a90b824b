"""Decoding of audio files in any common format to float32 samples."""

import contextlib
import errno
import io
import itertools
import os
import pathlib
import stat
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from mooer_jax.audio.containers import (
  Damaged,
  check_length,
  check_sndfile_length,
  ffmpeg_length_s,
  is_unfinished_wav,
  split_joined,
)

Channel = Literal["mean", "first"]
CAUSES = (
  "undecodable",  # unknown format, damaged or truncated
  "empty audio",  # no bytes or no samples
  "not finite",  # NaN or infinite samples
  "out of range",  # samples far outside [-1, 1]
  "channels cancel",  # their mean is silent
  "too short",  # less than one frame of features
  "silent",  # raised by some callers, never by decoding
)
SILENCE = 1e-4  # peak below -80 dBFS
LOUDEST = 4.0  # codecs and resampling overshoot 1 a little; 16-bit integers as floats are far above

# 8 GiB of float32: 37 hours of one channel at 16 kHz, 6 hours of stereo at 48 kHz.
_MAX_VALUES = 1 << 31
_VALUES_AT_A_TIME = 1 << 20  # memory is never allocated by the length that a header announces
_RATES_HZ = (1_000, 1_000_000)
# Share of the channels' energy that their mean keeps (-30 dB): below, they cancel each other.
_CANCELLED = 1e-3


class AudioError(ValueError):
  """A clip that cannot be used; `cause` is one of CAUSES."""

  def __init__(self, message: str, cause: str):
    assert cause in CAUSES, cause
    # Both go to args, so that the error survives the pickling between processes.
    super().__init__(message, cause)
    self.cause = cause

  def __str__(self) -> str:
    return self.args[0]


def load_audio(
  source: str | os.PathLike | bytes,
  *,
  sample_rate_hz: int = 16000,
  channel: Channel = "mean",
  name: str | None = None,
) -> np.ndarray:
  """Decode a clip to mono at a given rate.

  Args:
    source: path or bytes of a file that libsndfile or FFmpeg decodes: wav, flac, ogg, opus, mp3,
      m4a, aac, wma, webm, mp4, aiff, sph, amr and others, whatever its extension.
    sample_rate_hz: rate of the result; a clip at another rate is resampled by soxr, quality HQ.
    channel: use the "mean" of several channels, or the "first".
    name: name of the clip in errors; default: the path, or the number of bytes.

  Returns:
    float32 [samples], full scale = 1, which lossy codecs and the resampler may exceed a little.

  Raises:
    FileNotFoundError: if the path does not exist.
    AudioError: for every clip that cannot be used; see its `cause`.
  """
  name = name or _name(source)
  samples_NC, rate_hz = decode(source, name=name)
  with _named(name):
    samples_N = resample(_one_channel(samples_NC, channel, name), rate_hz, sample_rate_hz)
  if not samples_N.size:
    lost = f"{len(samples_NC)} samples at {rate_hz} Hz leave none at {sample_rate_hz} Hz"
    raise AudioError(f"{name}: {lost}", "empty audio")
  return samples_N


def decode(source: str | os.PathLike | bytes, *, name: str | None = None) -> tuple[np.ndarray, int]:
  """Decode all channels of a clip at its own rate; of a video file, the first audio stream.

  Concatenated files are decoded one after another. If their sample rates differ, the result has the
  highest; if some have one channel and others several, the one channel is copied.

  Returns:
    float32 [samples, channels], full scale = 1, and the rate in Hz.

  Raises:
    FileNotFoundError, AudioError: as `load_audio`. A clip that is shorter than its header announces
      is "undecodable".
      Truncation cannot be detected if the header has no length: mp3 without a Xing header, raw aac,
      wav, flac and webm written to a pipe (as browsers record them), fragmented mp4 between
      fragments, and wma or webm with a picture.
  """
  name = name or _name(source)
  data = _read_bytes(source, name)
  if not data:
    raise AudioError(f"{name}: the file has 0 bytes", "empty audio")
  if data.startswith(b"version https://git-lfs.github.com/spec/"):
    raise AudioError(f"{name}: a Git LFS pointer: run git lfs pull", "undecodable")
  with _named(name):
    parts = [part for file in split_joined(data) for part in _decode_file(file)]
    samples_NC, rate_hz = _concatenate(parts)
    check_samples(samples_NC, name)
  return samples_NC, rate_hz


def read_file(path: str | os.PathLike) -> bytes:
  """Content of a file; raises OSError, also for a device, whose content may have no end."""
  mode = os.stat(path).st_mode
  if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
    raise OSError(errno.EINVAL, "is a device or a socket; give an audio file", os.fspath(path))
  return pathlib.Path(path).read_bytes()


def check_samples(samples: np.ndarray, name: str) -> None:
  """Raises AudioError if a float array is empty, or a sample is not finite or above LOUDEST."""
  if not samples.size:
    raise AudioError(f"{name}: empty: it has 0 samples", "empty audio")
  peak = float(np.maximum(samples.max(), -samples.min()))
  if not np.isfinite(peak):
    bad = samples.size - np.count_nonzero(np.isfinite(samples))
    raise AudioError(f"{name}: {bad} of {samples.size} samples are NaN or infinite", "not finite")
  if peak > LOUDEST:
    raise AudioError(
      f"{name}: samples up to {peak:.6g}; they must lie in [-1, 1]: divide them (by 32768 if they"
      " were 16-bit integers)",
      "out of range",
    )


@contextlib.contextmanager
def _named(name: str):
  """Convert every exception into an AudioError that names the clip."""
  try:
    yield
  except AudioError:
    raise
  except Damaged as error:
    raise AudioError(f"{name}: {error}", "undecodable") from error
  except MemoryError as error:
    raise AudioError(f"{name}: not enough memory to decode it", "undecodable") from error
  except Exception as error:
    raise AudioError(f"{name}: cannot be decoded: {_reason(error)}", "undecodable") from error


def _reason(error: Exception) -> str:
  said = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
  return f"{type(error).__name__}: {said}" if type(error).__module__ == "builtins" else str(said)


def _read_bytes(source, name: str) -> bytes:
  if isinstance(source, (bytes, bytearray, memoryview)):
    return bytes(source)
  if not isinstance(source, (str, os.PathLike)):
    raise TypeError(f"audio source is {type(source).__name__}; give a path or the bytes of a file")
  if not os.fspath(source):
    raise FileNotFoundError("'': the path is empty; give an audio file")
  path = pathlib.Path(source)
  if path.is_dir():
    raise AudioError(f"{name}: is a folder; give the audio files in it", "undecodable")
  if not path.exists():
    raise FileNotFoundError(f"{name}: no such audio file; check the path (from {os.getcwd()})")
  if not (path.is_file() or path.is_fifo()):
    raise AudioError(f"{name}: is a device or a socket; give an audio file", "undecodable")
  try:
    return path.read_bytes()
  except MemoryError as error:
    raise AudioError(f"{name}: not enough memory to read it", "undecodable") from error


class _Part(NamedTuple):
  """Consecutive samples of one sample rate, full scale = 1."""

  samples_NC: np.ndarray
  rate_hz: int


def _decode_file(data: bytes) -> list[_Part]:
  """Decode with libsndfile, or with FFmpeg if libsndfile cannot read the file to its end."""
  try:
    parts = _read_with_libsndfile(data)
  except Damaged:
    raise
  except Exception as error:
    return _read_with_ffmpeg(data, _reason(error))
  if is_unfinished_wav(data):
    return max(parts, _read_with_ffmpeg(data, "its header announces too little"), key=_seconds)
  return parts


def _seconds(parts: Iterable[_Part]) -> float:
  return sum(len(part.samples_NC) / part.rate_hz for part in parts)


class _Bytes(io.BytesIO):
  """A file in memory that ignores seeks to before its beginning, as damaged headers demand."""

  def seek(self, offset, whence=io.SEEK_SET):
    # An exception in a callback of libsndfile would be printed.
    with contextlib.suppress(ValueError):
      super().seek(offset, whence)
    return self.tell()


def _read_with_libsndfile(data: bytes) -> list[_Part]:
  import soundfile

  with soundfile.SoundFile(_Bytes(data)) as file:
    rows = max(1, _VALUES_AT_A_TIME // file.channels)

    def blocks():
      while len(block_NC := file.read(rows, dtype="float32", always_2d=True)):
        yield _Part(block_NC, file.samplerate)

    parts = _join(blocks())
    check_sndfile_length(data, file, _seconds(parts))
  return parts


def _read_with_ffmpeg(data: bytes, sound_error: str) -> list[_Part]:
  import av

  options = {"protocol_whitelist": ""}  # a playlist must not open the files that it names
  if is_unfinished_wav(data):
    options["ignore_length"] = "1"
  try:
    with av.open(_Bytes(data), "r", metadata_errors="replace", options=options) as container:
      if not container.streams.audio:
        raise Damaged("the file has no audio stream")
      stream = container.streams.audio[0]
      if stream.codec_context is None:
        raise Damaged("neither libsndfile nor FFmpeg has a decoder for its codec")
      announced_s = ffmpeg_length_s(data, container, stream)
      parts = _join(map(_block, container.decode(stream)))
  except av.FFmpegError as error:
    raise Damaged(
      f"neither libsndfile ({sound_error}) nor FFmpeg ({error.strerror}) can decode it; is it an"
      " audio file, and whole?"
    ) from error
  check_length(announced_s, _seconds(parts))
  return parts


def _join(blocks: Iterable[_Part]) -> list[_Part]:
  """Join consecutive blocks of one rate and number of channels, up to a limit of samples."""
  kept, values = [], 0
  for block in blocks:
    values += block.samples_NC.size
    if values > _MAX_VALUES:
      raise Damaged(f"has more than {_MAX_VALUES} samples; split it into shorter files")
    if len(block.samples_NC):
      kept.append(block)
  runs = itertools.groupby(kept, key=lambda block: (block.rate_hz, block.samples_NC.shape[1]))
  return [_Part(np.concatenate([x.samples_NC for x in run]), rate_hz) for (rate_hz, _), run in runs]


def _block(frame) -> _Part:
  if frame.is_corrupt:
    raise Damaged("damaged: FFmpeg marks a frame as corrupt; copy or encode it again")
  x = frame.to_ndarray()
  x_NC = x.T if frame.format.is_planar else x.reshape(-1, frame.layout.nb_channels)
  with np.errstate(over="ignore"):  # values above float32's range become infinite: refused later
    scaled_NC = x_NC.astype(np.float32)
  if x.dtype == np.uint8:
    scaled_NC = scaled_NC / np.float32(128) - np.float32(1)
  elif x.dtype.kind == "i":
    scaled_NC /= np.float32(-np.iinfo(x.dtype).min)
  return _Part(scaled_NC, frame.sample_rate)


def _concatenate(parts: list[_Part]) -> tuple[np.ndarray, int]:
  """One array [samples, channels] of parts that may differ in rate, or have one channel."""
  if not parts:
    return np.zeros((0, 1), np.float32), _RATES_HZ[0]
  for rate_hz in (rates := {part.rate_hz for part in parts}):
    if not _RATES_HZ[0] <= rate_hz <= _RATES_HZ[1]:
      raise Damaged(
        f"has a sample rate of {rate_hz} Hz; it must be {_RATES_HZ[0]} to {_RATES_HZ[1]} Hz"
      )
  counts = {part.samples_NC.shape[1] for part in parts}
  if len(counts - {1}) > 1:
    found = ", ".join(map(str, sorted(counts)))
    raise Damaged(
      f"the number of channels changes ({found}); convert it to one number: ffmpeg -i IN -ac 1 OUT"
    )
  if len(parts) == 1:
    return parts[0]
  resampled = [resample(part.samples_NC, part.rate_hz, max(rates)) for part in parts]
  same = [np.broadcast_to(x_NC, (len(x_NC), max(counts))) for x_NC in resampled]
  return np.concatenate(same), max(rates)


def resample(samples: np.ndarray, rate_hz: int, wanted_hz: int) -> np.ndarray:
  """By soxr, quality HQ; [samples] or [samples, channels]."""
  if rate_hz == wanted_hz:
    return samples
  import soxr

  return soxr.resample(samples, rate_hz, wanted_hz, quality="HQ")


def _one_channel(samples_NC: np.ndarray, channel: Channel, name: str) -> np.ndarray:
  if samples_NC.shape[1] == 1 or channel == "first":
    return np.ascontiguousarray(samples_NC[:, 0])
  samples_N = samples_NC.mean(axis=1, dtype=np.float32)
  energy_all = np.vdot(samples_NC, samples_NC) / samples_NC.shape[1]
  if np.vdot(samples_N, samples_N) < _CANCELLED * energy_all:
    raise AudioError(
      f"{name}: its {samples_NC.shape[1]} channels cancel each other in their mean; use the first"
      ' alone: channel="first" (model.channel of a config, "channel" in the config.json of a'
      ' checkpoint), or convert it: ffmpeg -i IN -af "pan=mono|c0=c0" OUT',
      "channels cancel",
    )
  return samples_N


def _name(source) -> str:
  if isinstance(source, (bytes, bytearray, memoryview)):
    return f"<{len(source)} bytes of audio>"
  return str(source)
