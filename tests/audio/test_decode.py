"""Containers give back the sound that went in; what cannot be heard is named, with a cause."""

import pickle

import numpy as np
import pytest

from mooer_jax.audio import decode as decode_module
from mooer_jax.audio.decode import (
  CAUSES,
  LOUDEST,
  AudioError,
  check_samples,
  decode,
  load_audio,
)
from tests.audio.made import (
  RATE_HZ,
  aac,
  chirp,
  encode,
  encode_with_av,
  likeness,
  mp3,
  odd_clips,
  piped_flac,
)
from tests.numerics import assert_within, exceeds_the_bound, rounding


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
    (b"", "empty audio"),
    (encode(np.zeros(0, np.float32)), "empty audio"),
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
    assert error.cause == "empty audio"
  else:
    assert len(heard) == 1


def test_the_error_survives_the_way_between_processes():
  error = pickle.loads(pickle.dumps(AudioError("a.wav: 0 samples", "empty audio")))
  assert (str(error), error.cause) == ("a.wav: 0 samples", "empty audio")


ODD = odd_clips()


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_decoded_whole_or_refused_by_name(name, tmp_path):
  data, cause, seconds = ODD[name]
  path = tmp_path / name
  path.write_bytes(data)
  if cause:
    with pytest.raises(AudioError, match=name) as caught:
      load_audio(path)
    assert caught.value.cause == cause
    assert "\n" not in str(caught.value)
  else:
    found = load_audio(path)
    assert abs(len(found) - seconds * RATE_HZ) < 0.1 * seconds * RATE_HZ
    # ADPCM and GSM keep the wave of a chirp to a few percent.
    assert likeness(found[: int(1.1 * RATE_HZ)], chirp(1.0)) > 0.95


def test_every_cause_of_decoding_has_an_odd_file():
  assert {clip.cause for clip in ODD.values()} - {None} == {*CAUSES} - {"too short", "silent"}


@pytest.mark.parametrize(
  "error",
  [
    ValueError("array is too big"),
    AttributeError("'NoneType' object has no attribute 'rate'"),
    UnicodeDecodeError("utf-8", b"\xbb", 0, 1, "invalid start byte"),
    MemoryError("4.50 TiB"),
    ZeroDivisionError("division by zero"),
    OSError(5, "Input/output error"),
  ],
  ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_names_the_clip(error, monkeypatch):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr("soundfile.SoundFile.read", fail)
  monkeypatch.setattr("av.open", fail)
  with pytest.raises(AudioError, match="utterance-7: .*memory|utterance-7: cannot be d") as caught:
    load_audio(encode(chirp()), name="utterance-7")
  assert caught.value.cause == "undecodable"
  assert caught.value.__cause__ is error


def test_what_libsndfile_fails_at_is_left_to_ffmpeg(monkeypatch):
  def fail(*args, **kwargs):
    raise ValueError("frames must be specified for non-seekable files")

  data = encode(np.round(chirp() * 32768) / 32768, subtype="PCM_16")
  expected = load_audio(data)
  monkeypatch.setattr("soundfile.SoundFile.read", fail)
  np.testing.assert_array_equal(load_audio(data), expected)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels", [1, 2])
def test_both_decoders_give_the_same_samples(subtype, channels, monkeypatch):
  data = encode(np.stack([chirp(), chirp()[::-1]], 1)[:, :channels], subtype=subtype)
  expected = decode(data)[0]
  monkeypatch.setattr("soundfile.SoundFile.read", None)
  np.testing.assert_array_equal(decode(data)[0], expected)


@pytest.mark.parametrize("make", [encode, piped_flac, mp3, aac])
def test_decoding_in_blocks_changes_nothing(make, monkeypatch):
  data = make(chirp(2.0))
  expected = decode(data)[0]
  monkeypatch.setattr(decode_module, "_VALUES_AT_A_TIME", 1000)
  # libsndfile's mp3 rounds in another order at the edges of blocks.
  tolerance = 4 * np.finfo(np.float32).eps if make is mp3 else 0
  np.testing.assert_allclose(decode(data)[0], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("make", [encode, piped_flac, mp3, aac])
def test_what_is_too_long_for_memory_is_refused(make, monkeypatch):
  monkeypatch.setattr(decode_module, "_MAX_VALUES", RATE_HZ)
  monkeypatch.setattr(decode_module, "_VALUES_AT_A_TIME", 1000)
  load_audio(make(chirp(0.8)))
  with pytest.raises(AudioError, match="has more than 16000 samples; split it into shorter"):
    load_audio(make(chirp(1.3)))


@pytest.mark.parametrize("rate_hz", [1, 999, 1_000_001, 2**31 - 1])
def test_a_rate_that_no_sound_has_is_refused(rate_hz):
  with pytest.raises(AudioError, match=rf"sample rate of {rate_hz} Hz; it must be 1000 to 1000000"):
    load_audio(encode(chirp(0.1), rate_hz=rate_hz))


def test_samples_far_outside_the_scale_are_refused_and_a_little_overshoot_is_not():
  check_samples(np.float32([-LOUDEST, LOUDEST]), "a")
  for beyond in (1.001 * LOUDEST, -1.001 * LOUDEST):
    with pytest.raises(AudioError, match=r"a: samples up to 4\.004; .*divide them"):
      check_samples(np.float32([0, beyond]), "a")
  np.testing.assert_allclose(load_audio(encode(2 * chirp(), subtype="FLOAT")), 2 * chirp())


def test_channels_that_cancel_each_other_are_refused_with_the_remedy():
  x = chirp()
  opposite = encode(np.stack([x, -x], 1))
  with pytest.raises(AudioError, match=r"2 channels cancel each other.*channel=\"first\""):
    load_audio(opposite)
  np.testing.assert_array_equal(load_audio(opposite, channel="first"), load_audio(encode(x)))
  # Neither two voices, nor one microphone of eight, nor silence.
  rng = np.random.default_rng(0)
  for other in (rng.normal(size=len(x)), np.zeros(len(x)), -0.8 * x):
    load_audio(encode(np.stack([x, 0.1 * other], 1)))
  load_audio(encode(np.concatenate([x[:, None], np.zeros((len(x), 7))], 1)))
  assert not load_audio(encode(np.zeros((800, 2)))).any()


def test_a_playlist_opens_no_files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "secret.wav").write_bytes(encode(chirp()))
  for text in ("ffconcat version 1.0\nfile secret.wav\n", "#EXTM3U\n#EXTINF:9,\nsecret.wav\n"):
    with pytest.raises(AudioError):
      load_audio(text.encode())


def test_a_device_is_refused():
  with pytest.raises(AudioError, match="/dev/zero: is a device"):
    load_audio("/dev/zero")


def test_real_recordings_decode(shared_data):
  wav = load_audio(shared_data / "fsdd" / "3_theo_1.wav")
  mp3 = load_audio(shared_data / "cmn-words" / "一会儿.mp3")
  for samples in (wav, mp3):
    assert 0.2 < len(samples) / RATE_HZ < 3
    assert 0.01 < np.abs(samples).max() < 1.1


def test_a_git_lfs_pointer_is_named_with_its_remedy(tmp_path):
  (tmp_path / "a.wav").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
  with pytest.raises(AudioError, match=r"a\.wav: a Git LFS pointer: run git lfs pull") as caught:
    decode(tmp_path / "a.wav")
  assert caught.value.cause == "undecodable"


def test_an_empty_path_is_not_the_current_folder():
  with pytest.raises(FileNotFoundError, match="the path is empty"):
    decode("")
