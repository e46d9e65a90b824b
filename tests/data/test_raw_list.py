"""Raw lists: a JSON object with key, wav and txt on each line, of clips or of segments."""

import contextlib
import dataclasses
import io
import itertools
import json
import re

import numpy as np
import pytest
import soundfile

from mooer_jax.audio.decode import decode
from mooer_jax.data.dataset import train_batches
from mooer_jax.data.readers import audio_files, file_of, raw_list, read, shard_names
from mooer_jax.data.readers.entries import CAUSES, RawUtterance, SkippedUtterance
from mooer_jax.data.stats import data_stats
from mooer_jax.run.fill_feature_cache import dataset_name
from tests.data.conftest import assert_resumes, take_with_states


@pytest.fixture
def write(tmp_path, wav):
  """Writes a list beside clips of half a second and a recording of 4 s."""
  (tmp_path / "clips").mkdir()
  for number in range(4):
    (tmp_path / "clips" / f"{number}.wav").write_bytes(wav(0.5, seed=number))
  (tmp_path / "long.wav").write_bytes(wav(4.0, seed=9))

  def write(*lines, name="data.list"):
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return str(tmp_path / name)

  return write


def line(number, **changes):
  return {"key": f"u{number}", "wav": f"clips/{number % 4}.wav", "txt": f"N{number}", **changes}


def entries(path):
  found = [entry.load() for name in shard_names(path) for entry in read(name)]
  assert all(e.cause in CAUSES for e in found if isinstance(e, SkippedUtterance))
  good = [e for e in found if isinstance(e, RawUtterance)]
  return good, [e for e in found if isinstance(e, SkippedUtterance)]


@pytest.mark.parametrize("name", ["data.list", "train.jsonl", "raw.list", "lines"])
def test_clips_are_read_with_their_texts_and_fields(write, tmp_path, name):
  path = write(
    line(0, language="en", task="qa", Q="WHO?"),
    line(1, wav=str(tmp_path / "clips" / "3.wav")),
    name=name,
  )
  good, skipped = entries(path)
  assert skipped == [] and [(e.key, e.transcript()) for e in good] == [("u0", "N0"), ("u1", "N1")]
  assert (good[0].task, good[0].question, good[0].about["language"]) == ("qa", "WHO?", "en")
  assert [e.audio for e in good] == [(tmp_path / "clips" / f"{n}.wav").read_bytes() for n in (0, 3)]
  assert [e.suffix for e in good] == ["wav", "wav"]


def test_segments_are_the_samples_between_start_and_end(write, tmp_path):
  path = write(
    line(0, wav="long.wav", start=0.5, end=1.25, duration=4.0),
    line(1, wav="long.wav", start=3),
    line(2, wav="long.wav", end=1),
    line(3, wav="long.wav", start=None, end=None),
  )
  good, skipped = entries(path)
  whole_NC, _ = decode(tmp_path / "long.wav")
  for entry, (start, stop) in zip(
    good, ((8000, 20000), (48000, 64000), (0, 16000), (0, 64000)), strict=True
  ):
    np.testing.assert_array_equal(decode(entry.audio)[0], whole_NC[start:stop])
  assert skipped == []
  # Of the segment, whatever the line has.
  assert [entry.about.get("duration") for entry in good] == [0.75, None, 1, None]


@pytest.mark.parametrize(
  ("bad", "cause", "words"),
  [
    (b'{"key": "u9"', "bad label", r"data\.list:2: Expecting .*; write .*on one line"),
    (b"not JSON", "bad label", r"data\.list:2: Expecting value"),
    (b'{"key": "\xff", "wav": "a", "txt": "b"}', "bad label", r":2: .*can't decode byte 0xff"),
    (b"[1]", "bad label", ":2: not an object"),
    (b"[" * 100_000, "bad label", ":2: "),
    (line(9, key=3), "bad label", ":2: no string 'key'"),
    (line(9, key="a b"), "bad label", ":2: key='a b'"),
    (line(9, key=""), "bad label", ":2: key=''"),
    (line(9, wav="a\0b"), "bad label", ":2: wav="),
    ({"key": "u9", "wav": "clips/0.wav", "text": "N"}, "bad label", ":2: no string 'txt'"),
    (line(9, task=1), "bad label", ":2: task=1"),
    (line(9, start="0"), "bad label", ":2: start='0'"),
    (line(9, end=float("nan")), "bad label", ":2: end=nan"),
    (line(9, end=True), "bad label", ":2: end=True"),
    (line(9, start=10**400), "bad label", ":2: start=1000"),
    (line(9, start=1e300), "bad segment", "1e\\+300 to -1 s"),
    (line(0), "duplicate key", r"data\.list:2$"),
    (line(9, wav="gone.wav"), "no audio", r"data\.list:2: .*gone\.wav: No such file"),
    (line(9, wav="gone.wav", start=1), "no audio", r"data\.list:2: .*gone\.wav"),
    (line(9, wav="/dev/zero"), "no audio", "/dev/zero: is not a regular file, but a device"),
    (line(9, wav="clips"), "no audio", r"data\.list:2: .*clips: is not a regular file"),
    (line(9, wav="data.list", end=1), "undecodable", r"data\.list:2: .*data\.list"),
    (line(9, start=0.3, end=0.3), "bad segment", r"data\.list:2: 0\.3 to 0\.3 s of .*0\.500 s"),
    (line(9, start=0.3, end=0.2), "bad segment", "0.3 to 0.2 s"),
    (line(9, start=0.0, end=1.1), "bad segment", "0.0 to 1.1 s"),
    (line(9, start=0.6), "bad segment", "0.6 to -1 s"),
  ],
)  # fmt: skip
def test_a_bad_line_costs_itself_and_is_named_with_its_number(write, bad, cause, words):
  good, [skip] = entries(write(line(0), bad, line(1)))
  assert [e.key for e in good] == ["u0", "u1"] and skip.cause == cause
  assert re.search(words, skip.detail), skip.detail


def test_byte_order_mark_carriage_returns_and_blank_lines_are_ignored(write):
  lines = [b"\r", b"\xef\xbb\xbf", *(json.dumps(line(n)).encode() + b"\r" for n in range(3)), b" "]
  for first in (0, 2):
    path = write(*lines[first:3], b"", *lines[3:])
    good, skipped = entries(path)
    assert [e.transcript() for e in good] == ["N0", "N1", "N2"] and skipped == []
  path = write(b"\xef\xbb\xbf" + json.dumps(line(0)).encode(), line(1))
  assert len(entries(path)[0]) == 2


def test_empty_and_unpaired_texts_are_left_to_the_transcript(write):
  good, _ = entries(write(line(0, txt=""), line(1, txt="\ud800")))
  assert good[0].transcript() == ""
  with pytest.raises(UnicodeDecodeError):
    good[1].transcript()


@pytest.mark.parametrize(
  ("lines", "words"),
  [
    ([line(0), b"a.tar"], r"data\.list:2: 'a\.tar' is the path of a tar, but the first line is"),
    ([line(0), line(1), b" b.tar.gz\r"], r"data\.list:3: 'b\.tar\.gz'"),
    ([b"", b" "], "lists nothing; write one tar path a line, or one JSON object"),
  ],
)
def test_a_list_of_both_kinds_or_of_neither_is_refused(write, lines, words):
  with pytest.raises(ValueError, match=words):
    shard_names(write(*lines))


@pytest.mark.parametrize("limit", [1 << 14, 5, 1])
def test_parts_are_blocks_of_whole_lines_in_order(write, monkeypatch, limit):
  monkeypatch.setattr(raw_list, "_MAX_PARTS", limit)
  path = write(*(line(n, txt="ä" * (n % 7)) for n in range(1000)), b"bad")
  names = shard_names(path)
  assert len(names) == {1 << 14: 16, 5: 4, 1: 1}[limit]
  assert {*map(file_of, names)} == {path}
  good, [bad] = entries(path)
  assert [e.key for e in good] == [f"u{n}" for n in range(1000)]
  assert bad.key == "data.list:1001"


def test_a_list_that_became_shorter_is_damaged(write, tmp_path):
  path = write(line(0), line(1))
  [name] = shard_names(path)
  (tmp_path / "data.list").write_text("{}")
  [skip] = read(name)
  assert skip.cause == "bad shard" and "shorter than when it was opened" in skip.detail
  (tmp_path / "data.list").unlink()
  assert [skip.cause for skip in read(name)] == ["bad shard"]


def test_streams_and_workers_share_the_lines_and_a_run_resumes_exactly(write, shards, model_side):
  lines = [line(n, wav="long.wav", start=n / 100, end=n / 100 + 0.5) for n in range(250)]
  config = shards.config(
    shards=write(*lines), streams=2, shuffle_buffer_size=16, filter="duration < 1", max_s=1.0,
    answer_buckets=(8,),
  )  # fmt: skip
  dataset = train_batches(config, *model_side)
  states, hosts = take_with_states(dataset, 70)
  assert {key for host in hosts for key in host.keys} == {f"u{n}" for n in range(250)}
  assert_resumes(dataset, states, hosts, at=(0, 5, 33, 64), count=3)
  write(*lines[:-1], line(250))
  with pytest.raises(ValueError, match="bytes in the shards was"):
    iter(train_batches(config, *model_side)).set_state(json.loads(states[3]))
  with pytest.raises(ValueError, match="4 shards for 2 streams with data.workers=3"):
    train_batches(dataclasses.replace(config, workers=3), *model_side)


def test_data_stats_count_segments_without_decoding(write):
  path = write(
    *(line(n, wav="long.wav", start=0, end=n, language="en") for n in (1, 2, 3)),
    line(4, txt=""),
    line(5, wav="gone.wav"),
    line(6, duration=0.5),
  )
  stats = data_stats(path, processes=1)
  assert stats.utterances == 4 and stats.seconds == 6.5
  assert stats.lengths_by == {"language": {"en": 600}}
  assert stats.skipped == {"empty transcript": 1, "no audio": 1}
  assert data_stats(path, processes=1, condition="duration > 2.5").left_out == 3


def test_the_cache_of_features_belongs_to_the_recordings_and_the_segments(write, shards):
  path = write(line(0), line(4), line(1, start=0.1), b"bad", line(2, wav="gone.wav"))
  names = [str(file) for file in audio_files(path)]
  assert [name.rpartition("/")[2] for name in names] == ["data.list", "0.wav", "1.wav", "gone.wav"]
  first = dataset_name(shards.config(shards=path))
  write(line(0), line(4), line(1, start=0.15), b"bad", line(2, wav="gone.wav"))
  assert dataset_name(shards.config(shards=path)) != first


def test_compressed_recordings_are_decoded_once_for_consecutive_segments(write, tmp_path):
  samples, rate_hz = soundfile.read(io.BytesIO((tmp_path / "long.wav").read_bytes()))
  soundfile.write(tmp_path / "long.ogg", samples, rate_hz, format="OGG", subtype="VORBIS")
  path = write(*(line(n, wav="long.ogg", start=n, end=n + 1) for n in range(4)))
  good, skipped = entries(path)
  whole_NC, _ = decode(tmp_path / "long.ogg")
  joined_NC = np.concatenate([decode(entry.audio)[0] for entry in good])
  np.testing.assert_array_equal(joined_NC, whole_NC)
  assert skipped == []


def test_a_reader_that_is_left_early_closes_the_recording(write, monkeypatch):
  closed, close = [], raw_list.SegmentReader.close
  monkeypatch.setattr(
    raw_list.SegmentReader, "close", lambda self: (closed.append(self), close(self))
  )
  [name] = shard_names(write(*(line(n, wav="long.wav", start=0, end=0.3) for n in range(9))))
  with contextlib.closing(read(name)) as found:
    assert len([entry.load() for entry in itertools.islice(found, 2)]) == 2
    closed.clear()
  assert len(closed) == 1
