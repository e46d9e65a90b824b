"""Recordings that are mixed into clips: found, checked before training, and kept in memory."""

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from mooer_jax.data import recordings
from mooer_jax.data.recordings import Recordings


def _open(source):
  return Recordings(str(source), option="data.augment.noise", sample_rate_hz=16000)


@pytest.fixture
def folder(tmp_path, wav):
  (tmp_path / "deep/er").mkdir(parents=True)
  for number, name in enumerate(("b.wav", "deep/er/a.WAV", "c.wav")):
    (tmp_path / name).write_bytes(wav(0.1 * (number + 1), seed=number, rate_hz=8000, channels=2))
  (tmp_path / "README.md").write_text("not audio")
  (tmp_path / "._c.wav").write_bytes(b"of macOS")
  return tmp_path


def test_a_folder_and_a_list_name_the_same_recordings(folder):
  of_folder = _open(folder)
  assert [Path(file).name for file in of_folder.files] == ["b.wav", "c.wav", "a.WAV"]
  assert [len(of_folder[n]) for n in range(3)] == [1600, 4800, 3200]  # at 16 kHz, one channel
  (folder / "list.txt").write_text("b.wav\n\nc.wav\ndeep/er/a.WAV\n")
  of_list = _open(folder / "list.txt")
  assert of_list.files == of_folder.files and of_list.description() == of_folder.description()
  (folder / "list.txt").write_text("c.wav\n")
  assert _open(folder / "list.txt").description() != of_folder.description()


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    (lambda f: f / "none", FileNotFoundError, "noise=.*none: no such folder or list"),
    (lambda f: f / "empty", FileNotFoundError, "no audio file in the folder; name a folder"),
    (lambda f: f / "c.wav", ValueError, "c.wav: is a recording; name its folder"),
    (lambda f: f / "blank.txt", ValueError, "the list is empty; write the path"),
    (lambda f: f / "lost.txt", FileNotFoundError, "1 of 2 recordings do not exist, first .*no.wav"),
    (lambda f: f / "bad.txt", ValueError, "2 of 3 recordings cannot be used, first .*cut.wav: .*"),
    (lambda f: f / "silent.txt", ValueError, "1 of 1 .*silent.wav: is silent; repair or remove"),
  ],
)
def test_what_cannot_be_used_is_refused_by_name(folder, wav, encode_wav, change, error, message):
  (folder / "empty").mkdir()
  (folder / "cut.wav").write_bytes(wav(1.0)[:9000])
  (folder / "text.wav").write_bytes(b"This is text.")
  (folder / "silent.wav").write_bytes(encode_wav(np.zeros((800, 1), np.float32)))
  (folder / "blank.txt").write_text("\n")
  (folder / "lost.txt").write_text("b.wav\nno.wav\n")
  (folder / "bad.txt").write_text("cut.wav\nb.wav\ntext.wav\n")
  (folder / "silent.txt").write_text("silent.wav\n")
  with pytest.raises(error, match=message):
    _open(change(folder))


def test_a_recording_that_is_lost_later_is_an_error(folder):
  found = _open(folder)
  Path(found.files[0]).unlink()
  with pytest.raises(ValueError, match="cannot be read any more: .*b.wav.*restore it and resume"):
    found[0]


def test_memory_is_bounded_and_the_latest_stay(folder, monkeypatch):
  monkeypatch.setattr(recordings, "_CACHED_BYTES", 4 * (1600 + 4800))
  found = _open(folder)
  loads = []
  monkeypatch.setattr(Recordings, "_load", lambda self, f, load=Recordings._load: (
    loads.append(Path(f).name), load(self, f))[1])  # fmt: skip
  for number in (0, 1, 0, 2, 0, 1):
    found[number]
  # Number 2 pushed 1 out, which was not used since 0 was.
  assert loads == ["b.wav", "c.wav", "a.WAV", "c.wav"]
  held = [x_N.nbytes for x_N in found._cached.values()]
  assert sum(held) <= recordings._CACHED_BYTES and found._free == recordings._CACHED_BYTES - sum(
    held
  )


def test_threads_and_copies_read_the_same(folder):
  found = _open(folder)
  copy = pickle.loads(pickle.dumps(found))
  results = []
  threads = [
    threading.Thread(target=lambda n=n: results.append((n % 3, found[n % 3]))) for n in range(12)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(results) == 12
  for number, waveform_N in results:
    np.testing.assert_array_equal(waveform_N, copy[number])
