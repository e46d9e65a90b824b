"""Joined files are read to the end, cut files are refused, whatever their headers announce."""

import numpy as np
import pytest

from mooer_jax.audio.containers import Damaged, split_joined
from mooer_jax.audio.decode import AudioError, decode, load_audio
from tests.audio import made

SPOKEN = (made.chirp(0.8), made.chirp(1.3)[::-1].copy())
# Formats whose decoders stop at the end of the first of several files.
JOINABLE = {
  "wav": made.encode,
  "rf64": lambda x: made.encode(x, kind="RF64"),
  "w64": lambda x: made.encode(x, kind="W64"),
  "aiff": lambda x: made.encode(x, kind="AIFF"),
  "caf": lambda x: made.encode(x, kind="CAF"),
  "sph": lambda x: made.encode(x, kind="NIST"),
  "flac": lambda x: made.encode(x, kind="FLAC"),
  "vorbis": lambda x: made.encode(x, kind="OGG", subtype="VORBIS"),
  "opus": made.opus,
  "mp3": made.mp3,
  "mp3 without tags": lambda x: made.mp3(x, write_xing="0", id3v2_version="0"),
  "m4a": lambda x: made.encode_with_av(x, container="ipod", codec="aac"),
  "wma": lambda x: made.encode_with_av(x, container="asf", codec="wmav2"),
  "tta": lambda x: made.encode_with_av(x, container="tta", codec="tta", sample_format="s16"),
}


@pytest.mark.parametrize("kind", JOINABLE)
def test_joined_files_are_decoded_one_after_another(kind):
  files = [JOINABLE[kind](x) for x in SPOKEN]
  alone = [decode(file)[0] for file in files]
  joined, rate_hz = decode(b"".join([*files, files[0]]))
  assert rate_hz == decode(files[0])[1]
  if kind == "mp3 without tags":  # one stream of frames, of which the first has no encoder's delay
    assert abs(len(joined) - sum(map(len, alone)) - len(alone[0])) < 0.2 * made.RATE_HZ
  else:
    np.testing.assert_array_equal(joined, np.concatenate([*alone, alone[0]]))


@pytest.mark.parametrize("kind", ["mp3", "mp3 without tags", "aac"])
def test_joined_files_of_other_rates_and_channels_keep_their_speed(kind):
  options = {"write_xing": "0", "id3v2_version": "0"} if kind == "mp3 without tags" else {}
  write = made.aac if kind == "aac" else lambda x, rate_hz: made.mp3(x, rate_hz, **options)
  x = made.chirp(1.0, 44100)
  files = [write(made.chirp(1.0), made.RATE_HZ), write(np.stack([x, x], 1), 44100)]
  for order in (files, files[::-1]):
    both, rate_hz = decode(b"".join(order))
    assert rate_hz == 44100 and both.shape[1] == 2
    mono = load_audio(b"".join(order))
    assert abs(len(mono) - 2 * made.RATE_HZ) < 0.3 * made.RATE_HZ
    middle = len(mono) // 2
    for half in (mono[:middle], mono[middle - 800 :]):
      assert made.likeness(half, made.chirp(1.0)) > 0.9  # lossy, and with some of the other half


def test_a_change_between_several_numbers_of_channels_is_refused():
  files = [made.encode(np.tile(made.chirp()[:, None], (1, channels))) for channels in (2, 3)]
  with pytest.raises(AudioError, match=r"number of channels changes \(2, 3\).*-ac 1"):
    decode(b"".join(files))


def test_a_joined_file_that_is_cut_off_is_refused():
  with pytest.raises(AudioError, match="cut off: its header announces"):
    decode(made.encode(made.chirp()) + made.encode(made.chirp())[:9000])


@pytest.mark.parametrize("kind", JOINABLE)
def test_a_single_file_is_not_split(kind):
  data = JOINABLE[kind](SPOKEN[0])
  assert split_joined(data) == [data]


@pytest.mark.parametrize(
  ("kind", "subtype"),
  [
    *(("WAV", subtype) for subtype in ("PCM_16", "FLOAT", "ULAW", "IMA_ADPCM", "GSM610")),
    *(("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("CAF", "ALAC_16")),
    *(("FLAC", "PCM_16"), ("RF64", "PCM_16"), ("W64", "PCM_16"), ("NIST", "PCM_16")),
    *(("VOC", "PCM_16"), ("SVX", "PCM_16"), ("MP3", "MPEG_LAYER_III")),
    *(("OGG", "VORBIS"), ("OGG", "OPUS")),
  ],
)
def test_a_cut_file_of_libsndfile_is_refused(kind, subtype):
  data = made.encode(made.chirp(3.0), kind=kind, subtype=subtype)
  decode(data)
  for share in np.linspace(0.2, 0.8, 7):
    with pytest.raises(AudioError) as caught:
      decode(data[: int(share * len(data))])
    assert caught.value.cause == "undecodable"


@pytest.mark.parametrize(
  ("container", "codec", "sample_format"),
  [("mp3", "libmp3lame", "fltp"), ("wav", "adpcm_g726", "s16"), ("wv", "wavpack", "s16p"),
   ("tta", "tta", "s16")],
)  # fmt: skip
def test_a_cut_file_of_ffmpeg_is_refused(container, codec, sample_format):
  rate_hz = 8000 if codec == "adpcm_g726" else made.RATE_HZ
  said = made.chirp(0.7, rate_hz)  # so short an mp3 is left to FFmpeg by libsndfile
  bit_rate = 16000 if codec == "adpcm_g726" else 64000
  data = made.encode_with_av(
    said, container=container, codec=codec, rate_hz=rate_hz, sample_format=sample_format,
    bit_rate=bit_rate,
  )  # fmt: skip
  decode(data)
  for share in np.linspace(0.3, 0.8, 6):
    with pytest.raises(AudioError) as caught:
      decode(data[: int(share * len(data))])
    assert caught.value.cause == "undecodable"


def test_ogg_pages_that_are_missing_or_damaged_are_found():
  data = made.opus(made.chirp(3.0))
  pages = [i for i in range(len(data)) if data.startswith(b"OggS", i)]
  assert len(pages) > 3
  np.testing.assert_array_equal(decode(data + b"junk")[0], decode(data)[0])
  for at in (pages[2] + 60, pages[-1] + 40, len(data) - 1):  # in the sound
    changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    with pytest.raises(AudioError, match=r"wrong checksum|last Ogg page .* missing"):
      decode(changed)
  with pytest.raises(Damaged, match="are not an Ogg page"):
    split_joined(data[: pages[2]] + bytes(100) + data[pages[2] :])
  with pytest.raises(Damaged, match=r"last Ogg page .* is missing.*-c copy"):
    split_joined(data[: pages[-1]])
  with pytest.raises(Damaged, match=r"last Ogg page .* is missing"):
    split_joined(data[: pages[-1]] + data)  # the first of two


def test_an_mp3_is_read_to_the_end_whatever_its_header_announces():
  data = made.mp3(made.chirp(2.0))
  whole = decode(data)[0]
  few = decode(made.with_announced_frames(data, 9))[0]
  np.testing.assert_array_equal(few, whole)
  for frames in (200, 0xFFFFFFF, 0xFFFFFFFF):
    with pytest.raises(AudioError, match="cut off: its header announces"):
      decode(made.with_announced_frames(data, frames))


def test_tags_and_junk_between_the_frames_of_an_mp3_hide_nothing():
  frames = made.mp3(made.chirp(1.0), write_xing="0", id3v2_version="0")
  picture = b"ID3\x03\x00\x00\x00\x02\x00\x00" + bytes(2 * 128 * 128)  # mpg123 skips 1024 bytes
  for between in (picture, b"TAG" + b"x" * 125, bytes(3000)):
    found = decode(frames + between + frames)[0]
    assert abs(len(found) - 2 * made.RATE_HZ) < 0.3 * made.RATE_HZ


@pytest.mark.parametrize("announced_s", [0.0, 0.2])
def test_a_wav_whose_header_was_never_finished_is_read_to_the_end(announced_s):
  x = np.round(made.chirp() * 32768) / 32768
  found = load_audio(made.unfinished_wav(x, announced_s))
  np.testing.assert_array_equal(found, x)


def test_a_wav_whose_samples_begin_with_silence_is_read_to_the_end():
  x = np.concatenate([np.zeros(4000, np.float32), np.round(made.chirp() * 32768) / 32768])
  np.testing.assert_array_equal(load_audio(made.unfinished_wav(x)), x)


def test_chunks_behind_the_samples_are_no_samples():
  for samples, cause in ((made.chirp()[:0], "empty audio"), (made.chirp(), None)):
    wav = made.encode(samples, subtype="PCM_16")
    tagged = wav + b"LIST" + (2000).to_bytes(4, "little") + b"INFOICMT" + bytes(1992)
    if cause is None:
      np.testing.assert_array_equal(load_audio(tagged), load_audio(wav))
    else:
      with pytest.raises(AudioError) as caught:
        load_audio(tagged)
      assert caught.value.cause == cause
