"""Damaged archives: no crash, exact counts by cause, and what is whole is delivered.

Each test has a model of its own of what must come out. The `nightly` ones do the same on more.
"""

import collections
import contextlib
import gzip
import json
import random
import tarfile
import tracemalloc
import zlib
from typing import NamedTuple

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from mooer_jax.data.dataset import eval_batches, train_batches
from mooer_jax.data.readers import read, shard_names
from mooer_jax.data.readers.entries import RawUtterance
from mooer_jax.data.readers.shards import read_shard
from mooer_jax.data.utterances import BadDataError
from tests.audio.made import mp3, opus
from tests.data.conftest import Shards, encode, make_tar, make_wav

RNG = np.random.default_rng(0)
CLIP_N = RNG.uniform(-0.3, 0.3, 4800).astype(np.float32)
WAV = make_wav(0.3)


def _members(count, wav=lambda number: RNG.bytes(900)):
  return [
    (f"u{number:02d}.{suffix}", content)
    for number in range(count)
    for suffix, content in (("txt", f"N{number}".encode()), ("wav", wav(number)))
  ]


def _outcome(entries):
  """(keys that are delivered, (cause, key) of those that are skipped)."""
  entries = [entry.load() for entry in entries]
  good = [e for e in entries if isinstance(e, RawUtterance)]
  return [e.key for e in good], [(e.cause, e.key) for e in entries if e not in good]


def _evaluated(shards, model_side, **changes):
  """The same of a whole pipeline, from the archives to batches."""
  config = shards.config(max_bad_share=1.0, **changes)
  hosts = list(eval_batches(config, *model_side))
  skipped = [(skip.cause, skip.key) for host in hosts for skip in host.skipped]
  return [key for host in hosts for key in host.keys], skipped


class _Part(NamedTuple):
  """A member of a plain tar: its name, and where its header, content and end are."""

  name: str
  header: int
  content: int
  end: int


def _parts(path):
  with tarfile.open(path) as tar:
    return [_Part(m.name, m.offset, m.offset_data, m.offset_data + m.size) for m in tar]


def _after_cut(parts, size):
  """The model: what a plain tar must give that ends at a byte; its end is a block of zeros."""
  whole = {part.name for part in parts if part.end <= size}
  good = [part.name[:3] for part in parts if part.name.endswith("wav") and part.name in whole]
  cut = next((part.name[:3] for part in parts if part.header + 512 <= size < part.end), "")
  alone = next((name[:3] for name in whole if f"{name[:3]}.wav" not in whole), "")
  blocks = -(-parts[-1].end // 512)
  return good, [("bad shard", cut or alone)] if size < 512 * (blocks + 1) else []


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_at_every_percent_delivers_what_is_whole_and_names_what_is_lost(tmp_path, compressed):
  path = make_tar(tmp_path / "a.tar", _members(20))
  parts, content = _parts(path), path.read_bytes()
  stored = gzip.compress(content) if compressed else content
  cuts = [len(stored) * percent // 100 for percent in range(1, 100)]
  edges = [parts[8].content + 1, parts[9].header, parts[9].content, parts[9].end, len(stored)]
  for size in [*cuts, *edges]:
    cut = stored[:size]
    readable = zlib.decompressobj(wbits=31).decompress(cut) if compressed else cut
    path.write_bytes(cut)
    good, bad = _after_cut(parts, len(readable))
    if compressed and size < len(stored):
      bad = bad or [("bad shard", "")]  # without the checksum
    assert _outcome(read_shard(str(path))) == (good, bad), size


def _check_cuts_of_a_data_set(shards, model_side, *, percents, ending):
  """A cut shard behind a whole one."""
  shards.add(3)
  path = shards.add_members(_members(6, wav=lambda number: make_wav(0.3, seed=number)))
  parts, content = _parts(path), path.read_bytes()
  stored = gzip.compress(content) if ending == ".tar.gz" else content
  path.unlink()
  path = path.with_suffix(ending)
  path.write_bytes(stored)
  first = shards.list.read_text().split()[0]
  shards.list.write_text(f"{first}\n{path.name}\n")
  whole = [*shards.keys]
  for percent in percents:
    cut = stored[: len(stored) * percent // 100]
    readable = zlib.decompressobj(wbits=31).decompress(cut) if ending == ".tar.gz" else cut
    path.write_bytes(cut)
    good, bad = _after_cut(parts, len(readable))
    if ending == ".tar.gz":
      bad = bad or [("bad shard", "")]  # without the checksum
    assert _evaluated(shards, model_side) == (whole + good, bad), percent


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_cut_shard_of_a_data_set_costs_the_rest_of_it(shards, model_side, ending):
  _check_cuts_of_a_data_set(shards, model_side, percents=(1, 20, 50, 77, 99), ending=ending)


@pytest.mark.nightly
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_shard_cut_at_every_percent_costs_the_rest_of_it(shards, model_side, ending):
  _check_cuts_of_a_data_set(shards, model_side, percents=range(1, 100), ending=ending)


def _check_flips(shards, model_side, cases):
  """A bit of a content costs at most its utterance; one of a header, the rest of the tar."""
  shards.add(1)
  path = shards.add_members(_members(6, wav=lambda number: make_wav(0.3, seed=number)))
  content, parts = path.read_bytes(), _parts(path)
  kinds = collections.Counter()
  for case in range(cases):
    rng, flipped, damaged = random.Random(case), bytearray(content), len(parts)

    def flip(start, end, rng=rng, flipped=flipped):
      flipped[rng.randrange(start, end)] ^= 1 << rng.randrange(8)

    for _ in range(rng.choice((1, 3, 30))):
      part = rng.choice(parts)
      flip(part.content, min(part.end, part.content + rng.choice((60, 1 << 20))))
    if rng.random() < 0.4:  # one, since several may leave the checksum as it is
      damaged = rng.randrange(len(parts))
      flip(parts[damaged].header, parts[damaged].header + 148)  # the fields before the checksum
    path.write_bytes(flipped)
    found = _evaluated(shards, model_side)
    # The same contents in a new tar, up to the damaged header.
    make_tar(path, [(p.name, bytes(flipped[p.content : p.end])) for p in parts[:damaged]])
    good, bad = _evaluated(shards, model_side)
    kinds.update(cause for cause, _ in bad)
    if damaged < len(parts):
      alone = parts[damaged].name[:3] if damaged % 2 else ""
      bad = [*(one for one in bad if one[1] != alone), ("bad shard", alone)]
      kinds["bad shard"] += 1
    assert found == (good, bad), case
  return {*kinds}


def test_flipped_bits_cost_what_they_hit(shards, model_side):
  assert {"bad shard", "undecodable"} <= _check_flips(shards, model_side, 10)


@pytest.mark.nightly
def test_many_flipped_bits_cost_what_they_hit(shards, model_side):
  kinds = _check_flips(shards, model_side, 500)
  assert {"bad shard", "undecodable", "transcript not UTF-8"} <= kinds


def _check_flips_of_gzip(tmp_path, cases):
  path = tmp_path / "a.tar.gz"
  stored = gzip.compress(make_tar(tmp_path / "a.tar", _members(20)).read_bytes())
  every = [f"u{number:02d}" for number in range(20)]
  noticed = 0
  for case in range(cases):
    rng, flipped = random.Random(case), bytearray(stored)
    flipped[rng.randrange(len(stored))] ^= 1 << rng.randrange(8)
    path.write_bytes(flipped)
    good, bad = _outcome(read_shard(str(path)))
    if bad:
      assert [cause for cause, _ in bad][-1] == "bad shard" and len(good) <= 20, case
      noticed += 1
    else:  # a field of gzip's header that says nothing of the content, such as its time
      assert good == every, case
  assert noticed > 0.9 * cases  # of 20 kB, ten bytes are such fields


def test_flipped_bits_of_a_gzip_are_noticed(tmp_path):
  _check_flips_of_gzip(tmp_path, 40)


@pytest.mark.nightly
def test_many_flipped_bits_of_a_gzip_are_noticed(tmp_path):
  _check_flips_of_gzip(tmp_path, 5000)


# Utterances of each kind: members by suffix, and the cause for which it is skipped.
KINDS = {
  "good": ({"txt": b"A", "wav": WAV}, None),
  "mp3 named wav": ({"txt": b"A", "wav": mp3(CLIP_N)}, None),
  "wav named mp3": ({"mp3": WAV, "txt": b"A"}, None),
  "opus named flac": ({"txt": b"A", "flac": opus(CLIP_N)}, None),
  "suffix in capitals": ({"TXT": b"A", "WAV": WAV}, None),
  "wav named txt": ({"txt": WAV, "wav": WAV}, "transcript not UTF-8"),
  "text named wav": ({"txt": b"A", "wav": b"A transcript"}, "undecodable"),
  "unknown suffix": ({"txt": b"A", "doc": WAV}, "no audio"),
  "transcript in Latin-1": ({"txt": "Ä".encode("latin-1"), "wav": WAV}, "transcript not UTF-8"),
  "cut in a character": ({"txt": "录".encode()[:-1], "wav": WAV}, "transcript not UTF-8"),
  "half of a surrogate pair": ({"txt": b"\xed\xa0\x80", "wav": WAV}, "transcript not UTF-8"),
  "json not UTF-8": ({"json": b'{"text": "\xff"}', "wav": WAV}, "bad task"),
  "json cut": ({"json": b'{"text": "A"', "wav": WAV}, "bad task"),
  "NaN": ({"txt": b"A", "wav": encode(np.append(CLIP_N, np.nan), subtype="FLOAT")}, "not finite"),
  "infinite": ({"txt": b"A", "wav": encode(np.append(CLIP_N, -np.inf), subtype="FLOAT")},
               "not finite"),
  "cut wav": ({"txt": b"A", "wav": WAV[:-5000]}, "undecodable"),
  "no bytes": ({"txt": b"A", "wav": b""}, "empty audio"),
  "too long": ({"txt": b"A", "wav": make_wav(2.5)}, "too long"),
  "no audio": ({"txt": b"A"}, "no audio"),
  "no transcript": ({"wav": WAV}, "no transcript"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """For hypothesis, whose examples share the fixtures of a test."""
  return tmp_path_factory.mktemp("mixes")


def _check_mixes(folder, model_side, examples):
  """Archives of any mix: the good ones are delivered in order, the others counted by cause."""

  @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
  @hypothesis.given(strategies.lists(strategies.sampled_from([*KINDS]), max_size=8))
  def check(kinds):
    for path in folder.iterdir():
      path.unlink()
    shards = Shards(folder)
    wanted = [(f"u{number}", *KINDS[kind]) for number, kind in enumerate(["good", *kinds])]
    shards.add_members(
      (f"{key}.{suffix}", content) for key, contents, _ in wanted
      for suffix, content in contents.items()
    )  # fmt: skip
    good = [key for key, _, cause in wanted if not cause]
    bad = [(cause, key) for key, _, cause in wanted if cause]
    assert _evaluated(shards, model_side) == (good, bad)

  check()


def test_mixes_of_good_and_bad_utterances_are_counted_exactly(folder, model_side):
  _check_mixes(folder, model_side, 6)


@pytest.mark.nightly
def test_many_mixes_of_good_and_bad_utterances_are_counted_exactly(folder, model_side):
  _check_mixes(folder, model_side, 1000)


@pytest.fixture
def one_of_each(shards):
  """A shard with one utterance of each kind; the number of each cause."""
  shards.add_members(
    (f"u{number:02d}.{suffix}", content)
    for number, (contents, _) in enumerate(KINDS.values())
    for suffix, content in contents.items()
  )
  return collections.Counter(cause for _, cause in KINDS.values() if cause)


def test_training_delivers_the_good_ones_of_each_kind_and_counts_the_others(
  shards, model_side, one_of_each
):
  rows = len(KINDS) - one_of_each.total()
  config = shards.config(max_bad_share=1.0, batch_size=rows, shuffle_buffer_size=rows)
  with contextlib.closing(iter(train_batches(config, *model_side))) as batches:
    first, second = next(batches), next(batches)
  good = {f"u{number:02d}" for number, (_, cause) in enumerate(KINDS.values()) if not cause}
  assert {*first.keys} == {*second.keys} == good
  # Those behind the last good one come with the next epoch.
  names = {(skip.key, skip.cause) for skip in (*first.skipped, *second.skipped)}
  assert collections.Counter(cause for _, cause in names) == one_of_each


def test_too_many_bad_ones_stop_the_run_with_the_number_of_each_cause(
  shards, model_side, one_of_each
):
  bad, every = one_of_each.total(), len(KINDS)
  config = shards.config(max_bad_share=(bad - 1) / every, tolerance=every)
  with pytest.raises(BadDataError) as raised:
    next(iter(train_batches(config, *model_side)))
  message = str(raised.value)
  assert message.startswith(f"{bad} of {every} utterances cannot be used: ")
  counts = message.split(": ")[1].split(" (last")[0].split(", ")
  assert {*counts} == {f"{cause} {count}" for cause, count in one_of_each.items()}


def _json_lines(folder):
  lines = []
  for number in range(12):
    (folder / f"{number}.wav").write_bytes(WAV)
    fields = {"key": f"u{number}", "wav": f"{number}.wav", "txt": f"N{number}, 录音"}
    lines.append(json.dumps(fields, ensure_ascii=False))
  path = folder / "data.list"
  path.write_text("\n".join(lines) + "\n", "utf-8")
  return path, "key"


def _emilia(folder):
  lines = [{"id": f"u{number}", "text": f" N{number}, 录音"} for number in range(12)]
  make_tar(folder / "EN.tar", [(f"EN/u{number}.mp3", b"1") for number in range(12)])
  text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
  (folder / "EN.jsonl").write_text(text, "utf-8")
  return folder / "EN.jsonl", "id"


@pytest.mark.parametrize("write", [_json_lines, _emilia])
def test_lines_of_json_cut_at_every_percent_cost_the_line_that_is_cut(tmp_path, write):
  path, name = write(tmp_path)
  content = path.read_bytes()
  for percent in range(1, 100):
    cut = content[: len(content) * percent // 100]
    path.write_bytes(cut)
    *lines, last = cut.split(b"\n")
    good = [json.loads(line)[name] for line in lines]
    with contextlib.suppress(ValueError):
      good.append(json.loads(last)[name])
      last = b""
    source = str(path if write is _json_lines else tmp_path)
    found, skipped = _outcome(e for shard in shard_names(source) for e in read(shard))
    causes = collections.Counter(cause for cause, _ in skipped)
    assert (found, causes.pop("bad label", 0)) == (good, bool(last)), percent
    # Emilia's tar has the audio of the lines that are lost.
    assert causes == ({} if write is _json_lines else {"no transcript": 12 - len(good)}), percent


def _check_long_clip(shards, model_side, seconds):
  """One clip far above the limit, between two good ones."""
  good = (0.1 * np.sin(np.arange(1 << 20, dtype=np.float32))).astype(np.float32)
  clip = encode(np.tile(good, -(-seconds * 16000 // len(good)))[: seconds * 16000])
  shards.add_members(
    [("a.txt", b"A"), ("a.wav", WAV), ("b.txt", b"A"), ("b.wav", clip), ("c.txt", b"A")]
    + [("c.wav", WAV)]
  )
  assert _evaluated(shards, model_side) == (["a", "c"], [("too long", "b")])
  good, skipped = _evaluated(shards, model_side, truncate=True)
  assert (good, skipped) == (["a", "b", "c"], [])


def test_a_clip_far_too_long_costs_itself_or_is_truncated(shards, model_side):
  _check_long_clip(shards, model_side, 120)


@pytest.mark.nightly
def test_a_clip_of_two_hours_costs_itself_or_is_truncated(shards, model_side):
  _check_long_clip(shards, model_side, 7200)


def _check_many_members(path, count):
  """Tiny members are read in the memory of their keys, which are kept to find duplicates."""
  with open(path, "wb") as file:
    for number in range(count):
      for suffix in ("txt", "wav"):
        info = tarfile.TarInfo(f"{number:09d}.{suffix}")
        info.size = 1000
        file.write(info.tobuf() + bytes(1024))
    file.write(bytes(1024))
  tracemalloc.start()
  try:
    found = sum(isinstance(entry, RawUtterance) for entry in read_shard(str(path)))
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert found == count
  # A string of 9 characters has 58 bytes, and its place in a dict at most 108 while that grows.
  assert peak < (1 << 20) + count * (58 + 108)


def test_members_of_an_archive_are_not_kept(tmp_path):
  _check_many_members(tmp_path / "a.tar", 1000)


@pytest.mark.nightly
def test_a_million_members_of_an_archive_are_not_kept(tmp_path):
  _check_many_members(tmp_path / "a.tar", 500_000)
