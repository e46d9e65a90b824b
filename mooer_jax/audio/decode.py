"""Audio files of any common kind to float32 samples."""

import io
import os
import pathlib
import re
from typing import Literal

import numpy as np

Channel = Literal["mean", "first"]
CAUSES = ("undecodable", "empty", "not finite", "too short", "silent")

# libsndfile reports a damaged WAV only in its log: "data : 32000 (should be 7956)".
_DATA_CHUNK = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
# A WAV written to a pipe announces a size near 2^31 or 2^32, for its writer did not know better.
_STREAMED_BYTES = 0x7FFF0000
# FFmpeg guesses a length from bit rates where a header has none, and does not tell which it was.
# Of matroska's segment information, the duration:
_MATROSKA = re.compile(rb"\x15\x49\xa9\x66.{1,1000}?\x44\x89[\x84\x88]", re.DOTALL)
# Of ASF's file properties, the play duration, the preroll in it, and the flags:
_ASF = re.compile(
  rb"\xa1\xdc\xab\x8c\x47\xa9\xcf\x11\x8e\xe4\x00\xc0\x0c\x20\x53\x65"
  rb".{48}(.{8}).{8}(.{8})(.{4})",
  re.DOTALL,
)
# Encoders round the length they announce by up to a few codec frames.
_MISSING_S = 0.1


class AudioError(ValueError):
  """A clip that cannot be used, and why.

  Attributes:
    cause: one of CAUSES, for counting: "undecodable" (no known format, damaged or cut off), "empty"
      (no bytes or no samples), "not finite" (NaN or infinite samples), "too short" (less than one
      frame of features), "silent" (only where a caller refuses silence; decoding does not).
  """

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
  """Decodes a clip to mono at the wanted rate.

  Args:
    source: path of a file, or the bytes of one; wav, flac, ogg, opus, mp3 and whatever else
      libsndfile reads, and m4a, wma, webm, mp4, mkv with the optional package `av`.
    sample_rate_hz: rate of the result; a clip at another rate is resampled by soxr, quality HQ.
    channel: what is heard of several: their "mean", or the "first" alone.
    name: what errors call the clip; by default the path, or the number of bytes.

  Returns:
    float32 [samples], full scale = 1. Nothing is clipped: lossy codecs
    and the resampler may exceed 1 a little.

  Raises:
    FileNotFoundError: if the path does not exist.
    AudioError: if there is nothing to hear: see its `cause`.
  """
  name = name or _name(source)
  samples_NC, rate_hz = decode(source, name=name)
  if samples_NC.shape[1] == 1 or channel == "first":
    samples_N = np.ascontiguousarray(samples_NC[:, 0])
  else:
    samples_N = samples_NC.mean(axis=1, dtype=np.float32)
  if rate_hz != sample_rate_hz:
    import soxr

    samples_N = soxr.resample(samples_N, rate_hz, sample_rate_hz, quality="HQ")
    if not samples_N.size:
      raise AudioError(
        f"{name}: {len(samples_NC)} samples at {rate_hz} Hz leave none at {sample_rate_hz} Hz",
        "empty",
      )
  return samples_N


def decode(source: str | os.PathLike | bytes, *, name: str | None = None) -> tuple[np.ndarray, int]:
  """Decodes a clip as it is: all channels, own rate. Video files give their first audio stream.

  Args:
    source: path of a file, or the bytes of one.
    name: what errors call the clip; by default the path, or the number of bytes.

  Returns:
    float32 [samples, channels], full scale = 1, and the rate in Hz.

  Raises:
    FileNotFoundError: if the path does not exist.
    AudioError: see its `cause`. A clip that holds less than its header announces is "undecodable"
      too, rather than half a clip. Where nothing is announced, a cut cannot be told from an end:
      mp3 without a Xing header, raw aac, wav and webm written to a pipe (as browsers record them),
      fragmented mp4 between fragments, and wma or webm with a picture.
  """
  name = name or _name(source)
  if isinstance(source, (bytes, bytearray, memoryview)):
    data = bytes(source)
  elif isinstance(source, (str, os.PathLike)):
    path = pathlib.Path(source)
    if path.is_dir():
      raise AudioError(f"{name}: is a folder; give the audio files in it", "undecodable")
    if not path.exists():
      raise FileNotFoundError(f"{name}: no such audio file; check the path (from {os.getcwd()})")
    data = path.read_bytes()
  else:
    raise TypeError(f"audio source is {type(source).__name__}; give a path or the bytes of a file")
  if not data:
    raise AudioError(f"{name}: the file has 0 bytes", "empty")

  samples_NC, rate_hz = _decode_bytes(data, name)
  if not samples_NC.size:
    raise AudioError(f"{name}: empty: a valid file, but it holds 0 samples", "empty")
  finite_NC = np.isfinite(samples_NC)
  if not finite_NC.all():
    bad = finite_NC.size - int(finite_NC.sum())
    raise AudioError(f"{name}: {bad} of {finite_NC.size} samples are NaN or infinite", "not finite")
  return samples_NC, rate_hz


def _decode_bytes(data: bytes, name: str) -> tuple[np.ndarray, int]:
  import soundfile

  try:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
      announced, rate_hz, log = file.frames, file.samplerate, file.extra_info
      bytes_announced = _DATA_CHUNK.search(log)
      samples_NC = file.read(dtype="float32", always_2d=True)
  except soundfile.LibsndfileError as error:
    return _decode_with_av(data, name, str(error.error_string))
  if bytes_announced:
    wanted, present = map(int, bytes_announced.groups())
    if wanted < _STREAMED_BYTES and present:
      announced = int(announced * wanted / present)
  if announced - len(samples_NC) > _MISSING_S * rate_hz:
    raise AudioError(
      f"{name}: cut off: its header announces {announced} samples, {len(samples_NC)} are there; "
      "copy or encode it again",
      "undecodable",
    )
  return samples_NC, rate_hz


def _decode_with_av(data: bytes, name: str, sound_error: str) -> tuple[np.ndarray, int]:
  try:
    import av
  except ImportError as error:
    raise AudioError(
      f"{name}: libsndfile cannot read it ({sound_error}); m4a, wma and webm need the optional "
      "package av: pip install 'mooer-jax[data]'",
      "undecodable",
    ) from error

  blocks_CN: list[np.ndarray] = []
  try:
    with av.open(io.BytesIO(data), "r") as container:
      if not container.streams.audio:
        raise AudioError(f"{name}: the file has no audio stream", "undecodable")
      stream = container.streams.audio[0]
      rate_hz = stream.rate
      announced_s = _announced_s(data, container, stream)
      # Only the sample format changes here: integer or packed samples become float planes.
      to_planes = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate_hz)
      for frame in container.decode(stream):
        blocks_CN.extend(plane.to_ndarray() for plane in to_planes.resample(frame))
      blocks_CN.extend(plane.to_ndarray() for plane in to_planes.resample(None))
  except av.FFmpegError as error:
    raise AudioError(
      f"{name}: neither libsndfile ({sound_error}) nor FFmpeg ({error.strerror}) can decode it; "
      "is it an audio file, and whole?",
      "undecodable",
    ) from error
  samples_CN = np.concatenate(blocks_CN, axis=1) if blocks_CN else np.zeros((1, 0), np.float32)
  found_s = samples_CN.shape[1] / rate_hz
  if announced_s is not None and announced_s - found_s > _MISSING_S:
    raise AudioError(
      f"{name}: cut off: its header announces {announced_s:.2f} s, {found_s:.2f} s are there; "
      "copy or encode it again",
      "undecodable",
    )
  return np.ascontiguousarray(samples_CN.T), rate_hz


def _announced_s(data: bytes, container, stream) -> float | None:
  """Length of the sound by the container's header, in seconds; None where it does not say."""
  kinds = container.format.name.split(",")
  if "mp4" in kinds and stream.duration:
    return float(stream.duration * stream.time_base)
  if len(container.streams) > 1:
    return None  # what follows is the length of the whole, which a picture may outlast
  if "matroska" in kinds and container.duration and _MATROSKA.search(data[:10_000]):
    return container.duration / 1e6
  if "asf" in kinds and (found := _ASF.search(data[:10_000])):
    play, preroll, flags = (int.from_bytes(part, "little") for part in found.groups())
    live = flags & 1  # written while it was sent; its length is not valid
    return None if live else play / 1e7 - preroll / 1e3
  return None


def _name(source) -> str:
  if isinstance(source, (bytes, bytearray, memoryview)):
    return f"<{len(source)} bytes of audio>"
  return str(source)
