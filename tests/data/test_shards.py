"""Reading tars: good utterances come whole, bad ones are named, nothing is lost or raised."""

import bz2
import gzip
import json
import lzma
import tarfile
import zlib

import numpy as np
import pytest

from mooer_jax.data.dataset import eval_batches
from mooer_jax.data.readers.entries import CAUSES, RawUtterance, SkippedUtterance
from mooer_jax.data.readers.shards import read_list, read_shard
from mooer_jax.data.utterances import BadDataError
from mooer_jax.evaluation.text_files import read_text, write_text
from tests.data.conftest import make_tar


def _read(path):
  entries = list(read_shard(str(path)))
  assert all(e.cause in CAUSES for e in entries if isinstance(e, SkippedUtterance))
  good = [e.key for e in entries if isinstance(e, RawUtterance)]
  return good, [(e.cause, e.key) for e in entries if isinstance(e, SkippedUtterance)]


def test_members_come_in_either_order_and_keys_end_at_the_last_dot(shards):
  path = shards.add_members(
    [("a.b.txt", b"A"), ("a.b.wav", b"1"), ("c.FLAC", b"2"), ("c.txt", b"C"), ("./d/e.mp3", b"3")]
    + [("d/e.txt", b"D")]
  )
  entries = list(read_shard(str(path)))
  assert [(e.key, e.suffix, e.audio, e.text) for e in entries] == [
    ("a.b", "wav", b"1", b"A"),
    ("c", "flac", b"2", b"C"),
    ("d/e", "mp3", b"3", b"D"),
  ]


def test_folders_and_foreign_members_are_passed_over(tmp_path, shards):
  path = shards.add_members([("a.txt", b"A"), ("a.json", b"{}"), ("a.wav", b"1")])
  with tarfile.open(path, "a") as tar:
    tar.add(tmp_path / "shards", "folder", recursive=False)
  assert _read(path) == (["a"], [])


def test_missing_partners_and_repeated_keys_cost_only_themselves(shards):
  path = shards.add_members(
    [("a.txt", b"A"), ("b.wav", b"1"), ("c.txt", b"C"), ("c.wav", b"2"), ("c.txt", b"C")]
    + [("c.wav", b"2"), ("d.wav", b"3"), ("d.txt", b"D"), ("README", b"")]
  )
  good, bad = _read(path)
  assert good == ["c", "d"]
  assert bad == [
    ("no audio", "a"),
    ("no transcript", "b"),
    ("duplicate key", "c"),
    ("no audio", "README"),
  ]


def test_an_utterance_without_audio_is_still_one_to_be_answered(shards):
  path = shards.add_members([("a.txt", " Ä ".encode()), ("a.json", b'{"task": "qa"}')])
  [skip] = read_shard(str(path))
  assert (skip.cause, skip.text, skip.task) == ("no audio", "Ä", "qa")


def test_a_tar_cut_anywhere_gives_its_whole_utterances_and_one_report(shards):
  """Every cut of a tar of four utterances: what was complete before it is there, never more."""
  path = shards.add_members(
    [(f"{k}.{s}", k.encode() * 700) for k in "abcd" for s in ("txt", "wav")]
  )
  content = path.read_bytes()
  utterance = 2 * (512 + 1024)  # two headers, two members of two blocks
  for cut in range(0, 4 * utterance + 1, 256):
    path.write_bytes(content[:cut])
    good, bad = _read(path)
    # A member is known to be whole once its content is there; its padding to a block may be cut.
    complete = sum(cut >= (i + 1) * utterance - (1024 - 700) for i in range(4))
    assert len(good) in (complete, max(0, complete - 1)) and good == list("abcd")[: len(good)], cut
    assert len(good) >= cut // utterance - (cut % utterance != 0), cut
    assert [cause for cause, _ in bad][-1] == "bad shard", cut
    assert all(key not in good for _, key in bad), cut


@pytest.mark.parametrize("member", range(1, 8))
def test_a_damaged_header_between_members_is_not_the_end(shards, member):
  path = shards.add_members([(f"{k}.{s}", b"1") for k in "abcd" for s in ("txt", "wav")])
  content = bytearray(path.read_bytes())
  content[member * 1024 : member * 1024 + 512] = b"\x07" * 512
  path.write_bytes(content)
  good, bad = _read(path)
  assert good == list("abcd")[: member // 2]
  assert bad[-1][0] == "bad shard"


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_cut_anywhere_is_reported_and_what_was_whole_is_read(shards, compress):
  rng = np.random.default_rng(0)
  path = shards.add_members([(f"{k}.{s}", rng.bytes(3000)) for k in "abcd" for s in ("txt", "wav")])
  packed = compress(path.read_bytes())
  path.write_bytes(packed)
  assert _read(path) == (list("abcd"), [])
  counts = []
  for cut in range(1, len(packed), len(packed) // 40):
    path.write_bytes(packed[:cut])
    good, bad = _read(path)
    assert bad[-1][0] == "bad shard" and good == list("abcd")[: len(good)], cut
    counts.append(len(good))
  assert counts == sorted(counts)
  assert counts[-1] >= 3 or compress is bz2.compress  # all of it is one block


def test_a_cut_gzip_yields_every_utterance_before_the_cut(shards):
  path = shards.add_members([(f"{k}.{s}", b"1" * 9000) for k in "abcd" for s in ("txt", "wav")])
  content = path.read_bytes()
  for count in range(4):  # the tar ends in the header of an utterance
    compressor = zlib.compressobj(wbits=31)
    path.write_bytes(
      compressor.compress(content[: count * 2 * (512 + 9216) + 100])
      + compressor.flush(zlib.Z_SYNC_FLUSH)
    )
    good, bad = _read(path)
    assert good in (list("abcd")[:count], list("abcd")[: max(0, count - 1)])
    assert [cause for cause, _ in bad] == ["bad shard"]


def test_changed_bytes_in_a_gzip_are_detected_by_its_checksum(shards):
  path = shards.add_members([("a.txt", b"A"), ("a.wav", bytes(5000))])
  packed = bytearray(gzip.compress(path.read_bytes(), compresslevel=0))
  packed[5000] ^= 1  # a stored block: decompression succeeds
  path.write_bytes(packed)
  [entry, skip] = read_shard(str(path))
  assert entry.key == "a" and skip.cause == "bad shard" and "CRC" in skip.detail


def test_a_name_that_begins_like_a_compressed_file_is_not_one(shards):
  path = shards.add_members([("BZ1.txt", b"A"), ("BZ1.wav", b"1")])
  path.write_bytes(path.read_bytes()[:2048])  # without the mark of its end
  assert _read(path) == (["BZ1"], [("bad shard", "")])


def test_files_that_macos_adds_are_passed_over(shards):
  twin = b"\x00\x05\x16\x07" + bytes(100)
  names = [f"./data/{name}" for key in "ab" for name in (f"{key}.txt", f"{key}.wav")]
  members = [("./data/.DS_Store", twin)]
  for name in names:
    folder, _, file = name.rpartition("/")
    members += [(f"{folder}/._{file}", twin), (name, b"1")]
  assert _read(shards.add_members(members)) == (["data/a", "data/b"], [])


@pytest.mark.parametrize("first", ["txt", "wav"])
def test_members_that_stand_apart_are_named_with_the_remedy(shards, first):
  second = {"txt": "wav", "wav": "txt"}[first]
  path = shards.add_members([(f"{key}.{s}", b"1") for s in (first, second) for key in "abc"])
  skips = list(read_shard(str(path)))
  alone = {"txt": "no audio", "wav": "no transcript"}[first]
  assert [s.cause for s in skips] == [alone] * 3 + ["members apart"] * 3
  assert all("must be adjacent" in s.detail and "tar --sort=name" in s.detail for s in skips)


def test_a_shard_of_members_apart_stops_evaluation_with_the_remedy(shards, model_side):
  shards.add_members([(f"{key}.{s}", b"1") for s in ("txt", "wav") for key in "abc"])
  with pytest.raises(BadDataError, match=r"members apart 3 .*tar --sort=name"):
    list(eval_batches(shards.config(), *model_side))


def test_audio_goes_before_video_whichever_comes_first(shards):
  path = shards.add_members(
    [("a.mp4", b"V"), ("a.wav", b"A"), ("a.txt", b"1"), ("b.txt", b"2"), ("b.mp4", b"V")]
    + [("c.flac", b"A"), ("c.mkv", b"V"), ("c.txt", b"3")]
  )
  entries = list(read_shard(str(path)))
  assert [(e.key, e.suffix, e.audio) for e in entries] == [
    ("a", "wav", b"A"),
    ("b", "mp4", b"V"),
    ("c", "flac", b"A"),
  ]


def test_a_member_of_an_unknown_suffix_is_named(shards):
  path = shards.add_members([("a.txt", b"A"), ("a.doc", b"1"), ("a", b"2")])
  [skip] = read_shard(str(path))
  assert skip.cause == "no audio" and skip.detail.startswith("only .txt, .doc, no suffix;")


def test_names_that_are_not_utf8_become_printable_keys(shards):
  path = shards.add_members([(f"\udcc4\udce3.{s}", b"1") for s in ("txt", "wav")])
  assert _read(path) == (["\\xc4\\xe3"], [])


def test_what_is_no_tar_is_reported(shards):
  path = shards.add_members([])
  for content in (b"", b"not a tar", b"\xff" * 5000):
    path.write_bytes(content)
    assert _read(path) == ([], [("bad shard", "")])


def test_a_shard_that_has_gone_is_reported(tmp_path):
  assert _read(tmp_path / "gone.tar") == ([], [("bad shard", "")])


def test_a_list_that_is_not_utf8_is_named_with_the_line(tmp_path):
  path = tmp_path / "data.list"
  path.write_bytes(b"a.tar\ncaf\xe9.tar\n")
  with pytest.raises(ValueError, match=r"data\.list:2: not UTF-8"):
    read_list(path)


def test_the_list_takes_relative_and_absolute_paths(shards, tmp_path):
  inside, outside = shards.add(1), tmp_path / "other.tar"
  outside.write_bytes(b"")
  shards.list.write_text(f"\ufeff{inside.name}\n\n{outside}\n", "utf-8")
  assert read_list(shards.list) == [str(inside), str(outside)]


@pytest.mark.parametrize(
  ("lines", "error", "words"),
  [
    (None, FileNotFoundError, "no such list"),
    ("", ValueError, "lists nothing; write one tar path a line"),
    ("gone.tar", FileNotFoundError, "1 of 1 shards do not exist, first .*gone.tar"),
    ("https://host/a.tar", ValueError, "is a URL of the web"),
    ('a.tar\n{"key": "a"}', ValueError, "is JSON, but the first line is a path; write two lists"),
    ("data.list\ndata.list", ValueError, "more than once"),
  ],
)
def test_a_bad_list_is_refused_by_name(shards, lines, error, words):
  if lines is not None:
    shards.list.write_text(lines)
  with pytest.raises(error, match=words):
    read_list(shards.list)


def test_a_json_member_that_is_nested_too_deep_costs_its_utterance(shards):
  about = b"[" * 100_000
  path = shards.add_members(
    [("a.json", about), ("a.txt", b"A"), ("a.wav", b"1"), ("b.json", about)]
  )
  assert _read(path) == ([], [("bad task", "a"), ("no audio", "b")])


@pytest.mark.parametrize("text", ["null", "[1]", '"other"'])
def test_a_txt_is_the_transcript_whatever_the_json_has(tmp_path, text):
  about = ("a.json", f'{{"text": {text}, "language": "en"}}'.encode())
  path = make_tar(tmp_path / "s.tar", [("a.wav", b"audio"), ("a.txt", b"said"), about])
  [entry] = read_shard(str(path))
  assert (entry.transcript(), entry.about["language"]) == ("said", "en")
  path = make_tar(tmp_path / "t.tar", [("a.wav", b"audio"), about])
  [entry] = read_shard(str(path))
  if text == '"other"':
    assert entry.transcript() == "other"
  else:
    assert (entry.cause, entry.detail) == ("bad task", "a.json: text must be a string")


def test_every_key_can_be_written_to_a_text_file(shards, tmp_path):
  path = shards.add_members(
    [
      ("my dir/a\u3000b  c.txt", b"A"),
      ("my dir/a\u3000b  c.wav", b"1"),
      (".wav", b"2"),
      (".txt", b"B"),
    ]
  )
  good, bad = _read(path)
  assert good == ["my_dir/a_b_c"]
  assert bad == [("no audio", ".wav"), ("no audio", ".txt")]
  texts = dict.fromkeys([*good, *(key for _, key in bad)], "TEXT")
  write_text(tmp_path / "text", texts)
  assert read_text(tmp_path / "text") == texts


@pytest.mark.parametrize("field", ["task", "Q"])
def test_a_field_that_cannot_be_written_is_named(shards, field):
  about = json.dumps({field: "a\ud800"}).encode()
  [skipped] = read_shard(
    str(shards.add_members([("a.wav", b"1"), ("a.txt", b"A"), ("a.json", about)]))
  )
  assert skipped.cause == "bad task" and not skipped.task
  assert skipped.detail == f"a.json: {field} must be a string without NUL and lone surrogates"
