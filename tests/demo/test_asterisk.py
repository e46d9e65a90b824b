"""Debian packages and transcripts of voice prompts are read as they are written."""

import hashlib
import io
import shutil
import tarfile

import av
import numpy as np
import pytest

from demo import asterisk
from demo.asterisk import decode_g722, download, parse_transcripts, read_deb


def _member(name: str, content: bytes) -> bytes:
  header = f"{name + '/':<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode()
  return header + content + b"\n" * (len(content) % 2)


def _deb(path, files):
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode="w:xz") as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(f"./{name}")
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  # The version has an odd number of bytes, so padding follows it.
  members = {"debian-binary": b"2.0", "control.tar.xz": b"", "data.tar.xz": data.getvalue()}
  path.write_bytes(b"!<arch>\n" + b"".join(_member(*each) for each in members.items()))


def test_the_files_of_a_package_are_read(tmp_path):
  files = {"usr/share/doc/a.txt": b"text", "usr/share/b": b"\0" * 1001}
  _deb(tmp_path / "a.deb", files)
  assert read_deb(tmp_path / "a.deb") == files


@pytest.mark.parametrize("content", [b"<html>", b"!<arch>\n" + _member("debian-binary", b"2.0")])
def test_another_file_is_named(content, tmp_path):
  (tmp_path / "a.deb").write_bytes(content)
  with pytest.raises(ValueError, match=r"a\.deb: not a Debian package"):
    read_deb(tmp_path / "a.deb")


def test_transcripts_have_no_remarks_and_only_words():
  lines = (
    "\ufeff; a comment: of the file\nletters/plus: plus [+]\nbeep: (tone)\nempty:\n"
    "digits/0: cero\ndigits/0: diez\npriv: who introduces themselves as:\n"
  )
  assert parse_transcripts(lines, "en") == {
    "letters/plus": "plus", "digits/0": "cero", "priv": "who introduces themselves as:",
  }  # fmt: skip
  assert parse_transcripts(lines, "es")["digits/10"] == "diez"


def test_g722_is_decoded_at_16_khz():
  wave_N = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
  file = io.BytesIO()
  with av.open(file, "w", format="g722") as container:
    stream = container.add_stream("g722", rate=16000, layout="mono")
    frame = av.AudioFrame.from_ndarray((wave_N * 32767).astype(np.int16)[None], "s16", "mono")
    frame.sample_rate = 16000
    for packet in (*stream.encode(frame), *stream.encode(None)):
      container.mux(packet)
  decoded_N = decode_g722(file.getvalue())
  assert abs(len(decoded_N) - 16000) < 100 and decoded_N.dtype == np.float32
  spectrum = np.abs(np.fft.rfft(decoded_N))
  assert abs(int(spectrum.argmax()) * 16000 / len(decoded_N) - 440) < 5
  # G.722 has a signal-to-noise ratio of some 40 dB at this level.
  assert np.isclose(np.sqrt(np.mean(decoded_N**2)), 0.5 / np.sqrt(2), rtol=0.05)


def test_a_download_from_a_mirror_is_checked(tmp_path, monkeypatch):
  mirror = tmp_path / "mirror"
  source = mirror / asterisk.POOL / f"{asterisk.PREFIX}en_{asterisk.VERSION}_all.deb"
  source.parent.mkdir(parents=True)
  source.write_bytes(b"package")
  right = hashlib.sha256(b"package").hexdigest()
  monkeypatch.setattr(asterisk, "PACKAGES", {"en": right})
  download(tmp_path / "a", mirror.as_uri())
  shutil.rmtree(mirror)  # what is there is not downloaded again
  download(tmp_path / "a", mirror.as_uri())
  monkeypatch.setattr(asterisk, "PACKAGES", {"en": "0" * 64})
  with pytest.raises(ValueError, match=rf"{source.name}: SHA-256 {right}.*remove the file"):
    download(tmp_path / "a", mirror.as_uri())
  with pytest.raises(OSError, match=rf"{source.name}: .*choose another Debian mirror"):
    download(tmp_path / "b", mirror.as_uri())
  assert [*(tmp_path / "b").iterdir()] == []
