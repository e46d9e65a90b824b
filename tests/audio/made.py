"""Audio files made for tests: a chirp in any format, and files that are odd in one way each."""

import io
import struct
from typing import NamedTuple

import numpy as np
import soundfile

RATE_HZ = 16000


def chirp(seconds=0.8, rate_hz=RATE_HZ):
  """A sweep from 200 to 3000 Hz at half scale: its autocorrelation has one sharp peak."""
  time_s = np.arange(int(seconds * rate_hz)) / rate_hz
  phase = 2 * np.pi * (200 * time_s + 1400 / seconds * time_s**2)
  return (0.5 * np.sin(phase)).astype(np.float32)


def encode(samples, *, kind="WAV", subtype=None, rate_hz=RATE_HZ):
  """The bytes of a file by libsndfile."""
  buffer = io.BytesIO()
  soundfile.write(buffer, samples, rate_hz, format=kind, subtype=subtype)
  return buffer.getvalue()


def encode_with_av(
  samples, *, container, codec, rate_hz=RATE_HZ, sample_format="fltp", path=None, title=None,
  bit_rate=64000, **options,
):  # fmt: skip
  """The bytes of a file by FFmpeg; samples [N] or [N, channels]."""
  import av

  buffer = path or io.BytesIO()
  planes = np.atleast_2d(samples.T)
  layout = {1: "mono", 2: "stereo"}[len(planes)]
  with av.open(buffer, "w", format=container, options=options) as out:
    if title:
      out.metadata["title"] = title
    stream = out.add_stream(codec, rate=rate_hz, layout=layout)
    stream.format, stream.bit_rate = sample_format, bit_rate
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes), format="fltp", layout=layout)
    frame.sample_rate = rate_hz
    for block in (frame, None):
      out.mux(stream.encode(block))
  return path.read_bytes() if path else buffer.getvalue()


def likeness(found, expected):
  """Peak of the normalised cross-correlation within 0.2 s, for silence and codecs may precede."""
  reach = RATE_HZ // 5
  spectrum = np.fft.rfft(found, 1 << 17) * np.conj(np.fft.rfft(expected, 1 << 17))
  cross = np.fft.irfft(spectrum) / np.linalg.norm(found) / np.linalg.norm(expected)
  return np.concatenate([cross[-reach:], cross[:reach]]).max()


def aac(samples, rate_hz=RATE_HZ):
  """Raw ADTS."""
  return encode_with_av(samples, container="adts", codec="aac", rate_hz=rate_hz)


def m4a(samples, **options):
  return encode_with_av(samples, container="ipod", codec="aac", **options)


def mp3(samples, rate_hz=RATE_HZ, **options):
  """With an ID3 tag and an Info header, as FFmpeg writes it."""
  return encode_with_av(samples, container="mp3", codec="libmp3lame", rate_hz=rate_hz, **options)


def opus(samples):
  return encode(samples, kind="OGG", subtype="OPUS")


def with_announced_frames(data: bytes, frames: int) -> bytes:
  """An mp3 whose Info header announces another number of frames."""
  at = data.index(b"Info") + 8
  return data[:at] + struct.pack(">I", frames) + data[at + 4 :]


def piped_flac(samples):
  """A FLAC whose writer could not go back to fill in the number of samples and the MD5 sum."""
  data = bytearray(encode(samples, kind="FLAC"))
  data[21] &= 0xF0
  data[22:42] = bytes(20)
  return bytes(data)


def unfinished_wav(samples, seconds_announced=0.0):
  """A 16-bit WAV whose writer was stopped before it filled in the sizes."""
  data = bytearray(encode(samples, subtype="PCM_16"))
  assert data[36:40] == b"data"
  size = int(seconds_announced * RATE_HZ) * 2
  data[4:8], data[40:44] = struct.pack("<I", 36 + size), struct.pack("<I", size)
  return bytes(data)


def wav_of_codec(tag: int):
  """A WAV of a codec by its number, with bytes that nothing decodes."""
  form = struct.pack("<HHIIHH", tag, 1, 8000, 1000, 10, 0)
  body = b"WAVEfmt " + struct.pack("<I", len(form)) + form
  body += b"data" + struct.pack("<I", 1000) + bytes(range(250)) * 4
  return b"RIFF" + struct.pack("<I", len(body)) + body


class OddClip(NamedTuple):
  """A file, and why it is refused; or None and the seconds of sound in it."""

  data: bytes
  cause: str | None
  seconds: float = 0.0


def odd_clips() -> dict[str, OddClip]:
  """File name -> a clip that a decoder may stumble over; one of each kind."""
  x = chirp(1.0)
  stereo = np.stack([x, 0.5 * x], 1)
  title = m4a(x, title="A" * 8)
  return {
    "piped.flac": OddClip(piped_flac(x), None, 1.0),
    "gsm610.wav": OddClip(encode(x, subtype="GSM610"), None, 1.0),
    "g721.wav": OddClip(encode(x, subtype="G721_32"), None, 1.0),
    "nms.wav": OddClip(encode(x, subtype="NMS_ADPCM_32"), None, 1.0),
    "gbk_title.m4a": OddClip(title.replace(b"A" * 8, "录音文件".encode("gbk")), None, 1.0),
    "mono_then_stereo.aac": OddClip(aac(x) + aac(stereo), None, 2.0),
    "rate_change.aac": OddClip(aac(x) + aac(chirp(1.0, 44100), 44100), None, 2.0),
    "joined.mp3": OddClip(mp3(x) * 2, None, 2.0),
    "joined.opus": OddClip(opus(x) * 2, None, 2.0),
    "announces_little.mp3": OddClip(with_announced_frames(mp3(x), 9), None, 1.0),
    "unfinished.wav": OddClip(unfinished_wav(x), None, 1.0),
    "announces_much.mp3": OddClip(with_announced_frames(mp3(x), 0x7FFFFFFF), "undecodable"),
    "no_decoder.wav": OddClip(wav_of_codec(0x133), "undecodable"),
    "cut.opus": OddClip(opus(x)[:-900], "undecodable"),
    "cut.m4a": OddClip(m4a(x)[:-900], "undecodable"),
    "noise.wav": OddClip(np.random.default_rng(0).bytes(9000), "undecodable"),
    "playlist.m3u8": OddClip(b"#EXTM3U\n#EXTINF:9,\nhttp://localhost/a.mp3\n", "undecodable"),
    "nothing.wav": OddClip(b"", "empty audio"),
    "no_samples.wav": OddClip(encode(x[:0]), "empty audio"),
    "nan.wav": OddClip(encode(np.append(x, np.float32("nan")), subtype="FLOAT"), "not finite"),
    "huge.wav": OddClip(encode(np.append(x, 1e300), subtype="DOUBLE"), "not finite"),
    "integers.wav": OddClip(encode(x * 32768, subtype="FLOAT"), "out of range"),
    "opposite.wav": OddClip(encode(np.stack([x, -x], 1)), "channels cancel"),
  }
