"""Encoder frames on disk: what was written is read, whatever interrupted it."""

import pickle

import numpy as np
import pytest

from mooer_jax.data.feature_cache import EncodedCache, digest
from mooer_jax.data.readers.entries import RawUtterance

WIDTHS = {"one": 3, "two": 2}


def clip(name, frames, seed):
  rng = np.random.default_rng(seed)
  made = [rng.normal(size=(frames, width)).astype(np.float32) for width in WIDTHS.values()]
  return name, made, frames / 50


def check(cache, clips):
  for name, frames, seconds in clips:
    found, found_s = cache.get(name)
    assert found_s == seconds
    for ours, theirs in zip(found, frames, strict=True):
      assert ours.dtype == np.float16
      np.testing.assert_array_equal(ours, theirs.astype(np.float16))


def test_frames_come_back_also_in_another_process(tmp_path):
  cache = EncodedCache(tmp_path / "a", WIDTHS)
  clips = [clip("x", 4, 0), clip("y", 1, 1), clip("z", 0, 2)]
  cache.write(clips[:2])
  cache.write(clips[2:])
  check(cache, clips)
  check(EncodedCache(tmp_path / "a", WIDTHS), clips)
  check(pickle.loads(pickle.dumps(cache)), clips)
  assert list(cache.clips) == ["x", "y", "z"] and cache.get("w") is None


@pytest.mark.parametrize("torn", ["one.float16", "two.float16", "index.jsonl"])
def test_a_torn_end_is_cut_off(tmp_path, torn):
  first, second = clip("x", 4, 0), clip("y", 5, 1)
  EncodedCache(tmp_path, WIDTHS).write([first])
  with (tmp_path / torn).open("ab") as file:
    file.write(b'["y", [4')
  cache = EncodedCache(tmp_path, WIDTHS)
  assert list(cache.clips) == ["x"]
  cache.write([second])
  check(EncodedCache(tmp_path, WIDTHS), [first, second])


def test_a_reader_sees_nothing_of_what_another_process_is_writing(tmp_path):
  clips = [clip("x", 4, 0), clip("y", 5, 1)]
  EncodedCache(tmp_path, WIDTHS).write(clips[:1])
  reader, writer = EncodedCache(tmp_path, WIDTHS), EncodedCache(tmp_path, WIDTHS)
  with (tmp_path / "one.float16").open("ab") as file:
    file.write(b"odd")  # half a record, before the reader has mapped the file
  check(reader, clips[:1])
  writer.write(clips[1:])
  check(reader, clips[:1])
  assert reader.get("y") is None
  check(EncodedCache(tmp_path, WIDTHS), clips)


def test_an_index_that_outlived_its_frames_is_cut_and_not_complete(tmp_path):
  clips = [clip("x", 4, 0), clip("y", 5, 1)]
  EncodedCache(tmp_path, WIDTHS).write(clips)
  EncodedCache(tmp_path, WIDTHS).mark_complete("train")
  frames = tmp_path / "two.float16"
  frames.write_bytes(frames.read_bytes()[:-1])
  cache = EncodedCache(tmp_path, WIDTHS)
  assert list(cache.clips) == ["x"] and not cache.complete("train")
  cache.write(clips[1:])
  cache = EncodedCache(tmp_path, WIDTHS)
  check(cache, clips)
  assert cache.complete("train")


@pytest.mark.parametrize("part", ["", "process1"])
@pytest.mark.parametrize(
  ("name", "left"), [("one.float16", 12), ("index.jsonl", -9), ("index.jsonl", "a line")]
)
def test_a_truncated_file_of_any_process_is_noticed_and_repaired(tmp_path, part, name, left):
  clips = [clip("x", 4, 0), clip("y", 5, 1)]
  for folder, number in (("", 0), ("process1", 2)):
    EncodedCache(tmp_path / folder, WIDTHS).write(
      [(f"{key}{number}", frames, seconds) for key, frames, seconds in clips]
    )
  EncodedCache(tmp_path, WIDTHS).mark_complete("train")
  assert EncodedCache(tmp_path, WIDTHS).complete("train")
  file = tmp_path / part / name
  content = file.read_bytes()
  file.write_bytes(content[: content.index(b"\n") + 1 if left == "a line" else left])
  cache = EncodedCache(tmp_path, WIDTHS)
  assert not cache.complete("train")
  kept = {*cache.known}
  cache.repair()
  cache = EncodedCache(tmp_path, WIDTHS)
  assert cache.whole and cache.known == kept and len(kept) < 4
  assert not cache.complete("train")  # also if other data sets are encoded first
  cache.mark_complete("train")
  assert EncodedCache(tmp_path, WIDTHS).complete("train")


def test_clips_without_frames_can_be_kept_alone(tmp_path):
  EncodedCache(tmp_path, WIDTHS).write([clip("z", 0, 2)])
  check(EncodedCache(tmp_path, WIDTHS), [clip("z", 0, 2)])


def test_a_data_set_is_complete_once_all_of_it_was_seen(tmp_path):
  cache = EncodedCache(tmp_path, WIDTHS)
  assert not cache.complete("train 1")
  cache.mark_complete("train 1")
  assert EncodedCache(tmp_path, WIDTHS).complete("train 1") and not cache.complete("train")


def test_values_beyond_float16_are_refused(tmp_path):
  name, frames, seconds = clip("x", 2, 0)
  frames[1][0, 0] = 1e5
  with pytest.raises(ValueError, match="two encoder has outputs beyond the range of float16"):
    EncodedCache(tmp_path, WIDTHS).write([(name, frames, seconds)])


def test_a_digest_is_of_the_audio_alone():
  one = RawUtterance("a", "s.tar", "wav", b"12", b"text", more=(b"3",))
  assert digest(one) == digest(RawUtterance("b", "t.tar", "mp3", b"12", b"", more=(b"3",)))
  assert digest(one) != digest(RawUtterance("a", "s.tar", "wav", b"123", b"text"))
  assert digest(one) != digest(RawUtterance("a", "s.tar", "wav", b"1", b"text", more=(b"23",)))
