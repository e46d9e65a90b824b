"""Files with changed headers give an AudioError or a waveform; nothing else is raised."""

import random

import numpy as np
import pytest

from mooer_jax.audio.decode import LOUDEST, AudioError, decode
from tests.audio.made import RATE_HZ, chirp, encode, encode_with_av

FORMATS = {
  "wav": lambda x: encode(x, subtype="PCM_16"),
  "wav-float": lambda x: encode(x, subtype="FLOAT"),
  "wav-ima": lambda x: encode(x, subtype="IMA_ADPCM"),
  "wav-gsm": lambda x: encode(x, subtype="GSM610"),
  "wav-nms": lambda x: encode(x, subtype="NMS_ADPCM_32"),
  **{
    kind.lower(): lambda x, kind=kind: encode(x, kind=kind)
    for kind in ("RF64", "W64", "AIFF", "AU", "CAF", "NIST", "VOC", "FLAC")
  },
  "mat5": lambda x: encode(x, kind="MAT5"),
  "vorbis": lambda x: encode(x, kind="OGG", subtype="VORBIS"),
  "opus": lambda x: encode(x, kind="OGG", subtype="OPUS"),
  "mp3": lambda x: encode_with_av(x, container="mp3", codec="libmp3lame"),
  "aac": lambda x: encode_with_av(x, container="adts", codec="aac"),
  "m4a": lambda x: encode_with_av(x, container="ipod", codec="aac"),
  "alac": lambda x: encode_with_av(x, container="ipod", codec="alac", sample_format="s16p"),
  "wma": lambda x: encode_with_av(x, container="asf", codec="wmav2"),
  "webm": lambda x: encode_with_av(
    np.repeat(x, 3), container="webm", codec="libopus", rate_hz=48000, sample_format="flt"
  ),
  "ac3": lambda x: encode_with_av(np.repeat(x, 3), container="ac3", codec="ac3", rate_hz=48000),
  "tta": lambda x: encode_with_av(x, container="tta", codec="tta", sample_format="s16"),
  "wavpack": lambda x: encode_with_av(x, container="wv", codec="wavpack", sample_format="s16p"),
}


def _changed(data: bytes, rng: random.Random) -> bytes:
  """The file with one to eight other bytes, mostly in its header, and now and then cut."""
  changed = bytearray(data)
  span = rng.choice([32, 100, 300, len(data)])
  for _ in range(rng.choice([1, 1, 2, 3, 8])):
    at = rng.randrange(min(span, len(data)))
    changed[at] = rng.choice([0, 255, 127, 128, rng.randrange(256), changed[at] ^ 1])
  if rng.random() < 0.1:
    del changed[rng.randrange(len(changed)) :]
  return bytes(changed)


def _check(name, cases):
  data = FORMATS[name](chirp(0.4))
  whole, _ = decode(data)
  assert abs(len(whole) / decode(data)[1] - 0.4) < 0.15
  causes = set()
  for seed in range(cases):
    try:
      samples_NC, rate_hz = decode(_changed(data, random.Random(f"{name}{seed}")), name="x.wav")
    except AudioError as error:
      assert str(error).startswith("x.wav: ") and "\n" not in str(error), seed
      causes.add(error.cause)
      continue
    assert samples_NC.dtype == np.float32 and samples_NC.ndim == 2 and samples_NC.size, seed
    assert np.abs(samples_NC).max() <= LOUDEST and 1000 <= rate_hz <= 1_000_000, seed
    # No header makes more of a file than its bytes hold.
    assert samples_NC.size <= 100 * len(data) + RATE_HZ, seed
  assert causes, "no change was noticed"


@pytest.mark.parametrize("name", FORMATS)
def test_changed_files_are_refused_by_name_or_give_a_waveform(name):
  _check(name, 150)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FORMATS)
def test_many_changed_files_are_refused_by_name_or_give_a_waveform(name):
  _check(name, 5000)
