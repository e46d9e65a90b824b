"""Segments: the exact samples of the recording, without reading more of it than needed."""

import io

import numpy as np
import pytest
import soundfile

from mooer_jax.audio.decode import AudioError, decode
from mooer_jax.data.readers import segments
from mooer_jax.data.readers.segments import SegmentError, SegmentReader, segment_slice

RATE_HZ = 16000


@pytest.fixture
def recording(tmp_path):
  """Writes 3 s of noise in two channels."""

  def write(kind, subtype):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (3 * RATE_HZ, 2))
    soundfile.write(tmp_path / "a", samples, RATE_HZ, format=kind, subtype=subtype)
    return tmp_path / "a"

  return write


@pytest.fixture
def decoded(monkeypatch):
  """The paths that are decoded as a whole."""
  paths = []
  monkeypatch.setattr(segments, "decode", lambda path, name: (paths.append(path), decode(path))[1])
  return paths


@pytest.mark.parametrize(
  ("kind", "subtype", "whole"),
  [
    ("WAV", "PCM_16", False),
    ("WAV", "FLOAT", False),
    ("WAV", "ULAW", False),
    ("FLAC", "PCM_24", False),
    ("OGG", "VORBIS", True),
    ("MP3", "MPEG_LAYER_III", True),
    ("WAV", "IMA_ADPCM", True),
    ("WAV", "GSM610", True),
  ],
)
def test_a_segment_has_the_samples_of_the_recording(recording, decoded, kind, subtype, whole):
  if subtype == "GSM610":  # has one channel
    path = recording("WAV", "PCM_16")
    samples, _ = soundfile.read(path)
    soundfile.write(path, samples[:, 0], RATE_HZ, format=kind, subtype=subtype)
  else:
    path = recording(kind, subtype)
  expected_NC, _ = decode(path)
  reader = SegmentReader()
  for start_s, end_s in ((0.5, 1.25), (0, 0.5), (1.00003, 2.9), (2, -1), (0.1, 3.2)):
    samples_NC, rate_hz = decode(reader.read(path, start_s, end_s))
    stop = len(expected_NC) if end_s in (-1, 3.2) else round(end_s * RATE_HZ)
    np.testing.assert_array_equal(samples_NC, expected_NC[round(start_s * RATE_HZ) : stop])
    assert rate_hz == RATE_HZ
  assert decoded == [path] * whole  # once for all segments
  reader.close()


def test_only_the_segment_is_read(recording, monkeypatch):
  counts = []
  read = soundfile.SoundFile.read
  monkeypatch.setattr(
    soundfile.SoundFile, "read", lambda self, n, **kw: (counts.append(n), read(self, n, **kw))[1]
  )
  opened, init = [], soundfile.SoundFile.__init__
  monkeypatch.setattr(
    soundfile.SoundFile,
    "__init__",
    lambda s, f, *a, **k: (opened.append(f), init(s, f, *a, **k))[1],
  )
  path, reader = recording("WAV", "PCM_16"), SegmentReader()
  opened.clear()
  for _ in range(3):
    reader.read(path, 1.0, 1.5)
  assert counts == [RATE_HZ // 2] * 3
  assert [file for file in opened if file == path] == [path]


def test_the_bytes_of_a_segment_have_no_time_of_writing(recording):
  """The cache of features identifies clips by their bytes."""
  audio = SegmentReader().read(recording("FLAC", "PCM_16"), 1, 2)
  assert audio.startswith(b".snd") and b"PEAK" not in audio[:200]


def test_concatenated_files_are_one_recording(recording):
  path = recording("WAV", "PCM_16")
  path.write_bytes(path.read_bytes() * 2)
  samples_NC, _ = decode(SegmentReader().read(path, 2.5, 3.5))
  np.testing.assert_array_equal(samples_NC, decode(path)[0][40000:56000])


@pytest.mark.parametrize(
  ("start_s", "end_s"), [(1.0, 1.0), (2.0, 1.0), (-0.1, 1.0), (0.5, 3.6), (3.0, 3.2), (3.5, -1)]
)
@pytest.mark.parametrize("kind", [("WAV", "PCM_16"), ("OGG", "VORBIS")])
def test_a_segment_that_is_empty_or_outside_is_refused(recording, start_s, end_s, kind):
  with pytest.raises(SegmentError, match=r"s of .*, which has 3\.000 s"):
    SegmentReader().read(recording(*kind), start_s, end_s)


def test_a_cut_recording_is_read_up_to_the_cut(recording, decoded):
  path = recording("WAV", "PCM_16")
  path.write_bytes(path.read_bytes()[: 44 + 4 * RATE_HZ])
  reader = SegmentReader()
  assert len(decode(reader.read(path, 0.2, 0.9))[0]) == 0.7 * RATE_HZ
  for _ in range(2):
    with pytest.raises(AudioError, match="cut off|truncated|announces"):
      reader.read(path, 1.5, 2.0)
  assert decoded == [path]


def test_a_cut_recording_that_libsndfile_cannot_seek_in_is_an_audio_error(recording):
  path = recording("FLAC", "PCM_16")
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(AudioError):
    SegmentReader().read(path, 2.5, 2.9)


def test_a_file_that_is_missing_or_no_audio_is_named(tmp_path):
  reader = SegmentReader()
  with pytest.raises(FileNotFoundError, match="gone"):
    reader.read(tmp_path / "gone", 0, 1)
  (tmp_path / "text").write_text("no audio")
  with pytest.raises(AudioError, match="text"):
    reader.read(tmp_path / "text", 0, 1)


def test_a_slice_of_a_recording():
  assert segment_slice(0.5, 1.0, samples=100, rate_hz=100) == slice(50, 100)
  assert segment_slice(0.5, 1.5, samples=100, rate_hz=100) == slice(50, 100)
  assert segment_slice(0.5, 1.51, samples=100, rate_hz=100) is None
  assert segment_slice(0.5, -1, samples=100, rate_hz=100) == slice(50, 100)


def test_an_au_file_of_a_segment_is_decoded_like_any_other(recording):
  audio = SegmentReader().read(recording("WAV", "PCM_16"), 0, 1)
  assert soundfile.info(io.BytesIO(audio)).duration == 1.0
