"""Batches: complete, padded, bucketed, and exactly restored."""

import collections
import itertools
import json
import signal

import jax
import numpy as np
import pytest
import soundfile

from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import eval_batches, train_batches
from mooer_jax.data.pack import pack
from mooer_jax.data.utterances import BadDataError
from tests.data.conftest import take_batches


@pytest.fixture
def take(model_side):
  """The first batches of a new training iterator, which is closed."""

  def take(config, count, **processes):
    return take_batches(config, model_side, count, **processes)

  return take


def _same(one, other):
  assert one.keys == other.keys
  assert one.texts == other.texts
  assert one.skipped == other.skipped
  assert one.audio_s == other.audio_s
  jax.tree.map(np.testing.assert_array_equal, one.batch, other.batch)


def _keys(batches):
  return [key for b in batches for key in b.keys]


def _with_bad_ones(shards, wav):
  """Five shards in which every fourth utterance or so is bad."""
  for _ in range(4):
    shards.add(9)
    number = len(shards.keys)
    shards.add_members(
      [(f"short{number}.wav", wav(0.1)), (f"short{number}.txt", b"A")]
      + [(f"lone{number}.wav", wav(0.5))]
    )
  shards.add(7)
  return 8


def test_every_key_once_an_epoch_and_orders_change(shards, take):
  for count in (7, 5, 8):
    shards.add(count)
  batches = take(shards.config(), 15)
  epochs = [_keys(batches[i : i + 5]) for i in (0, 5, 10)]
  for keys in epochs:
    assert sorted(keys) == shards.keys
  assert epochs[0] != epochs[1] != epochs[2]
  assert epochs[0] == _keys(take(shards.config(), 5))
  assert epochs[0] != _keys(take(shards.config(seed=1), 5))


def test_windows_of_the_same_utterances_are_shuffled_anew(shards, take):
  shards.add(12)  # one shard, one window: only the window's own shuffle can change the order
  batches = take(shards.config(batch_size=2), 18)
  assert len({tuple(_keys(batches[i : i + 6])) for i in (0, 6, 12)}) == 3


def test_an_uneven_epoch_goes_on_in_the_next_without_loss(shards, take):
  shards.add(7)
  shards.add(4)  # 11 utterances, batches of 4: 44 utterances are 4 epochs
  counts = collections.Counter(_keys(take(shards.config(), 11)))
  assert counts == dict.fromkeys(shards.keys, 4)


def test_fewer_utterances_than_a_batch_are_repeated(shards, take):
  shards.add(3)
  assert collections.Counter(_keys(take(shards.config(), 3))) == dict.fromkeys(shards.keys, 4)


def test_a_batch_holds_the_features_and_answers_of_its_keys(shards, take, tokenizer):
  from mooer_jax.data.readers.shards import read_shard

  paths = [shards.add(9), shards.add(7)]
  raw = {e.key: e for path in paths for e in read_shard(str(path))}
  for host in take(shards.config(), 4):
    batch = host.batch
    assert batch.prefix_BS.shape == (4, 0)
    assert batch.suffix_BS.tolist() == [tokenizer.encode("ASK <|im_end|>")] * 4
    seconds = 0.0
    for row, key in enumerate(host.keys):
      waveform_N = load_audio(raw[key].audio)
      seconds += len(waveform_N) / 16000
      expected_TF = FrontendConfig().features(waveform_N)
      frames = batch.frames[0][row]
      np.testing.assert_array_equal(batch.features[0][row, :frames], expected_TF)
      assert not batch.features[0][row, frames:].any()
      answer = [*tokenizer.encode(host.texts[row]), tokenizer.eos_id]
      assert host.texts[row] == f"N{int(key[3:])}"
      answer += [-1] * (batch.labels_BS.shape[1] - len(answer))
      assert batch.labels_BS[row].tolist() == answer
    assert host.audio_s == pytest.approx(seconds)
    length = batch.features[0].shape[1]
    longest = batch.frames[0].max()
    assert length == next(b for b in (10, 20, 40) if longest <= b)
    assert batch.labels_BS.shape[1] in (4, 8)


def test_sorting_saves_padding(shards, take):
  for _ in range(2):
    shards.add(32, seconds=(0.3, 2.0))

  def padded(window):
    hosts = take(shards.config(shuffle_buffer_size=window, buckets=tuple(range(1, 41))), 16)
    return sum(host.batch.features[0].shape[0] * host.batch.features[0].shape[1] for host in hosts)

  # Sorted by length in one window a batch pads to its neighbours, unsorted to its longest of 4.
  assert padded(64) < 0.8 * padded(4)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_restored_equals_uninterrupted_at_every_batch(shards, wav, model_side, prefetch):
  """36 + 7 usable utterances with skips between, so that windows cross shards and epochs."""
  _with_bad_ones(shards, wav)
  config = shards.config(prefetch=prefetch)
  dataset = train_batches(config, *model_side)
  iterator = iter(dataset)
  states, batches = [], []
  for _ in range(26):
    states.append(json.dumps(iterator.get_state()))
    batches.append(next(iterator))
  iterator.close()
  assert any(b.skipped for b in batches[:11]) and any(b.skipped for b in batches[12:])
  other = iter(dataset)
  for start in (0, 1, 2, 3, 7, 10, 11, 12, 22, 2):  # also backwards, with batches made ahead
    other.set_state(json.loads(states[start]))
    assert json.dumps(other.get_state()) == states[start]
    for expected in batches[start : start + 4]:
      _same(next(other), expected)
  other.close()
  assert max(len(state) for state in states) < 2000


def test_each_skip_is_reported_once_an_epoch(shards, wav, take):
  bad = _with_bad_ones(shards, wav)  # 43 usable: 43 batches of 4 are 4 epochs
  batches = take(shards.config(), 43)
  skipped = collections.Counter((s.cause, s.key) for b in batches for s in b.skipped)
  assert len(skipped) == bad
  # The skips behind the last usable utterance of an epoch come with the next epoch's first.
  assert all(n in (3, 4) for n in skipped.values()) and 4 in skipped.values()
  assert {cause for cause, _ in skipped} == {"too short", "no transcript"}


def test_worker_processes_give_the_same_keys_and_restore(shards, wav, model_side):
  """One test for all of it, since workers take seconds to start."""
  _with_bad_ones(shards, wav)
  for _ in range(3):
    shards.add(6)
  config = shards.config(workers=2, shuffle_buffer_size=8, prefetch=2)
  dataset = train_batches(config, *model_side)
  iterator = iter(dataset)
  states, batches = [], []
  for _ in range(30):
    states.append(json.dumps(iterator.get_state()))
    batches.append(next(iterator))
  counts = collections.Counter(_keys(batches))
  assert set(counts) == set(shards.keys)  # 61 utterances, 120 drawn: nearly two epochs
  iterator.set_state(json.loads(states[9]))
  for expected in batches[9:14]:
    _same(next(iterator), expected)
  iterator.close()
  with pytest.raises(ValueError, match=r"data\.workers was 2 and is 0"):
    iter(train_batches(shards.config(shuffle_buffer_size=8), *model_side)).set_state(
      json.loads(states[3])
    )


def test_processes_share_the_shards(shards, take):
  for _ in range(4):
    shards.add(6)
  parts = [set(_keys(take(shards.config(), 6, process=(i, 2)))) for i in range(2)]
  assert not parts[0] & parts[1]
  assert parts[0] | parts[1] == set(shards.keys)


def test_too_few_shards_name_the_remedy(shards, model_side):
  shards.add(4)
  with pytest.raises(ValueError, match="1 shards for 1 streams.*lower data.workers.*pack again"):
    train_batches(shards.config(workers=2), *model_side)
  with pytest.raises(ValueError, match="1 shards for 2 streams.*--per-shard"):
    train_batches(shards.config(), *model_side, process=(0, 2))


def test_a_bucket_too_short_for_max_s_is_refused(shards, model_side):
  shards.add(4)
  with pytest.raises(ValueError, match=r"data\.max_s=2\.0 makes 33 frames"):
    train_batches(shards.config(buckets=(10, 32)), *model_side)


def test_a_saved_position_of_other_data_is_refused(shards, model_side):
  shards.add(8)
  state = iter(train_batches(shards.config(), *model_side)).get_state()
  shards.add(8)
  with pytest.raises(ValueError, match="shards in the list was 1 and is 2"):
    iter(train_batches(shards.config(), *model_side)).set_state(state)


def test_a_saved_position_of_other_shards_with_the_same_names_is_refused(shards, model_side):
  path = shards.add(8)
  state = iter(train_batches(shards.config(), *model_side)).get_state()
  path.unlink()
  shards.list.unlink()
  assert shards.add(4) == path
  with pytest.raises(ValueError, match=r"bytes in the shards was \d+ and is \d+"):
    iter(train_batches(shards.config(), *model_side)).set_state(state)


def _bad_members(wav, encode_wav):
  nan = np.full((4000, 1), np.nan, np.float32)
  return {
    "zero_bytes": ("empty audio", b"", b"A"),
    "no_samples": ("empty audio", encode_wav(np.zeros((0, 1), np.float32)), b"A"),
    "one_sample": ("too short", encode_wav(np.zeros((1, 1), np.float32)), b"A"),
    "nan": ("not finite", encode_wav(nan, subtype="FLOAT"), b"A"),
    "noise": ("undecodable", bytes(range(256)) * 20, b"A"),
    "cut": ("undecodable", wav(1.0)[:9000], b"A"),
    "ten_minutes": ("too long", encode_wav(np.zeros((600 * 8000, 1), np.float32), 8000), b"A"),
    "short": ("too short", wav(0.19), b"A"),
    "empty_text": ("empty transcript", wav(0.5), b" \n"),
    "latin1": ("transcript not UTF-8", wav(0.5), b"\xe9t\xe9"),
    "foreign": ("unknown character", wav(0.5), "漢".encode()),
    "long_text": ("answer too long", wav(0.5), b"12345678"),
  }


def _members(utterances):
  for key, (_, audio, text) in utterances.items():
    yield from ((f"{key}.wav", audio), (f"{key}.txt", text))


def test_each_kind_of_bad_utterance_is_counted_by_its_cause(shards, wav, encode_wav, take):
  bad = _bad_members(wav, encode_wav)
  shards.add_members(_members(bad))
  cut = shards.add_members([("cut_tar.txt", b"A"), ("cut_tar.wav", wav(0.5))])
  cut.write_bytes(cut.read_bytes()[:5000])
  path = shards.add(16)
  skipped = {s.key: s for b in take(shards.config(max_bad_share=1.0), 8) for s in b.skipped}
  expected = {key: cause for key, (cause, _, _) in bad.items()} | {"cut_tar": "bad shard"}
  assert {key: s.cause for key, s in skipped.items()} == expected
  assert all(s.shard.endswith(".tar") and s.shard != str(path) for s in skipped.values())
  assert "600.0 s > data.max_s=2.0" in skipped["ten_minutes"].detail


def test_eight_channels_are_averaged(shards, wav, model_side):
  content = wav(0.5, channels=8)
  shards.add_members([("eight.wav", content), ("eight.txt", b"8")])
  (host,) = list(eval_batches(shards.config(), *model_side))
  expected_TF = FrontendConfig().features(load_audio(content))
  np.testing.assert_array_equal(host.batch.features[0][0, : len(expected_TF)], expected_TF)


def test_too_large_a_bad_share_stops_with_the_counts(shards, wav, take):
  shards.add(8)
  shards.add_members([(f"b{i}.{s}", wav(0.1)) for i in range(20) for s in ("txt", "wav")][1:])
  with pytest.raises(BadDataError, match="transcript not UTF-8 19.*raise data.max_bad_share=0.5"):
    take(shards.config(), 30)
  assert take(shards.config(max_bad_share=0.8), 30)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("make", [train_batches, eval_batches])
def test_the_error_has_the_utterances_that_no_batch_reported(
  shards, wav, model_side, make, workers
):
  for start in range(0, 30, 2):
    shards.add_members([(f"a{start}.{s}", c) for s, c in (("wav", wav(1.0)), ("txt", b"8"))])
    shards.add_members([(f"b{start + i}.txt", b"A") for i in range(2)])
  config = shards.config(max_bad_share=0.6, tolerance=20, workers=workers)
  reported = []
  with pytest.raises(BadDataError) as caught:
    for host in iter(make(config, *model_side)):
      reported += host.skipped
  keys = [skip.key for skip in (*reported, *caught.value.skipped)]
  assert caught.value.skipped and len(keys) == len(set(keys))
  assert str(caught.value).startswith(f"{len(keys)} of ")


def _cut(path):
  """Keeps the first three utterances or so of ten."""
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
  return path


def test_damaged_shards_stop_the_run_by_name_however_few_utterances_they_count(shards, take):
  for _ in range(3):
    _cut(shards.add(10))
  with pytest.raises(BadDataError, match=r"2 of 2 shards read are .*damaged: .*shards_0.*shards_0"):
    take(shards.config(), 30)
  assert take(shards.config(max_bad_share=1.0), 30)


def test_one_damaged_shard_of_three_is_reported_and_left_behind_each_epoch(shards, take):
  _cut(shards.add(10))
  for _ in range(2):
    shards.add(10)
  damage = [s for b in take(shards.config(), 30) for s in b.skipped if s.cause == "bad shard"]
  assert len(damage) >= 4


@pytest.mark.parametrize("make", [train_batches, eval_batches])
def test_a_single_damaged_shard_stops_at_the_end_of_its_epoch(shards, model_side, make):
  path = _cut(shards.add(20))
  with pytest.raises(BadDataError, match=f"1 of 1 shards read .*{path.name}"):
    for _ in iter(make(shards.config(shuffle_buffer_size=4), *model_side)):
      pass


def test_damaged_shards_are_remembered_by_a_restored_position(shards, model_side):
  for _ in range(2):
    _cut(shards.add(20))
  dataset = eval_batches(shards.config(prefetch=1, max_bad_share=0.9), *model_side)
  iterator = iter(dataset)
  states = [iterator.get_state()]
  with pytest.raises(BadDataError) as expected:
    for _ in iterator:
      states.append(json.loads(json.dumps(iterator.get_state())))
  assert len(states) > 2
  for state in states:
    other = iter(dataset)
    other.set_state(state)
    with pytest.raises(BadDataError) as caught:
      collections.deque(other, maxlen=0)
    assert str(caught.value) == str(expected.value)


def test_data_without_a_usable_utterance_stops_even_if_all_may_be_bad(shards, take):
  shards.add_members([("a.txt", b"A")])
  with pytest.raises(BadDataError, match="no usable utterance in 1 shards: no audio 1"):
    take(shards.config(max_bad_share=1.0), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_each_key_once_and_in_order(shards, wav, encode_wav, model_side, workers):
  shards.add(6)
  bad = _bad_members(wav, encode_wav)
  shards.add_members(_members(bad))
  shards.add_members([("utt0001.txt", b"A"), ("utt0001.wav", wav(0.5)), ("last.wav", b"")])
  shards.add(9)
  shards.add_members([("behind.wav", wav(0.5))])
  dataset = eval_batches(shards.config(max_bad_share=0.9, workers=workers), *model_side)
  hosts = list(dataset)
  # What is wrong only with the reference does not keep an utterance from being recognised.
  kept = ["empty_text", "foreign", "long_text"]
  assert _keys(hosts) == shards.keys[:6] + kept + shards.keys[6:]
  skipped = [s.key for host in hosts for s in host.skipped]
  assert skipped == [key for key in bad if key not in kept] + ["utt0001", "last", "behind"]
  assert [len(host.keys) for host in hosts] == [4, 4, 4, 4, 2]
  last = hosts[-1].batch
  assert last.frames[0].tolist()[2:] == [0, 0]
  assert (last.labels_BS[2:] == -1).all()
  assert not last.features[0][2:].any()
  by_key = {key: row for host in hosts for key, row in zip(host.keys, host.batch.labels_BS)}
  assert all((by_key[key] == -1).all() for key in kept)
  assert all((by_key[key] >= 0).any() for key in shards.keys)


def test_evaluation_is_restored_exactly(shards, wav, model_side):
  shards.add(6)
  shards.add_members([("utt0001.txt", b"A"), ("utt0001.wav", wav(0.5)), ("bad.wav", b"")])
  shards.add(7)
  dataset = eval_batches(shards.config(), *model_side)
  iterator = iter(dataset)
  states, hosts = [iterator.get_state()], []
  for host in iterator:
    hosts.append(host)
    states.append(iterator.get_state())
  for start, state in enumerate(states):
    other = iter(dataset)
    other.set_state(json.loads(json.dumps(state)))
    for one, expected in itertools.zip_longest(other, hosts[start:]):
      _same(one, expected)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_real_clips_go_from_lists_to_batches(clips, tmp_path, model_side, suffix):
  for clip in clips:
    samples, rate_hz = soundfile.read(clip.path)
    soundfile.write(tmp_path / f"{clip.key}.{suffix}", samples, rate_hz)
  paths = {clip.key: tmp_path / f"{clip.key}.{suffix}" for clip in clips}
  (tmp_path / "wav.scp").write_text("".join(f"{k} {p}\n" for k, p in paths.items()))
  (tmp_path / "text").write_text("".join(f"{clip.key} {clip.text}\n" for clip in clips))
  report = pack(
    tmp_path / "wav.scp", tmp_path / "text", tmp_path / "out", processes=1, progress=False
  )
  config = DataConfig(report.data_list, batch_size=len(clips), shuffle_buffer_size=len(clips))
  (host,) = list(eval_batches(config, *model_side))
  assert dict(zip(host.keys, host.texts)) == {clip.key: clip.text for clip in clips}
  for frames, key in zip(host.batch.frames[0], host.keys):
    assert frames == FrontendConfig().num_frames(len(load_audio(paths[key]))) > 5


def test_workers_keep_off_accelerators_and_leave_ctrl_c_to_the_training(monkeypatch):
  from mooer_jax.data import dataset

  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setattr(dataset, "end_with_parent", lambda: None)  # this process has no parent
  before = signal.getsignal(signal.SIGINT)
  try:
    dataset._start_worker(0, 1)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, before)
  assert dataset.os.environ["JAX_PLATFORMS"] == "cpu"
  assert jax.config.jax_platforms == "cpu"


@pytest.mark.parametrize(
  "damage",
  [
    lambda state: {},
    lambda state: {**state, "of": None},
    lambda state: {**state, "streams": {}},
    lambda state: {**state, "streams": None},
    lambda state: {**state, "streams": {"0": {}}},
  ],
)
def test_a_damaged_position_is_refused(shards, model_side, damage):
  shards.add(8)
  batches = iter(train_batches(shards.config(), *model_side))
  with pytest.raises(ValueError, match="the saved data position is damaged"):
    batches.set_state(damage(batches.get_state()))
