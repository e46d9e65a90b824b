"""Emilia as it is published: nested tars of mp3 with labels, WebDataset, Emilia-Pipe's output."""

import dataclasses
import gzip
import io
import json
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
import soundfile

from mooer_jax.audio.decode import load_audio
from mooer_jax.data.dataset import train_batches
from mooer_jax.data.readers import emilia, read, shard_names
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance
from mooer_jax.data.utterances import BadDataError
from tests.data.conftest import make_wav


@pytest.fixture(scope="module")
def mp3():
  samples, rate_hz = soundfile.read(io.BytesIO(make_wav(0.8)))
  file = io.BytesIO()
  soundfile.write(file, samples, rate_hz, format="MP3")
  return file.getvalue()


def label(number, batch="EN_B00000", **changes):
  speaker = f"{batch}_S{number // 10:05d}"
  key = f"{speaker}_W{number % 10:06d}"
  return {
    "id": key, "wav": f"{batch}/{speaker}/mp3/{key}.mp3", "text": f" N{number}", "duration": 0.8,
    "speaker": speaker, "language": "en", "dnsmos": 3.0 + number / 100,
  } | changes  # fmt: skip


def write_batch(folder, labels, members, *, batch="EN_B00000", compressed=False):
  """`FOLDER/BATCH.jsonl` and the tar.gz of the members, in the folders of the published one."""
  folder.mkdir(exist_ok=True)
  lines = "".join(json.dumps(x) + "\n" if isinstance(x, dict) else x for x in labels)
  file = folder / f"{batch}.jsonl{'.gz' if compressed else ''}"
  file.write_bytes(gzip.compress(lines.encode()) if compressed else lines.encode())
  path = folder / f"{batch}.tar.gz"
  with tarfile.open(path, "w:gz", compresslevel=1) as tar:
    folders = {}
    for wav, content in members:
      for depth in range(1, wav.count("/") + 1):
        name = "/".join(wav.split("/")[:depth])
        if name not in folders:
          folders[name] = info = tarfile.TarInfo(name)
          info.type = tarfile.DIRTYPE
          tar.addfile(info)
      info = tarfile.TarInfo(wav)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path


def outcome(entries):
  entries = list(entries)
  good = [e for e in entries if isinstance(e, RawUtterance)]
  return good, [(e.cause, e.key) for e in entries if isinstance(e, SkippedUtterance)]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_batch_of_opendatalab_is_read_with_the_labels_beside_it(tmp_path, mp3, compressed):
  labels = [label(number) for number in range(25)]
  path = write_batch(
    tmp_path / "EN", labels, [(x["wav"], mp3) for x in labels], compressed=compressed
  )
  (tmp_path / "openemilia_all.tar.gz").write_bytes(b"labels of all")
  assert shard_names(str(tmp_path)) == [str(path)]
  good, skipped = outcome(read(str(path)))
  assert skipped == [] and [e.key for e in good] == [x["id"] for x in labels]
  assert [e.transcript() for e in good] == [f"N{number}" for number in range(25)]
  assert good[3].about == labels[3] and good[3].suffix == "mp3"
  assert len(load_audio(good[3].audio, sample_rate_hz=16000)) == 0.8 * 16000


def test_what_does_not_fit_costs_itself_and_is_named(tmp_path, mp3):
  labels = [label(number) for number in range(6)]
  lines = [
    labels[0], labels[1], labels[1], "not JSON\n", json.dumps({"id": "x"}) + "\n", "\n",
    labels[2], label(3, text="\ud800"), labels[5],
  ]  # fmt: skip
  members = [(labels[n]["wav"], mp3) for n in (0, 1, 4, 3, 2, 2)]
  members.insert(2, ("EN_B00000/README.txt", b"about"))
  path = write_batch(tmp_path / "EN", lines, members)
  good, skipped = outcome(read(str(path)))
  assert [e.key for e in good] == [label(n)["id"] for n in (0, 1, 3, 2)]
  assert skipped == [
    ("duplicate key", label(1)["id"]),
    ("bad label", "EN_B00000.jsonl:4"),
    ("bad label", "EN_B00000.jsonl:5"),
    ("no transcript", label(4)["id"]),
    ("duplicate key", label(2)["id"]),
    ("no audio", label(5)["id"]),
  ]
  with pytest.raises(UnicodeDecodeError):
    good[2].transcript()


def test_a_cut_tar_or_file_of_labels_is_reported_once(tmp_path):
  labels, rng = [label(number) for number in range(5)], np.random.default_rng(0)
  members = [(x["wav"], rng.bytes(4000)) for x in labels]  # of mp3, gzip would keep one copy
  path = write_batch(tmp_path / "EN", labels, members, compressed=True)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  good, skipped = outcome(read(str(path)))
  assert 0 < len(good) < 5 and [cause for cause, _ in skipped] == ["bad shard"]
  path.write_bytes(whole)
  beside = tmp_path / "EN" / "EN_B00000.jsonl.gz"
  labels_gz = beside.read_bytes()
  middle = len(labels_gz) // 2
  for damaged in (labels_gz[:-30], labels_gz[:middle] + b"\xff" * 20 + labels_gz[middle + 20 :]):
    beside.write_bytes(damaged)
    good, skipped = outcome(read(str(path)))
    causes = [cause for cause, _ in skipped]
    assert causes.count("bad label") >= 1 and causes.count("no transcript") == 5 - len(good)


def test_webdataset_tars_have_the_text_in_the_json(tmp_path, mp3):
  path = tmp_path / "EN-B000000.tar"
  with tarfile.open(path, "w") as tar:
    for number in range(3):
      about = label(number)
      for suffix, content in (("json", json.dumps(about).encode()), ("mp3", mp3)):
        info = tarfile.TarInfo(f"{about['id']}.{suffix}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
  assert shard_names(str(tmp_path)) == [str(path)]
  good, skipped = outcome(read(str(path)))
  assert skipped == [] and [e.transcript() for e in good] == ["N0", "N1", "N2"]
  assert good[2].about == label(2)


def test_the_output_of_emilia_pipe(tmp_path, mp3):
  folder = tmp_path / "talks" / "a talk"
  folder.mkdir(parents=True)
  segments = [
    {"text": " N1", "start": 1.0, "end": 1.8, "language": "en", "dnsmos": 3.1},
    {"text": " N2", "start": 2.0, "end": 2.8, "language": "en", "dnsmos": 3.2},
    {"start": 3.0, "end": 4.0},
    {"text": " N4", "start": 4.0, "end": 4.8, "language": "en", "dnsmos": 3.2},
  ]
  (folder / "a talk.json").write_text(json.dumps(segments))
  for name in ("a talk_0.mp3", "a talk_000001.mp3", "a talk_2.mp3"):
    (folder / name).write_bytes(mp3)
  [name] = shard_names(str(tmp_path))
  good, skipped = outcome(read(name))
  assert [(e.key, e.transcript()) for e in good] == [("a_talk_0", "N1"), ("a_talk_1", "N2")]
  assert good[0].about["duration"] == pytest.approx(0.8)
  assert skipped == [("bad label", "a_talk_2"), ("no audio", "a_talk_3")]
  (folder / "a talk.json").write_text("{}")
  assert outcome(read(name)) == ([], [("bad shard", "")])


def test_a_folder_without_data_is_refused(tmp_path):
  (tmp_path / "notes.json").write_text("[]")
  with pytest.raises(FileNotFoundError, match="no tar of audio, and no NAME/NAME.json"):
    shard_names(str(tmp_path))


def test_ten_thousand_members_are_read_in_little_memory(tmp_path):
  count, audio = 10_000, b"\0" * 2000
  labels = [label(number) for number in range(count)]
  path = write_batch(tmp_path / "EN", labels, ((x["wav"], audio) for x in labels))
  tracemalloc.start()
  read_ones = sum(isinstance(e, RawUtterance) for e in emilia.read_batch(str(path)))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  line = len(json.dumps(labels[0]))
  # The labels, with Python's objects around them; the audio alone would be 20 MB.
  assert read_ones == count and peak < count * 2 * (line + 300) < count * len(audio)


def test_a_filter_selects_what_is_trained_on_and_the_position_goes_on(
  tmp_path, mp3, shards, model_side
):
  for batch, language in (("EN_B00000", "en"), ("ZH_B00000", "zh")):
    labels = [label(number, batch, language=language) for number in range(20)]
    write_batch(tmp_path / "E", labels, [(x["wav"], mp3) for x in labels], batch=batch)
  config = shards.config(
    shards=str(tmp_path / "E"), filter="language == 'zh' and dnsmos >= 3.1", batch_size=5,
    shuffle_buffer_size=5,
  )  # fmt: skip
  batches = iter(train_batches(config, *model_side))
  keys, states = [], []
  for _ in range(4):
    states.append(batches.get_state())
    keys.append(next(batches).keys)
  first = {key for batch in keys[:2] for key in batch}
  assert first == {label(n, "ZH_B00000")["id"] for n in range(10, 20)}
  again = iter(train_batches(config, *model_side))
  again.set_state(states[2])
  assert [next(again).keys for _ in range(2)] == keys[2:]
  other = iter(train_batches(dataclasses.replace(config, filter=""), *model_side))
  with pytest.raises(ValueError, match="data.filter was .* and is ''"):
    other.set_state(states[2])
  for iterator in (batches, again, other):
    iterator.close()


def test_a_filter_that_accepts_nothing_or_names_no_field_stops(tmp_path, mp3, shards, model_side):
  labels = [label(number) for number in range(4)]
  write_batch(tmp_path / "E", labels, [(x["wav"], mp3) for x in labels])
  for text, message in (
    ("dnsmos > 9", "data.filter='dnsmos > 9' leaves out 4"),
    ("quality > 9", "no such field 4 .* no field 'quality'; there are dnsmos, duration, id"),
  ):
    config = shards.config(shards=str(tmp_path / "E"), filter=text)
    with pytest.raises(BadDataError, match=message):
      next(iter(train_batches(config, *model_side)))


def test_names_with_spaces_and_odd_characters_become_keys(tmp_path):
  """Emilia-Pipe names its output after the recording, whatever that is called."""
  name = os.fsdecode(b"Episode 1 \xff")
  (tmp_path / name).mkdir()
  (tmp_path / name / f"{name}.json").write_text('[{"text": "A"}, {"text": "B"}]')
  (tmp_path / name / f"{name}_0.mp3").write_bytes(b"1")
  [part] = shard_names(str(tmp_path))
  good, bad = outcome(entry.load() for entry in read(part))
  key = r"Episode_1_\udcff"
  assert [(raw.key, raw.audio) for raw in good] == [(f"{key}_0", b"1")]
  assert bad == [("no audio", f"{key}_1")]
  labels = [label(0, id="a b"), label(1, id="a b"), label(2, id="c\ud800")]
  path = write_batch(tmp_path / "batch", labels, [("x/a b.mp3", b"2")])
  good, bad = outcome(read(str(path)))
  assert [raw.key for raw in good] == ["a_b"]
  assert bad == [("duplicate key", "a_b"), ("no audio", r"c\ud800")]
