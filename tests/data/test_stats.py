"""`mooer-jax data stats`: counts of a data set, and the buckets that it suggests."""

import io
import itertools
import json

import numpy as np
import pytest
import soundfile

from mooer_jax import cli
from mooer_jax.data.dataset import eval_batches
from mooer_jax.data.stats import Stats, data_stats, padding_share, suggest_buckets
from tests.data.conftest import make_wav


def stats_of(*seconds):
  stats = Stats()
  for value in seconds:
    stats.lengths[round(100 * value)] += 1
  return stats


@pytest.fixture
def mixed(shards):
  """Two shards, one with wrong lengths in a .json, and utterances that cannot be used."""
  for language, seconds in (("en", (1.0, 2.0)), ("zh", (3.0, 4.0))):
    members = []
    for number, value in enumerate(seconds):
      key = f"{language}{number}"
      about = {"text": "N1", "language": language, "speaker": language}
      if language == "zh":
        about["duration"] = 10 * value  # the audio is what training reads
      members += [(f"{key}.json", json.dumps(about).encode()), (f"{key}.wav", make_wav(value))]
    members += [(f"{language}lone.wav", make_wav(0.5)), (f"{language}bad.wav", b"no audio")]
    members += [(f"{language}bad.txt", b"N1")]
    shards.add_members(members)
  return str(shards.list)


@pytest.mark.parametrize("announced", [10**400, 1e308, float("nan"), float("inf"), -1])
def test_an_impossible_duration_is_measured_instead(shards, announced):
  about = json.dumps({"text": "N1", "duration": announced}).encode()
  shards.add_members([("a.json", about), ("a.wav", make_wav(1.5))])
  stats = data_stats(str(shards.list), processes=1)
  assert (stats.utterances, stats.seconds) == (1, 1.5)


@pytest.mark.parametrize("processes", [1, 2])
def test_everything_is_counted_once(mixed, processes):
  stats = data_stats(mixed, processes=processes)
  assert (stats.shards, stats.utterances, stats.seconds) == (2, 4, 1 + 2 + 3 + 4)
  assert stats.lengths_by == {"language": {"en": 300, "zh": 700}}
  assert stats.skipped == {"no transcript": 2, "undecodable": 2} and stats.speakers == {"en", "zh"}
  assert [stats.length_at(share) for share in (0, 0.5, 1)] == [1, 2, 4]


def test_lengths_are_those_of_decoding_where_headers_mislead(shards):
  samples, files = np.full(16000, 0.1, np.float32), {}
  for kind in ("OGG", "FLAC"):
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format=kind)
    files[kind] = file.getvalue()
  streamed = bytearray(files["FLAC"])
  streamed[21] &= 0xF0  # no number of samples, as if written to a pipe
  streamed[22:26] = bytes(4)
  clips = [2 * files["OGG"], 2 * files["FLAC"], bytes(streamed), make_wav(1.0)[:20000]]
  shards.add_members([
    member
    for number, clip in enumerate(clips)
    for member in ((f"{number}.txt", b"N1"), (f"{number}.audio", clip))
  ])  # fmt: skip
  stats = data_stats(str(shards.list), processes=1)
  assert stats.lengths == {200: 2, 100: 1} and stats.skipped == {"undecodable": 1}


@pytest.mark.parametrize("kind", ["FLAC", "MP3", "WAV", "OGG"])
def test_truncated_files_are_damaged_as_in_training(shards, tmp_path, model_side, kind):
  """Their headers and labels have the length that they had."""
  file = io.BytesIO()
  soundfile.write(file, np.random.default_rng(0).uniform(-0.1, 0.1, 32000), 16000, format=kind)
  whole = file.getvalue()
  about = json.dumps({"text": "1", "duration": 2.0}).encode()
  for name, audio in (("whole", whole), ("cut", whole[: len(whole) // 2])):
    (tmp_path / f"{name}.audio").write_bytes(audio)
    shards.add_members([(f"{name}.json", about), (f"{name}.audio", audio)])
  line = '{{"key": "{0}", "wav": "{0}.audio", "txt": "1"}}\n'
  raw_list = tmp_path / "raw.list"
  raw_list.write_text("".join(line.format(name) for name in ("whole", "cut")))
  for source in (shards.list, raw_list):
    found = data_stats(source, processes=1)
    assert (found.utterances, found.seconds, found.skipped) == (1, 2.0, {"undecodable": 1})
    config = shards.config(shards=str(source), max_bad_share=0.5)
    hosts = list(eval_batches(config, *model_side))
    assert [key for host in hosts for key in host.keys] == ["whole"]


def test_the_command_prints_writes_and_draws(mixed, tmp_path, capsys):
  png, file = tmp_path / "lengths.png", tmp_path / "stats.json"
  options = ["--filter", "language == 'zh'", "--max-s", "6", "--buckets", "2", "--processes", "1"]
  files = ["--png", str(png), "--json", str(file)]
  assert cli.main(["data", "stats", mixed, *options, *files]) == 0
  out = capsys.readouterr().out
  assert "2 utterances, 0.00 hours in 2 shards" in out and "left out by the filter: 2" in out
  assert "hours by language: zh 0.00" in out and "data.buckets = (" in out
  about = json.loads(file.read_text())
  assert about["hours_by"]["language"] == {"zh": 7 / 3600} and about["left_out"] == 2
  assert about["buckets"][-1] == 100 and png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["nowhere"], "nowhere: no such list"),
    (["a.tar"], "a.tar: is a tar; name its folder, or a list with its path on a line"),
    (["{list}", "--filter", "f()"], "data.filter='f()'"),
    (["{list}", "--filter", "a =="], "data.filter='a ==': invalid syntax; write fields"),
    (["{list}", "--max-s", "nan"], "--max-s nan: must be above 0"),
    (["{list}", "--buckets", "0"], "--buckets 0: must be above 0"),
    (["{list}", "--json", "{list}"], "data.list exists; name another file"),
  ],
)
def test_bad_arguments_are_one_line(mixed, capsys, arguments, message):
  assert cli.main(["data", "stats", *(text.format(list=mixed) for text in arguments)]) == 2
  assert message in capsys.readouterr().err


def test_data_that_cannot_be_used_are_status_1(shards, capsys):
  shards.add_members([("a.wav", make_wav(0.5))])
  assert cli.main(["data", "stats", str(shards.list), "--processes", "1"]) == 1
  out = capsys.readouterr().out
  assert "cannot be used: 1 utterances (no transcript 1)" in out
  assert f"no transcript: for example a in {shards.list.parent}" in out


def test_a_field_that_the_filter_lacks_is_named(mixed, capsys):
  cli.main(["data", "stats", mixed, "--filter", "snr > 3", "--processes", "1"])
  out = capsys.readouterr().out
  assert "no such field: for example " in out and "no field 'snr'; there are " in out


def test_clips_that_training_skips_for_their_length_are_counted(mixed, capsys):
  seconds = sorted(data_stats(mixed, processes=1).lengths.elements())
  max_s = seconds[-1] / 100 - 0.01
  cli.main(["data", "stats", mixed, "--max-s", str(max_s), "--processes", "1"])
  number = sum(ticks > 100 * max_s for ticks in seconds)
  assert f"longer than {max_s:g} s: {number} utterances" in capsys.readouterr().out
  cli.main(["data", "stats", mixed, "--processes", "1"])
  assert "longer than" not in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_no_other_buckets_waste_less(count):
  rng = np.random.default_rng(count)
  stats = stats_of(*rng.choice([0.3, 0.5, 0.6, 1.1, 1.7, 2.0], 40))
  buckets = suggest_buckets(stats, count=count, step_s=0.1, max_s=2.4)
  assert buckets == sorted({*buckets}) and buckets[-1] == 24 and len(buckets) <= count
  best = min(
    padding_share(stats, [*some, 24], step_s=0.1)
    for size in range(count)
    for some in itertools.combinations(range(1, 24), size)
  )
  assert padding_share(stats, buckets, step_s=0.1) == pytest.approx(best)
  if count < 6:
    assert best > padding_share(stats, [3, 5, 6, 11, 17, 20, 24], step_s=0.1)


def test_longer_clips_are_not_in_the_padding():
  stats = stats_of(1.0, 50.0)
  buckets = suggest_buckets(stats, count=3, step_s=0.06, max_s=20)
  assert buckets == [17, 334]
  assert padding_share(stats, buckets, step_s=0.06) == pytest.approx(1 - (1 / 0.06) / 17)
