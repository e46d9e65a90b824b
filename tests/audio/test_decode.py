"""Containers give back the sound that went in; what cannot be heard is named, with a cause."""

import io
import pickle
import sys

import numpy as np
import pytest
import soundfile

from mooer_jax.audio.decode import AudioError, decode, load_audio
from tests.numerics import assert_within, exceeds_the_bound, rounding

RATE_HZ = 16000


def chirp(seconds=0.8, rate_hz=RATE_HZ):
  """A sweep from 200 to 3000 Hz at half scale: its autocorrelation has one sharp peak."""
  time_s = np.arange(int(seconds * rate_hz)) / rate_hz
  phase = 2 * np.pi * (200 * time_s + 1400 / seconds * time_s**2)
  return (0.5 * np.sin(phase)).astype(np.float32)


def encode(samples, *, kind="WAV", subtype=None, rate_hz=RATE_HZ):
  buffer = io.BytesIO()
  soundfile.write(buffer, samples, rate_hz, format=kind, subtype=subtype)
  return buffer.getvalue()


def encode_with_av(
  samples, *, container, codec, rate_hz, sample_format="fltp", path=None, **options
):
  import av

  buffer = path or io.BytesIO()
  with av.open(buffer, "w", format=container, options=options) as out:
    stream = out.add_stream(codec, rate=rate_hz, layout="mono")
    stream.format, stream.bit_rate = sample_format, 64000
    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate = rate_hz
    for block in (frame, None):
      out.mux(stream.encode(block))
  return path.read_bytes() if path else buffer.getvalue()


def likeness(heard, said):
  """Peak of the normalised cross-correlation within 0.2 s, for silence and codecs may precede."""
  reach = RATE_HZ // 5
  spectrum = np.fft.rfft(heard, 1 << 16) * np.conj(np.fft.rfft(said, 1 << 16))
  cross = np.fft.irfft(spectrum) / np.linalg.norm(heard) / np.linalg.norm(said)
  cross = np.concatenate([cross[-reach:], cross[:reach]])
  return cross.max()


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_lossless_files_keep_every_16_bit_sample(kind):
  samples = np.round(chirp() * 32768) / 32768
  heard = load_audio(encode(samples, kind=kind, subtype="PCM_16"))
  assert heard.dtype == np.float32
  np.testing.assert_array_equal(heard, samples)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_wav_of_any_sample_format(subtype):
  # A step of each format, at half scale: mu-law has 16 steps from one power of two to the next.
  steps = {"PCM_U8": 2.0**-7, "PCM_24": 2.0**-23, "ULAW": 2.0**-1 / 16}
  step = steps.get(subtype, float(np.finfo(np.float32).eps))
  heard = load_audio(encode(chirp(), subtype=subtype))
  assert_within(heard, chirp(), step)
  with exceeds_the_bound():
    assert_within(heard * np.float32(1 + 4 * step), chirp(), step)


@pytest.mark.parametrize(
  ("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
)
def test_lossy_files_of_libsndfile(kind, subtype):
  heard = load_audio(encode(chirp(), kind=kind, subtype=subtype))
  # Lossy codecs keep the wave of a clean chirp to 1 %.
  assert likeness(heard, chirp()) > 0.99
  assert abs(len(heard) - len(chirp())) < 0.1 * RATE_HZ


@pytest.mark.parametrize(
  ("container", "codec", "rate_hz", "sample_format"),
  [
    ("ipod", "aac", 16000, "fltp"),
    ("ipod", "alac", 16000, "s16p"),
    ("asf", "wmav2", 44100, "fltp"),
    ("webm", "libopus", 48000, "flt"),
  ],
  ids=["m4a-aac", "m4a-alac", "wma", "webm-opus"],
)
def test_files_of_ffmpeg(container, codec, rate_hz, sample_format):
  # Silence around it, since FFmpeg's wma encoder keeps the last block of 32 ms to itself.
  said = np.pad(chirp(rate_hz=rate_hz), rate_hz // 10)
  data = encode_with_av(
    said, container=container, codec=codec, rate_hz=rate_hz, sample_format=sample_format
  )
  heard = load_audio(data)
  # Lossy codecs keep the wave of a clean chirp to 1 %.
  assert likeness(heard, chirp()) > 0.99
  assert abs(len(heard) - RATE_HZ) < 0.1 * RATE_HZ


@pytest.mark.parametrize(
  ("container", "codec", "rate_hz", "sample_format", "options"),
  [
    ("ipod", "aac", 16000, "fltp", {"movflags": "faststart"}),  # else a cut takes the header away
    ("asf", "wmav2", 44100, "fltp", {}),
    ("webm", "libopus", 48000, "flt", {}),
  ],
  ids=["m4a", "wma", "webm"],
)
def test_a_cut_file_of_ffmpeg_is_not_half_a_clip(
  container, codec, rate_hz, sample_format, options, tmp_path
):
  data = encode_with_av(
    chirp(2.0, rate_hz),
    container=container,
    codec=codec,
    rate_hz=rate_hz,
    sample_format=sample_format,
    path=tmp_path / "whole",
    **options,
  )
  assert abs(len(load_audio(data)) - 2 * RATE_HZ) < 0.15 * RATE_HZ  # a codec's first frames too
  said = []
  for share in np.linspace(0.2, 0.9, 15):  # FFmpeg takes those between two packets for the end
    with pytest.raises(AudioError) as caught:
      load_audio(data[: int(share * len(data))])
    assert caught.value.cause == "undecodable"
    said.append(str(caught.value))
  # A cut m4a always has a damaged packet, for it has no marks between them.
  assert container == "ipod" or any("cut off: its header announces" in text for text in said)


def test_a_webm_that_was_recorded_live_announces_nothing_and_is_read():
  options = dict(container="webm", codec="libopus", rate_hz=48000, sample_format="flt", live="1")
  data = encode_with_av(chirp(2.0, 48000), **options)
  assert abs(len(load_audio(data)) - 2 * RATE_HZ) < 0.1 * RATE_HZ
  assert abs(len(load_audio(data[: len(data) // 2])) - RATE_HZ) < 0.3 * RATE_HZ


def test_path_and_bytes_give_the_same(tmp_path):
  data = encode(chirp())
  path = tmp_path / "你好 hello.wav"
  path.write_bytes(data)
  np.testing.assert_array_equal(load_audio(path), load_audio(data))
  np.testing.assert_array_equal(load_audio(str(path)), load_audio(data))


@pytest.mark.parametrize("channels", [2, 8])
def test_channels_are_averaged(channels):
  gains = np.linspace(-0.5, 1, channels)
  heard = load_audio(encode(chirp()[:, None] * gains, subtype="FLOAT"))
  assert_within(heard, chirp() * gains.mean(), rounding(channels, 0.5))
  with exceeds_the_bound():  # one channel less
    assert_within(heard, chirp() * gains[:-1].mean(), rounding(channels, 0.5))
  assert decode(encode(chirp()[:, None] * gains))[0].shape == (len(chirp()), channels)


@pytest.mark.parametrize("rate_hz", [8000, 22050, 44100, 48000])
def test_resampling_keeps_the_sound(rate_hz):
  heard = load_audio(encode(chirp(rate_hz=rate_hz), subtype="FLOAT", rate_hz=rate_hz))
  assert abs(len(heard) - len(chirp())) <= 1
  inside = slice(800, len(chirp()) - 800)  # the filter rings at the cut ends
  # soxr's quality HQ is made for 20 bits; room for one of 18.
  assert_within(heard[inside], chirp()[inside], 2.0**-18)
  with exceeds_the_bound():  # later by a hundredth of a sample
    late = np.interp(np.arange(len(chirp())) - 0.01, np.arange(len(chirp())), chirp())
    assert_within(heard[inside], late[inside], 2.0**-18)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="gone.wav"):
    load_audio(tmp_path / "gone.wav")


def wav_bytes():
  return encode(chirp())


def with_nan():
  samples = chirp()
  samples[7] = np.nan
  return encode(samples, subtype="FLOAT")


@pytest.mark.parametrize(
  ("data", "cause"),
  [
    (b"", "empty"),
    (encode(np.zeros(0, np.float32)), "empty"),
    (b"not audio at all" * 100, "undecodable"),
    (np.random.default_rng(0).bytes(20000), "undecodable"),
    (wav_bytes()[:30], "undecodable"),
    (wav_bytes()[:8000], "undecodable"),
    (encode(chirp(), kind="FLAC")[:6000], "undecodable"),
    (encode(chirp(3.0), kind="MP3")[:2000], "undecodable"),
    (with_nan(), "not finite"),
    (encode(np.full(100, np.inf, np.float32), subtype="FLOAT"), "not finite"),
  ],
  ids="zero-bytes no-samples text noise header-only cut-wav cut-flac cut-mp3 nan inf".split(),
)
def test_what_cannot_be_heard_has_a_cause(data, cause, tmp_path):
  path = tmp_path / "bad.wav"
  path.write_bytes(data)
  with pytest.raises(AudioError, match="bad.wav") as caught:
    load_audio(path)
  assert caught.value.cause == cause
  with pytest.raises(AudioError, match="utterance-7"):
    load_audio(data, name="utterance-7")


def test_a_folder_is_refused(tmp_path):
  with pytest.raises(AudioError, match="folder") as caught:
    load_audio(tmp_path)
  assert caught.value.cause == "undecodable"


def test_an_array_is_refused():
  with pytest.raises(TypeError, match="ndarray"):
    load_audio(chirp())


def test_a_wav_from_a_pipe_has_no_true_size_and_is_read():
  data = bytearray(encode(chirp()))
  data[4:8] = data[40:44] = b"\xff" * 4
  np.testing.assert_array_equal(load_audio(bytes(data)), load_audio(encode(chirp())))


def test_one_sample_is_a_clip():
  np.testing.assert_array_equal(load_audio(encode(np.array([0.5], np.float32))), [0.5])


def test_one_sample_at_a_high_rate_is_not_lost_in_silence():
  try:
    heard = load_audio(encode(np.array([0.5], np.float32), rate_hz=48000))
  except AudioError as error:
    assert error.cause == "empty"
  else:
    assert len(heard) == 1


def test_without_av_the_error_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "av", None)
  with pytest.raises(AudioError, match=r"mooer[-_]jax\[data\]") as caught:
    load_audio(b"\x00\x00\x00\x20ftypM4A " + bytes(200), name="song.m4a")
  assert caught.value.cause == "undecodable"
  assert "song.m4a" in str(caught.value)


def test_the_error_survives_the_way_between_processes():
  error = pickle.loads(pickle.dumps(AudioError("a.wav: 0 samples", "empty")))
  assert (str(error), error.cause) == ("a.wav: 0 samples", "empty")


def test_real_recordings_decode(shared_data):
  wav = load_audio(shared_data / "fsdd" / "3_theo_1.wav")
  mp3 = load_audio(shared_data / "cmn-words" / "一会儿.mp3")
  for samples in (wav, mp3):
    assert 0.2 < len(samples) / RATE_HZ < 3
    assert 0.01 < np.abs(samples).max() < 1.1
