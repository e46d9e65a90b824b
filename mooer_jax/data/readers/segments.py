"""Segments of recordings, read without the rest of the recording where the format allows it."""

import contextlib
import io

import numpy as np
import soundfile

from mooer_jax import storage
from mooer_jax.audio.decode import AudioError, decode

OVERSHOOT_S = 0.5  # how far a segment may exceed its recording, as in Kaldi's extract-segments
# libsndfile seeks in these to the exact sample. In Vorbis and MP3 the samples after a seek differ.
_EXACT = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")


class SegmentError(ValueError):
  """A segment that is empty or outside of its recording."""


def segment_slice(start_s: float, end_s: float, *, samples: int, rate_hz: int) -> slice | None:
  """The samples of a segment of a recording; None if it is empty or not inside.

  Args:
    start_s, end_s: seconds; an end of -1 is the end of the recording, which another may exceed by
      OVERSHOOT_S.
    samples: length of the recording.
  """
  length_s = samples / rate_hz
  end_s = length_s if end_s == -1 else end_s
  if not 0 <= start_s < min(end_s, length_s) or end_s > length_s + OVERSHOOT_S:
    return None
  return slice(round(start_s * rate_hz), min(round(end_s * rate_hz), samples))


class SegmentReader:
  """Reads segments; consecutive ones of a recording share the open file, or its samples."""

  def __init__(self):
    self._path: str | None = None
    self._source: str | bytes = ""  # the path, or the content of a URL
    self._file: soundfile.SoundFile | None = None  # if it can be read from anywhere
    self._decoded: tuple[np.ndarray, int] | AudioError | None = None

  def read(self, path: str, start_s: float, end_s: float) -> bytes:
    """The segment as an AU file of float32 samples, exactly those of the decoded recording.

    A recording in a format without exact seeks is decoded as a whole, once for all consecutive
    segments, and so is one that is shorter than its segment, since libsndfile reads only the first
    of concatenated files. The recording of a URL is downloaded as a whole, and so often.

    Raises:
      RemoteError: if the URL cannot be read.
      OSError: if the file cannot be read.
      AudioError: if it cannot be decoded.
      SegmentError: if the segment is empty or not in the recording.
    """
    if path != self._path:
      self.close()
      self._open(path)
    if (file := self._file) is not None:
      found = segment_slice(start_s, end_s, samples=file.frames, rate_hz=file.samplerate)
      if found is not None:
        samples_NC = np.zeros((0, 1), np.float32)
        with contextlib.suppress(soundfile.SoundFileError):  # damaged, so decoding says how
          file.seek(found.start)
          samples_NC = file.read(found.stop - found.start, dtype="float32", always_2d=True)
        if len(samples_NC) == found.stop - found.start:
          return _encode(samples_NC, file.samplerate)
    samples_NC, rate_hz = self._decode(path)
    found = segment_slice(start_s, end_s, samples=len(samples_NC), rate_hz=rate_hz)
    if found is None:
      length_s = len(samples_NC) / rate_hz
      raise SegmentError(f"{start_s} to {end_s} s of {path}, which has {length_s:.3f} s")
    return _encode(samples_NC[found], rate_hz)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
    self._path = self._file = self._decoded = None
    self._source = ""

  def _open(self, path: str) -> None:
    source: str | bytes = path
    if storage.is_url(path):
      source = storage.read_bytes(path)
    else:
      storage.stat_file(path)  # a pipe would block
    self._path, self._source = path, source
    try:
      file = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (RuntimeError, OSError):
      return  # FFmpeg may read it, or the error names it
    if file.subtype in _EXACT and file.seekable():
      self._file = file
    else:
      file.close()

  def _decode(self, path: str) -> tuple[np.ndarray, int]:
    if self._decoded is None:
      try:
        self._decoded = decode(self._source, name=path)
      except AudioError as error:
        self._decoded = error
    if isinstance(self._decoded, AudioError):
      raise self._decoded
    return self._decoded


def _encode(samples_NC: np.ndarray, rate_hz: int) -> bytes:
  """An AU file: unlike WAV of float32, it has no time of writing, so equal clips are equal."""
  file = io.BytesIO()
  soundfile.write(file, samples_NC, rate_hz, format="AU", subtype="FLOAT")
  return file.getvalue()
