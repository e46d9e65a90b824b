"""Structure of audio files: where concatenated files begin, and the length in their headers."""

import io
import re
import zlib
from typing import Any

# Encoders round the length they announce by up to a few codec frames.
MISSING_S = 0.1

# Beginnings of files of formats whose decoders stop after the first of several files.
_BEGINNINGS = tuple(
  re.compile(pattern, re.DOTALL)
  for pattern in (
    rb"RIFF.{4}WAVE",
    rb"FORM.{4}AIF[CF]",
    rb"fLaC[\x00\x80]\x00\x00\x22",
    rb"caff\x00\x01\x00\x00desc",
    rb"NIST_1A\n +\d+\n",
    rb"RF64\xff{4}WAVEds64",
    rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00",  # Wave64
    rb"\x00\x00\x00.ftyp[ -~]{4}",  # mp4, m4a, mov, 3gp
    rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",  # wma
    rb"#!AMR(?:-WB)?\n",
    rb"TTA1[\x01\x02]\x00",
  )
)
# The frame that opens most mp3 files: it is silent and announces the number of frames.
_MP3_HEADER = re.compile(
  rb"\xff[\xe0-\xff].{2}(?:..)?\x00{9,32}(?:(?:Xing|Info).{3}[\x01\x03\x05\x07\x09\x0b\x0d\x0f]|VBRI.{10})(.{4})",
  re.DOTALL,
)
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

_CHUNK = re.compile(rb"([ -~]{4})(.{4})", re.DOTALL)  # of RIFF: name and size

# libsndfile reports a truncated file only in its log: "data : 32000 (should be 7956)".
_LOGGED_SIZE = re.compile(
  r"^\s*(?:data|SSND|BODY|Data Size|Riff size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE
)
_LOGGED_CUT = "Seems to be a truncated file."  # of VOC
# A WAV written to a pipe announces a size near 2^31 or 2^32, because its writer did not know it.
_STREAMED_BYTES = 0x7FFF0000
STREAMED_FRAMES = (1 << 63) - 1  # of FLAC, in libsndfile
_NIST_SAMPLES = re.compile(rb"\nsample_count -i (\d+)")

# Formats whose header has a length; for others, FFmpeg estimates it from the bit rate.
_WITH_DURATION = {"mp4", "wav", "wv", "tta", "flac"}
_CAF_DATA = re.compile(rb"data(\x00.{7})", re.DOTALL)
# Of matroska's segment information, the duration:
_MATROSKA = re.compile(rb"\x15\x49\xa9\x66.{1,1000}?\x44\x89[\x84\x88]", re.DOTALL)
# Of ASF's file properties, the play duration, the preroll in it, and the flags:
_ASF = re.compile(
  rb"\xa1\xdc\xab\x8c\x47\xa9\xcf\x11\x8e\xe4\x00\xc0\x0c\x20\x53\x65"
  rb".{48}(.{8}).{8}(.{8})(.{4})",
  re.DOTALL,
)


class Damaged(ValueError):
  """Why a file cannot be decoded, without its name, which the caller adds."""


def split_joined(data: bytes) -> list[bytes]:
  """Split concatenated files of one format (`cat a.mp3 b.mp3`).

  Returns:
    The files, in order; `data` as one file if nothing is concatenated or the format is unknown. In
    an mp3 whose header announces too few frames, the number is corrected.

  Raises:
    Damaged: if Ogg pages are damaged, or the last one is missing.
  """
  if data.startswith(b"OggS"):
    starts = _ogg_starts(data)
  elif _is_mp3(data):
    return _mp3_files(data)
  else:
    found = next((pattern for pattern in _BEGINNINGS if pattern.match(data)), None)
    starts = [match.start() for match in found.finditer(data)] if found else [0]
  return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def _ogg_starts(data: bytes) -> list[int]:
  """Positions at which the chained streams of an Ogg file begin (RFC 3533)."""
  starts: list[int] = []
  unfinished: set[bytes] = set()
  at, in_first_pages = 0, False
  while data[at : at + 4] == b"OggS" and len(data) > at + 27:
    segments = data[at + 27 : at + 27 + data[at + 26]]
    end = at + 27 + len(segments) + sum(segments)
    if len(segments) < data[at + 26] or end > len(data):
      break  # the page is cut off
    page = data[at : at + 22] + bytes(4) + data[at + 26 : end]
    if _ogg_checksum(page) != data[at + 22 : at + 26]:
      raise Damaged(f"damaged: the Ogg page at byte {at} has a wrong checksum; copy it again")
    serial, is_first, is_last = data[at + 14 : at + 18], data[at + 5] & 2, data[at + 5] & 4
    if is_first and not in_first_pages:
      if unfinished:
        break
      starts.append(at)
    if is_first:
      unfinished.add(serial)
    if is_last:
      unfinished.discard(serial)
    at, in_first_pages = end, bool(is_first)
  if data[at : at + 4] != b"OggS" and (more := data.find(b"OggS", at)) >= 0:
    raise Damaged(f"damaged: bytes {at} to {more} are not an Ogg page; copy it again")
  if unfinished:
    raise Damaged(
      "cut off: its last Ogg page (end-of-stream mark) is missing; copy it again or, if it is"
      " whole, add the mark: ffmpeg -i IN -c copy OUT"
    )
  return starts or [0]


def _ogg_checksum(page: bytes) -> bytes:
  """CRC-32 with the reverse bit order of zlib's and the initial value 0 instead of -1."""
  reversed_crc = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
  return int(f"{reversed_crc:032b}"[::-1], 2).to_bytes(4, "little")


def _is_mp3(data: bytes) -> bool:
  at = 0
  if data.startswith(b"ID3") and len(data) > 10:
    size = 0
    for byte in data[6:10]:
      size = size << 7 | byte & 0x7F
    at = 10 + size
  head = int.from_bytes(data[at : at + 2], "big")
  return head & 0xFFE0 == 0xFFE0 and bool(head & 0x0006)  # without a layer, it is aac


def _mp3_files(data: bytes) -> list[bytes]:
  """Split at tags, headers, and changes of the sample rate or the number of channels.

  An mp3 is a sequence of frames, and decoders stop at the length of the first header.
  """
  import av

  files: list[list] = [[]]  # of each packet: start, end, duration of its sound
  before = None
  try:
    with av.open(io.BytesIO(data), "r", format="mp3", metadata_errors="replace") as container:
      stream = container.streams.audio[0]
      unit_s = float(stream.time_base or 0)
      for packet in container.demux(stream):
        if not packet.size or packet.pos is None or packet.duration is None:
          continue
        frame = bytes(packet)
        head = int.from_bytes(frame[:4], "big")
        is_sound = head >> 21 == 0x7FF and not _MP3_HEADER.match(frame)
        # Version, layer and rate; and whether it has one channel.
        setting = (head & 0xFFFE0C00, head & 0xC0 == 0xC0) if is_sound else None
        if before is not None and setting != before:
          files.append([])
        end = packet.pos + packet.size
        files[-1].append((packet.pos, end, packet.duration if is_sound else None))
        before = setting
  except (av.FFmpegError, IndexError):
    return [data]  # decoding it raises the reason
  found = []
  for number, packets in enumerate(files):
    durations = [duration for *_, duration in packets if duration is not None]
    if durations:
      start = packets[0][0] if number else 0
      end = packets[-1][1] if len(files) > 1 else len(data)
      found.append(_with_frames(data[start:end], len(durations), sum(durations) * unit_s))
  return found or [data]


def _with_frames(mp3: bytes, frames: int, seconds: float) -> bytes:
  """Correct a header that announces fewer frames than there are."""
  if header := _MP3_HEADER.search(mp3):
    announced = int.from_bytes(header[1], "big")
    if (frames - announced) * seconds > MISSING_S * frames:
      return mp3[: header.start(1)] + frames.to_bytes(4, "big") + mp3[header.end(1) :]
  return mp3


def check_length(announced_s: float, found_s: float) -> None:
  """Raises Damaged if a file is shorter than its header announces, by more than MISSING_S."""
  if announced_s - found_s > MISSING_S:
    raise Damaged(
      f"cut off: its header announces {announced_s:.2f} s, but it has {found_s:.2f} s; copy or"
      " encode it again"
    )


def check_sndfile_length(data: bytes, file: Any, found_s: float) -> None:
  """Check the decoded length of an open `soundfile.SoundFile`; raises as `check_length`."""
  guessed = file.format == "MP3" and not _MP3_HEADER.search(data)
  if file.frames != STREAMED_FRAMES and not guessed:
    check_length(file.frames / file.samplerate, found_s)
  if file.format == "NIST" and (count := _NIST_SAMPLES.search(data[:1024])):
    check_length(int(count[1]) / file.samplerate, found_s)
  log = file.extra_info
  if size := _LOGGED_SIZE.search(log):
    wanted, present = map(int, size.groups())
    if present < wanted < _STREAMED_BYTES:
      if not found_s:
        raise Damaged(f"cut off: its header announces {wanted} bytes, but it has {present}")
      check_length(found_s * wanted / present, found_s)
  if _LOGGED_CUT in log:
    raise Damaged("cut off: its header announces more samples than it has; copy it again")


def ffmpeg_length_s(data: bytes, container: Any, stream: Any) -> float:
  """Length that the header of an open `av` container announces, seconds; 0 if it has none.

  Raises:
    Damaged: if the header announces more bytes than the file has.
  """
  kinds = set(container.format.name.split(","))
  if kinds & _WITH_DURATION or ("mp3" in kinds and _MP3_HEADER.search(data)):
    return float((stream.duration or 0) * stream.time_base)
  if "caf" in kinds and (size := _CAF_DATA.search(data)):
    wanted, present = int.from_bytes(size[1], "big"), len(data) - size.end()
    if wanted > present:
      raise Damaged(f"cut off: its header announces {wanted} bytes, but it has {present}")
  if len(container.streams) > 1:
    return 0.0  # below is the length of the whole file, of which a picture may be the longest part
  if "matroska" in kinds and container.duration and _MATROSKA.search(data[:10_000]):
    return container.duration / 1e6
  if "asf" in kinds and (found := _ASF.search(data[:10_000])):
    play, preroll, flags = (int.from_bytes(part, "little") for part in found.groups())
    return 0.0 if flags & 1 else play / 1e7 - preroll / 1e3  # 1: live, without a valid length
  return 0.0


def is_unfinished_wav(data: bytes) -> bool:
  """Whether a WAV has more data after its samples than in them, as a killed recorder leaves it."""
  if not (data.startswith(b"RIFF") and data[8:12] == b"WAVE"):
    return False
  at, samples = 12, None
  while chunk := _CHUNK.match(data, at):
    size = int.from_bytes(chunk[2], "little")
    samples = size if chunk[1] == b"data" else samples
    at += 8 + size + size % 2
  return samples is not None and len(data) - at > samples
