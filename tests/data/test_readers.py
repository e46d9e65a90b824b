"""The contract of readers, which every format fulfils, and the tables of them."""

import contextlib
import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mooer_jax import storage
from mooer_jax.audio.decode import load_audio
from mooer_jax.data import readers
from mooer_jax.data.dataset import eval_batches, train_batches
from mooer_jax.data.prepare import prepare
from mooer_jax.data.readers.entries import CAUSES, RawUtterance, SkippedUtterance
from mooer_jax.data.readers.segments import SegmentReader
from mooer_jax.data.stats import data_stats
from tests.data.conftest import assert_resumes, make_tar, make_wav, take_with_states

COUNT = 8
SECONDS = [0.3 + number / 10 for number in range(COUNT)]
CLIPS = [make_wav(seconds, seed=number) for number, seconds in enumerate(SECONDS)]


def _shards(folder, suffix, fields=None):
  """Two tars of half of the clips each, with a .txt or a .json."""
  for part in range(2):
    members = []
    for number in range(part, COUNT, 2):
      said = ("txt", f"N{number}") if fields is None else ("json", json.dumps(fields(number)))
      members += [(f"u{number}.{said[0]}", said[1].encode()), (f"u{number}.wav", CLIPS[number])]
    path = make_tar(folder / f"{part}.tar", members)
    if suffix != ".tar":
      (folder / f"{part}{suffix}").write_bytes(gzip.compress(path.read_bytes()))
      path.unlink()
  return folder


def _list(folder):
  names = sorted(path.name for path in folder.iterdir())
  (folder / "data.list").write_text("".join(f"{name}\n" for name in names))
  return folder / "data.list"


def _files(folder):
  for number, clip in enumerate(CLIPS):
    (folder / f"{number}.wav").write_bytes(clip)
  return folder


def _lines(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def _raw_clips(folder):
  return [{"key": f"u{n}", "wav": f"{n}.wav", "txt": f"N{n}"} for n in range(COUNT)]


def _raw_segments(folder):
  """All clips in one recording, and a second between them."""
  joined, lines = [], []
  for number, clip in enumerate(CLIPS):
    start = sum(map(len, joined)) / 16000
    joined += [soundfile.read(io.BytesIO(clip), dtype="float32")[0], np.zeros(16000, np.float32)]
    times = {"start": start, "end": start + SECONDS[number]}
    lines.append({"key": f"u{number}", "wav": "long.flac", "txt": f"N{number}", **times})
  soundfile.write(folder / "long.flac", np.concatenate(joined), 16000, subtype="PCM_16")
  return lines


def _annotation(folder):
  entries = [{"path": f"{n}.wav", "text": f"N{n}", "task": "asr"} for n in range(COUNT)]
  (folder / "a.json").write_text(json.dumps({"annotation": entries}))
  return folder / "a.json"


def _emilia(folder):
  for part in range(2):
    _lines(
      folder / f"EN_B{part}.jsonl",
      [{"id": f"u{n}", "text": f" N{n}", "language": "en"} for n in range(part, COUNT, 2)],
    )
    members = [(f"EN_B{part}/u{n}.wav", CLIPS[n]) for n in range(part, COUNT, 2)]
    path = make_tar(folder / f"EN_B{part}.tar", members)
    (folder / f"EN_B{part}.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
  return folder


def _emilia_pipe(folder):
  for part in range(2):
    (folder / f"talk{part}").mkdir()
    numbers = range(part, COUNT, 2)
    segments = [{"text": f" N{n}", "start": 0.0, "end": SECONDS[n]} for n in numbers]
    (folder / f"talk{part}" / f"talk{part}.json").write_text(json.dumps(segments))
    for index, number in enumerate(numbers):
      (folder / f"talk{part}" / f"talk{part}_{index}.wav").write_bytes(CLIPS[number])
  return folder


def _prepared(folder):
  (folder / "source").mkdir()
  prepare(_shards(folder / "source", ".tar"), folder / "out", processes=1, progress=False)
  return folder / "out"


FORMATS = {
  "list of tars": lambda folder: _list(_shards(folder, ".tar")),
  "list of tar.gz": lambda folder: _list(_shards(folder, ".tar.gz")),
  "folder of tar.gz": lambda folder: _shards(folder, ".tar.gz"),
  "folder of tgz": lambda folder: _shards(folder, ".tgz"),
  "webdataset": lambda folder: _shards(folder, ".tar", lambda n: {"text": f"N{n}"}),
  "raw list": lambda folder: _lines(_files(folder) / "data.list", _raw_clips(folder)),
  "raw list of segments": lambda folder: _lines(folder / "a.jsonl", _raw_segments(folder)),
  "annotation": lambda folder: _annotation(_files(folder)),
  "emilia": _emilia,
  "emilia-pipe": _emilia_pipe,
  "prepared": _prepared,
}


@pytest.fixture(params=FORMATS)
def source(request, tmp_path):
  (tmp_path / "data").mkdir()
  return str(FORMATS[request.param](tmp_path / "data"))


def read_all(source):
  names = readers.shard_names(source)
  return [entry.load() for name in names for entry in readers.read(name)]


def test_every_utterance_is_complete_and_comes_once_in_a_fixed_order(source):
  entries = read_all(source)
  assert all(isinstance(entry, RawUtterance) for entry in entries)
  assert len({entry.key for entry in entries}) == COUNT
  by_text = {entry.transcript(): load_audio(entry.audio) for entry in entries}
  for number, clip in enumerate(CLIPS):
    np.testing.assert_array_equal(by_text[f"N{number}"], load_audio(clip))
  assert read_all(source) == entries


def test_the_files_of_the_names_exist(source):
  names = readers.shard_names(source)
  assert len({*names}) == len(names)
  assert all(os.path.isfile(readers.file_of(name)) for name in names)
  assert all(os.path.isfile(file) for file in readers.audio_files(source))


@pytest.mark.parametrize("name", ["data.list", "train.json"])
def test_a_pipe_in_place_of_a_list_is_named_and_not_waited_for(tmp_path, name):
  os.mkfifo(tmp_path / name)
  with pytest.raises(OSError, match=f"{name}: is not a regular file, but a pipe"):
    readers.shard_names(str(tmp_path / name))


def test_a_reader_can_be_left_early(source):
  with contextlib.closing(readers.read(readers.shard_names(source)[0])) as entries:
    assert isinstance(next(entries), RawUtterance)


def test_files_that_have_gone_are_counted(source):
  """After training has started, so that nothing may stop it but the share of bad utterances."""
  names = readers.shard_names(source)
  kept = source if source.endswith("a.json") else ""  # annotations are in memory, unless changed
  for path in [*Path(source).parent.rglob("*"), *Path(source).rglob("*")]:
    if path.is_file() and str(path) != kept:
      path.unlink()
  entries = [entry.load() for name in names for entry in readers.read(name)]
  assert entries and all(isinstance(entry, SkippedUtterance) for entry in entries)
  assert {entry.cause for entry in entries} <= {"bad shard", "no audio"} <= {*CAUSES}


def test_training_resumes_exactly(source, shards, model_side):
  config = shards.config(shards=source, batch_size=3, shuffle_buffer_size=6)
  dataset = train_batches(config, *model_side)
  states, hosts = take_with_states(dataset, 9)
  assert {text for host in hosts for text in host.texts} == {f"N{n}" for n in range(COUNT)}
  assert_resumes(dataset, states, hosts, at=(1, 4), count=3)


@pytest.mark.parametrize(
  ("kind", "condition"),
  [
    ("raw list", "txt != 'N3'"),
    ("raw list of segments", "txt != 'N3'"),
    ("annotation", "text != 'N3'"),
    ("emilia-pipe", "text != ' N3'"),
  ],
)
def test_audio_of_utterances_that_are_left_out_is_never_read(
  kind, condition, tmp_path, shards, model_side, monkeypatch
):
  """By the filter (N3), the label file (N4) or the share of the process (half of the others)."""
  (tmp_path / "data").mkdir()
  source = str(FORMATS[kind](tmp_path / "data"))
  entries = read_all(source)
  labels = [f"{entry.key} A\n" for entry in entries if entry.transcript() != "N4"]
  (tmp_path / "labels").write_text("".join(labels))
  opened = []
  read_bytes, read_segment = storage.read_bytes, SegmentReader.read
  monkeypatch.setattr(
    storage, "read_bytes", lambda file: (opened.append(file), read_bytes(file))[1]
  )
  monkeypatch.setattr(
    SegmentReader,
    "read",
    lambda reader, file, *times: (opened.append(file), read_segment(reader, file, *times))[1],
  )
  config = shards.config(shards=source, filter=condition, labels=str(tmp_path / "labels"))
  used = []
  for process in range(2):
    opened.clear()
    found = [
      key for host in eval_batches(config, *model_side, process=(process, 2)) for key in host.keys
    ]
    assert len([file for file in opened if not file.endswith(".json")]) == len(found) > 0
    used += found
  assert {*used} == {e.key for e in entries if e.transcript() not in ("N3", "N4")}


def test_stats_count_the_same_lengths(source):
  stats = data_stats(source, processes=1)
  assert stats.utterances == COUNT and not stats.skipped
  assert stats.seconds == pytest.approx(sum(SECONDS), abs=0.01 * COUNT)


def test_a_new_format_is_one_file(tmp_path, monkeypatch, shards, model_side):
  """Two functions and a line in each table: here, folders of NAME.wav with the text in the name."""

  def read_file(name):
    yield RawUtterance(name, name, "wav", Path(name).read_bytes(), Path(name).stem.encode())

  def files(folder):
    return sorted(map(str, Path(folder).glob("*.wav")))

  listing = readers.Listing(lambda path: path.endswith("clips"), files, files)
  reader = readers.Reader(lambda name: name.endswith(".wav"), read_file)
  monkeypatch.setattr(readers, "LISTINGS", (listing, *readers.LISTINGS))
  monkeypatch.setattr(readers, "READERS", (reader, *readers.READERS))
  (tmp_path / "clips").mkdir()
  config = shards.config(shards=str(_files(tmp_path / "clips")))
  with contextlib.closing(iter(train_batches(config, *model_side))) as batches:
    assert {*next(batches).texts, *next(batches).texts} == {str(n) for n in range(COUNT)}
  assert data_stats(config.shards, processes=1).utterances == COUNT
