"""Packing: what goes in comes out, what cannot go in is named, and there is never half a folder."""

import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from mooer_jax.audio.decode import decode
from mooer_jax.cli import main
from mooer_jax.data.pack import normalise, pack
from mooer_jax.data.readers.entries import RawUtterance
from mooer_jax.data.readers.shards import read_list, read_shard
from tests.audio.made import chirp, encode, encode_with_av


@pytest.fixture
def lists(tmp_path, wav):
  """Seven clips with their lists; returns a function that packs them."""
  for i in range(7):
    (tmp_path / f"clip {i}.wav").write_bytes(wav(0.3, seed=i))
  scp, text = tmp_path / "wav.scp", tmp_path / "text"
  scp.write_text("".join(f"k{i} {tmp_path}/clip {i}.wav\n" for i in range(7)))
  text.write_text("".join(f"k{i}\tsay {i} to me\n" for i in range(6)) + "k6\n")

  def run(**options):
    return pack(scp, text, tmp_path / "out", **{"progress": False, "processes": 1, **options})

  return run


def _content(path):
  entries = [e for shard in read_list(path) for e in read_shard(shard)]
  assert all(isinstance(e, RawUtterance) for e in entries)
  return [(e.key, e.text.decode(), e.audio) for e in entries]


def test_what_goes_in_comes_out(lists, tmp_path):
  report = lists(per_shard=3)
  assert (report.shards, report.utterances, report.left_out) == (3, 7, ())
  names = sorted(path.name for path in (tmp_path / "out").iterdir())
  assert names == ["data.list", *(f"shards_{i:09d}.tar" for i in range(3)), "text"]
  texts = [f"SAY{i}TO▁ME" for i in range(6)] + [""]
  audio = [(tmp_path / f"clip {i}.wav").read_bytes() for i in range(7)]
  assert _content(report.data_list) == list(zip([f"k{i}" for i in range(7)], texts, audio))
  lines = (tmp_path / "out" / "text").read_text("utf-8").splitlines()
  assert lines == [f"k{i} {t}".rstrip() for i, t in enumerate(texts)]


def test_members_of_an_utterance_stand_together_transcript_first(lists, tmp_path):
  lists(per_shard=2)
  with tarfile.open(tmp_path / "out" / "shards_000000001.tar") as tar:
    assert tar.getnames() == ["k2.txt", "k2.wav", "k3.txt", "k3.wav"]


def test_transcripts_stay_as_they_are_if_asked(lists):
  assert _content(lists(normalise_text=False).data_list)[0][1] == "say 0 to me"


def test_processes_and_progress_change_nothing(lists, tmp_path, capsys):
  one = _content(lists(per_shard=2).data_list)
  (tmp_path / "out").rename(tmp_path / "first")
  assert _content(lists(per_shard=2, processes=2, progress=True).data_list) == one


def test_a_shuffle_is_a_permutation_that_the_seed_decides(lists, tmp_path):
  plain, *shuffled = ([], [], [], [])
  for i, seed in enumerate([None, 1, 1, 2]):
    keys = [key for key, _, _ in _content(lists(shuffle_seed=seed).data_list)]
    (tmp_path / "out").rename(tmp_path / f"out{i}")
    [plain, *shuffled][i].extend(keys)
  assert shuffled[0] == shuffled[1] != shuffled[2]
  assert all(sorted(keys) == plain for keys in shuffled)


def test_what_cannot_be_packed_is_named_and_the_rest_is_packed(lists, tmp_path):
  (tmp_path / "clip 1.wav").unlink()
  (tmp_path / "clip 2.wav").write_bytes(b"")
  (tmp_path / "clip 3.wav").rename(tmp_path / "clip3.wav")
  (tmp_path / "notes.wav").write_text("no audio")
  with open(tmp_path / "wav.scp", "a") as file:
    file.write(f"k0 {tmp_path}/other.wav\nk7 {tmp_path}/notes.wav\nk8 {tmp_path}/clip 4.wav\n")
    file.write("k10 a\0.wav\nk11 /dev/zero\n")
  with open(tmp_path / "text", "a") as file:
    file.write("k7 seven\nk9 nine\nk10 ten\nk11 eleven\n")
  report = lists(per_shard=1)
  assert [key for key, _, _ in _content(report.data_list)] == ["k0", "k4", "k5", "k6"]
  assert {(u.key, u.cause) for u in report.left_out} == {
    ("k0", "duplicate key"),
    ("k1", "no audio"),
    ("k2", "empty audio"),
    ("k3", "no audio"),
    ("k7", "undecodable"),
    ("k8", "no transcript"),
    ("k9", "no audio"),
    ("k10", "no audio"),
    ("k11", "no audio"),
  }
  assert len((tmp_path / "out" / "left_out.tsv").read_text().splitlines()) == 9


def test_segments_cut_exact_samples(tmp_path, wav):
  content = wav(2.0, channels=2)
  (tmp_path / "long.wav").write_bytes(content)
  (tmp_path / "wav.scp").write_text(f"rec {tmp_path}/long.wav\n")
  keys = {"a": "0 0.5", "b": "0.25 1.5", "c": "1.5 -1", "d": "1.9 2.3"}
  keys |= {"late": "2.0 2.2", "over": "1.0 2.6", "back": "1.0 0.5"}
  (tmp_path / "segments").write_text("".join(f"{k} rec {v}\n" for k, v in keys.items()))
  (tmp_path / "text").write_text("".join(f"{k} t\n" for k in keys))
  report = pack(
    tmp_path / "wav.scp",
    tmp_path / "text",
    tmp_path / "out",
    segments=tmp_path / "segments",
    processes=1,
    progress=False,
  )
  samples, _ = soundfile.read(io.BytesIO(content), dtype="int16")
  got = {
    key: soundfile.read(io.BytesIO(audio), dtype="int16")[0]
    for key, _, audio in _content(report.data_list)
  }
  bounds = {"a": (0, 8000), "b": (4000, 24000), "c": (24000, 32000), "d": (30400, 32000)}
  assert got.keys() == bounds.keys()
  for key, (start, end) in bounds.items():
    np.testing.assert_array_equal(got[key], samples[start:end])
  assert {(u.key, u.cause) for u in report.left_out} == {
    (key, "bad segment") for key in ("late", "over", "back")
  }


def test_each_recording_of_a_shard_is_decoded_once_in_any_order(tmp_path, wav, monkeypatch):
  """Three recordings of four segments, of which one is noise and one is gone."""
  for i in range(3):
    (tmp_path / f"{i}.wav").write_bytes(wav(1.0, seed=i) if i < 2 else b"noise")
  (tmp_path / "wav.scp").write_text("".join(f"rec{i} {tmp_path}/{i}.wav\n" for i in range(4)))
  keys = [f"{i}{part}" for i in range(4) for part in "abcd"]
  starts = {key: 0.2 * "abcd".index(key[1]) for key in keys}
  (tmp_path / "segments").write_text(
    "".join(f"{k} rec{k[0]} {starts[k]} {starts[k] + 0.3}\n" for k in keys)
  )
  (tmp_path / "text").write_text("".join(f"{k} t\n" for k in keys))
  decoded = []

  def counting(path):
    decoded.append(path)
    return decode(path)

  monkeypatch.setattr("mooer_jax.data.pack.decode", counting)
  reports = [
    pack(
      tmp_path / "wav.scp",
      tmp_path / "text",
      tmp_path / f"out{seed}",
      segments=tmp_path / "segments",
      processes=1,
      shuffle_seed=seed,
      progress=False,
    )
    for seed in (None, 3)
  ]
  assert sorted(decoded) == sorted(2 * [f"{tmp_path}/{i}.wav" for i in range(4)])
  plain, shuffled = ([key for key, _, _ in _content(r.data_list)] for r in reports)
  assert plain == keys[:8] and sorted(shuffled) == plain
  assert len({key[0] for key in shuffled[:4]}) == 2  # the recordings are mixed
  by_key = [{key: audio for key, _, audio in _content(r.data_list)} for r in reports]
  assert by_key[0] == by_key[1]
  for report in reports:
    causes = {u.key: u.cause for u in report.left_out}
    assert causes == {k: "undecodable" if k[0] == "2" else "no audio" for k in keys[8:]}


def test_nothing_is_overwritten(lists, tmp_path):
  (tmp_path / "out").mkdir()
  lists()  # an empty folder may be filled
  before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
  with pytest.raises(FileExistsError, match="out: exists already; remove it or choose"):
    lists()
  assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_failure_leaves_no_trace(lists, tmp_path, monkeypatch):
  def full(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("mooer_jax.data.pack._write_lists", full)
  before = sorted(tmp_path.iterdir())
  with pytest.raises(OSError, match="No space left"):
    lists()
  assert sorted(tmp_path.iterdir()) == before


def test_wrong_lists_are_refused_by_name(lists, tmp_path):
  scp = tmp_path / "wav.scp"
  good = scp.read_text()
  for line, words in (("k7\n", "'k7' has no path"), ("k7 sox a.wav |\n", "'k7' is a command")):
    scp.write_text(good + line)
    with pytest.raises(ValueError, match=words):
      lists()
  with pytest.raises(ValueError, match="per_shard=0"):
    lists(per_shard=0)
  scp.write_text("other /nowhere.wav\n")
  with pytest.raises(ValueError, match="nothing to pack; 8 utterances left out"):
    lists()
  scp.unlink()
  with pytest.raises(FileNotFoundError, match=r"wav\.scp: no such list"):
    lists()
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("hello world", "HELLO▁WORLD"),
    ("\ufeff今天 天气 very good 啊", "今天天气VERY▁GOOD啊"),
    (" it's 5 o'clock\u3000now ", "IT'S5O'CLOCK▁NOW"),
    ("a  b\tc", "A▁B▁C"),
    ("hello▁world", "HELLO▁WORLD"),
    ("straße déjà vu", "STRAßE▁DÉJÀ▁VU"),
    ("", ""),
  ],
)
def test_normalisation(text, expected):
  assert normalise(text)[0] == expected


def test_the_content_decides_not_the_extension(tmp_path):
  x = chirp()
  files = {
    "a.sph": encode(x, kind="NIST"),
    "b.AIFF": encode(x, kind="AIFF"),
    "c.mp4": encode_with_av(x, container="mp4", codec="aac"),
    "d.doc": encode(x),
    "e": encode(x, kind="FLAC"),
    "f.mp3": encode(x, kind="OGG", subtype="OPUS"),
  }
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  (tmp_path / "wav.scp").write_text("".join(f"{name} {tmp_path}/{name}\n" for name in files))
  (tmp_path / "text").write_text("".join(f"{name} t\n" for name in files))
  report = pack(
    tmp_path / "wav.scp", tmp_path / "text", tmp_path / "out", processes=1, progress=False
  )
  assert not report.left_out
  assert _content(report.data_list) == [(name, "T", data) for name, data in files.items()]
  with tarfile.open(tmp_path / "out" / "shards_000000000.tar") as tar:
    audio = [name for name in tar.getnames() if not name.endswith(".txt")]
  assert audio == ["a.sph.sph", "b.AIFF.aiff", "c.mp4.mp4", "d.doc.audio", "e.audio", "f.mp3.mp3"]


def test_transcripts_that_lose_spaces_are_counted(lists, tmp_path, capsys):
  (tmp_path / "text").write_text("k0 今天 天气 good 啊\nk1 привет мир\nk2 안녕 하세요\nk3 a b\n")
  assert lists().joined_words == 2
  (tmp_path / "out").rename(tmp_path / "first")
  assert lists(normalise_text=False).joined_words == 0
  (tmp_path / "out").rename(tmp_path / "second")
  arguments = ["--wav-scp", "wav.scp", "--text", "text", "--out", "out"]
  paths = [str(tmp_path / a) if i % 2 else a for i, a in enumerate(arguments)]
  assert main(["pack", *paths, "--processes", "1"]) == 0
  assert "2 transcripts lost spaces between words" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("tôi sẽ đi chợ", "TÔI▁SẼ▁ĐI▁CHỢ"),
    ("le café au lait", "LE▁CAFÉ▁AU▁LAIT"),
    ("ụlọ ọma", "ỤLỌ▁ỌMA"),
    ("ọjọ́ ẹ̀kọ́", "ỌJỌ́▁Ẹ̀KỌ́"),
    ("ŵy ẁ", "ŴY▁Ẁ"),
    ("ǰ ẖ", "J̌▁H̱"),
    ("ｈｉ ｙｏｕ", "ＨＩ▁ＹＯＵ"),
    ("привет мир", "приветмир"),
  ],
)
def test_every_latin_letter_has_its_capital_and_its_space(text, expected, form):
  expected = unicodedata.normalize("NFC", expected)
  assert normalise(unicodedata.normalize(form, text))[0] == expected


@given(st.text() | st.text(st.sampled_from("aZßıǰé\u0301\u0307\u0331\ufeff \tж漢한5'")))
def test_normalisation_twice_is_once_and_leaves_no_space(text):
  once, _ = normalise(text)
  assert normalise(once) == (once, 0)
  assert not any(c.isspace() for c in once)
  assert once == unicodedata.normalize("NFC", once)


def test_keys_are_read_back_as_they_were_packed_or_left_out(lists, tmp_path):
  bad = ["._u1", "a/._u1", ".DS_Store1", "/abs", "../up", "a/", "a//b", "a/./b", ".", ".."]
  good = {"./u2": "u2", "a/u3": "a/u3", "u.4": "u.4", ".u5": ".u5"}
  clip = f"{tmp_path}/clip 0.wav"
  (tmp_path / "wav.scp").write_text("".join(f"{key} {clip}\n" for key in [*bad, *good]))
  (tmp_path / "text").write_text("".join(f"{key} t\n" for key in [*bad, *good]))
  report = lists()
  assert [key for key, _, _ in _content(report.data_list)] == list(good.values())
  assert {(u.cause, u.key) for u in report.left_out} == {("bad key", key) for key in bad}


def test_lists_may_be_pipes_but_not_folders(lists, tmp_path):
  scp, clip = tmp_path / "wav.scp", f"{tmp_path}/clip 0.wav"
  scp.unlink()
  os.mkfifo(scp)
  writer = threading.Thread(target=scp.write_text, args=(f"k0 {clip}\n",))
  writer.start()
  assert lists().utterances == 1
  writer.join()
  with pytest.raises(ValueError, match="is a folder; give a list"):
    pack(tmp_path, tmp_path / "text", tmp_path / "new")
  with pytest.raises(ValueError, match="null: nothing to pack; the lists are empty"):
    pack("/dev/null", "/dev/null", tmp_path / "new")


@pytest.mark.parametrize("option", [{"processes": 0}, {"shuffle_seed": -1}])
def test_options_out_of_range(lists, option):
  with pytest.raises(ValueError, match="|".join(f"{k}={v}: must be" for k, v in option.items())):
    lists(**option)


def _children(pid):
  ids = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
  return [int(child) for child in ids.stdout.split()]


def _alive(pid):
  state = Path(f"/proc/{pid}/stat")
  return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_pack_leaves_no_worker_and_no_folder(lists, tmp_path, number):
  """The clips are pipes that nobody writes to, so the workers wait until they are released."""
  for i in range(2):
    (tmp_path / f"clip {i}.wav").unlink()
    os.mkfifo(tmp_path / f"clip {i}.wav")
  arguments = ["--wav-scp", "wav.scp", "--text", "text", "--out", "out", "--per-shard", "1"]
  command = [sys.executable, "-m", "mooer_jax.cli", "pack", *arguments, "--processes", "2"]
  packing = subprocess.Popen(command, cwd=tmp_path)
  # A write end can be opened as soon as a worker reads.
  ends = [os.open(tmp_path / f"clip {i}.wav", os.O_WRONLY) for i in range(2)]
  workers = _children(packing.pid)
  assert len(workers) >= 2
  packing.send_signal(number)
  if number == signal.SIGTERM:
    for end in ends:
      os.close(end)
  assert packing.wait(60) == (143 if number == signal.SIGTERM else -number)
  deadline = time.monotonic() + 60
  while any(map(_alive, workers)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(_alive, workers))
  if number == signal.SIGKILL:
    for end in ends:
      os.close(end)
    assert (tmp_path / ".out.partial").exists()
    for i in range(2):
      (tmp_path / f"clip {i}.wav").unlink()
    lists()  # takes the folder over
  assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_named_with_the_file(lists, tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    with pytest.raises(OSError, match=r"\.out\.partial/shards_000000000\.tar"):
      lists()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
