"""Augmentation: reproducible, as asked for, and never in evaluation."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.data.augment import Augmentation, AugmentConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import eval_batches, merge_states, train_batches
from tests.data.conftest import take_batches

FRONTEND = FrontendConfig()
SPEEDS = (0.8, 1.0, 1.25)


@pytest.fixture
def everything(tmp_path, wav, encode_wav):
  """All of it, with recordings."""
  for name in ("noise", "room"):
    (tmp_path / name).mkdir()
  for number, seconds in enumerate((0.2, 5.0)):
    (tmp_path / f"noise/{number}.wav").write_bytes(wav(seconds, seed=100 + number))
  response_N1 = (
    np.random.default_rng(0).normal(size=(2000, 1)) * np.exp(-np.arange(2000) / 300)[:, None]
  )
  (tmp_path / "room/0.wav").write_bytes(encode_wav(response_N1.astype(np.float32) / 8))
  return AugmentConfig(
    speed=SPEEDS,
    room=str(tmp_path / "room"),
    noise=str(tmp_path / "noise"),
    volume_db=(-6.0, 3.0),
    freq_masks=2,
    time_masks=2,
    time_mask_s=0.2,
  )


def _same(one, other):
  assert one.keys == other.keys and one.seconds == other.seconds
  jax.tree.map(np.testing.assert_array_equal, one.batch, other.batch)


def _rows(hosts):
  """The features of each reading, by key, in order."""
  rows = collections.defaultdict(list)
  for host in hosts:
    for key, x_TF, n in zip(host.keys, host.batch.features[0], host.batch.frames[0]):
      rows[key].append(x_TF[:n])
  return rows


def test_readings_differ_and_repeat_exactly_wherever_they_are_made(shards, model_side, everything):
  """In a resumed run, in other processes, and in another order of batches."""
  for _ in range(4):
    shards.add(5)
  config = shards.config(augment=everything, streams=4, shuffle_buffer_size=16, max_s=2.4)
  whole = iter(train_batches(config, *model_side))
  parts = [iter(train_batches(config, *model_side, process=(i, 2))) for i in range(2)]
  hosts = []
  for number in range(10):
    if number == 4:
      state = json.loads(json.dumps(merge_states([part.get_state() for part in parts])))
    hosts.append(next(whole))
    assert hosts[-1].keys == tuple(key for part in parts for key in next(part).keys)
  resumed = iter(train_batches(config, *model_side))
  resumed.set_state(state)
  for expected in hosts[4:]:
    _same(next(resumed), expected)
  for iterator in (whole, resumed, *parts):
    iterator.close()

  rows = _rows(hosts)
  assert set(rows) == set(shards.keys)
  for of_key in rows.values():
    assert len(of_key) == 2  # epochs
    assert of_key[0].shape != of_key[1].shape or (of_key[0] != of_key[1]).any()
  one_stream = _rows(take_batches(shards.config(augment=everything, max_s=2.4), model_side, 10))
  for key, of_key in rows.items():
    for x_TF, y_TF in zip(of_key, one_stream[key], strict=True):
      np.testing.assert_array_equal(x_TF, y_TF)
  other_seed = _rows(
    take_batches(shards.config(augment=everything, max_s=2.4, seed=1), model_side, 5)
  )
  key = shards.keys[0]
  assert not any(np.array_equal(other_seed[key][0], x_TF) for x_TF in rows[key])


def test_workers_make_the_readings_of_a_thread(shards, model_side, everything):
  for _ in range(2):
    shards.add(6)
  config = shards.config(augment=everything, batch_size=2, shuffle_buffer_size=6, max_s=2.4)
  rows = _rows(take_batches(config, model_side, 6))
  of_workers = _rows(take_batches(dataclasses.replace(config, workers=2), model_side, 6))
  assert set(of_workers) == set(rows) == set(shards.keys)
  for key in rows:
    np.testing.assert_array_equal(of_workers[key][0], rows[key][0])


def test_the_copies_of_an_epoch_differ(shards, model_side, wav):
  shards.add_members([("a.txt", b"A"), ("a.wav", wav(0.5)), ("a.json", b'{"task": "asr"}')])
  volume = AugmentConfig(volume_db=(-9.0, 9.0))
  config = shards.config(augment=volume, task="", task_weights={"asr": 4.0})
  (rows,) = _rows(take_batches(config, model_side, 2)).values()
  assert len({x_TF.tobytes() for x_TF in rows}) == len(rows) == 8  # in two epochs


def test_one_option_does_not_change_what_another_draws(everything, model_side):
  """So that an ablation compares equal draws."""
  full = Augmentation.load(everything, model_side[1], seed=0)
  only = Augmentation.load(
    AugmentConfig(speed=SPEEDS, volume_db=(-6.0, 3.0)), model_side[1], seed=0
  )
  for reading in range(20):
    one, other = full.of("a", reading), only.of("a", reading)
    assert one.speed == other.speed
    purposes = ("speed", "room", "noise", "volume", "masks")
    assert len({one._rng(purpose).uniform() for purpose in purposes}) == 5
    assert one._rng("volume").uniform() == other._rng("volume").uniform()


def test_speeds_are_drawn_alike_and_noise_in_its_share(everything, model_side):
  count = 3000
  augmentation = Augmentation.load(
    dataclasses.replace(everything, room="", volume_db=(0, 0), noise_snr_db=(3.0, 12.0),
                        noise_probability=0.3),
    model_side[1], seed=7,
  )  # fmt: skip
  # The seed is fixed. Six standard deviations: another seed would fail once in 10^8.
  for seconds in (0.1, 0.4):  # the noises last 0.2 and 5 s
    clip_N = np.random.default_rng(1).uniform(-0.3, 0.3, int(16000 * seconds)).astype(np.float32)
    ratios = []
    for number in range(count // 10):
      added_N = augmentation.of(f"utt{number}", 0)(clip_N) - clip_N
      if added_N.any():
        ratios.append(10 * np.log10(np.mean(clip_N**2) / np.mean(added_N.astype(float) ** 2)))
    deviation = (0.3 * 0.7 / (count / 10)) ** 0.5
    assert abs(len(ratios) / (count / 10) - 0.3) < 6 * deviation
    assert 3.0 - 1e-2 < min(ratios) and max(ratios) < 12.0 + 1e-2
    deviation = 9 / 12**0.5 / len(ratios) ** 0.5  # of the mean of uniform values
    assert abs(np.mean(ratios) - 7.5) < 6 * deviation
  speeds = collections.Counter(augmentation.of(f"utt{n}", 0).speed for n in range(count))
  assert set(speeds) == set(SPEEDS)
  deviation = (1 / 3 * 2 / 3 * count) ** 0.5
  assert all(abs(found - count / 3) < 6 * deviation for found in speeds.values())


def test_limits_apply_to_the_changed_speed(shards, model_side, wav):
  shards.add_members([
    member
    for key, seconds in {"a": 0.5, "b": 0.99, "c": 1.01}.items()
    for member in ((f"{key}.wav", wav(seconds)), (f"{key}.txt", b"A"))
  ])  # fmt: skip
  faster = AugmentConfig(speed=(2.0,))
  config = shards.config(
    augment=faster, min_s=0.4, max_s=0.5, batch_size=1, shuffle_buffer_size=1, max_bad_share=1.0
  )
  hosts = take_batches(config, model_side, 3)
  assert {host.keys for host in hosts} == {("b",)}
  assert {host.seconds for host in hosts} == {(0.495,)}
  skipped = {skip.key: skip.detail for host in hosts for skip in host.skipped}
  assert skipped == {"a": "0.250 s < data.min_s=0.4", "c": "0.5 s > data.max_s=0.5"}
  truncated = take_batches(dataclasses.replace(config, truncate=True, min_s=0), model_side, 9)
  assert {host.keys: host.seconds[0] for host in truncated} == {
    ("a",): 0.25, ("b",): 0.495, ("c",): 0.5,
  }  # fmt: skip
  assert sum(host.num_truncated for host in truncated) == 3


def test_masks_have_at_most_the_widths_of_the_config(model_side):
  config = AugmentConfig(
    freq_masks=2, freq_mask_bins=10, time_masks=1, time_mask_s=0.3, time_mask_share=0.5
  )
  augmentation = Augmentation.load(config, model_side[1], seed=0)
  for samples, longest in ((32000, 4800), (6000, 3000)):
    widths, starts, bands = [], [], []
    for number in range(400):
      masks = augmentation.of(f"utt{number}", 0).masks(samples, FRONTEND)
      assert len(masks.times) == 1 and len(masks.bands) == 2
      for start, stop in masks.times:
        assert 0 <= start <= stop <= samples
        widths.append(stop - start)
        starts.append(start)
      for low, high in masks.bands:
        assert 0 <= low <= high <= 1
        bands.append(round((high - low) * 80))
    assert 0.9 * longest < max(widths) <= longest and min(widths) < 0.1 * longest
    assert max(starts) > 0.8 * (samples - longest)
    assert set(bands) == set(range(11))


def test_features_are_those_of_the_augmented_waveform_with_masks(shards, model_side, everything):
  path = shards.add(4)
  from mooer_jax.data.readers.shards import read_shard

  raw = {entry.key: entry for entry in read_shard(str(path))}
  (host,) = take_batches(shards.config(augment=everything, max_s=2.4), model_side, 1)
  augmentation = Augmentation.load(everything, model_side[1], seed=0)
  for row, key in enumerate(host.keys):
    of_this = augmentation.of(key, 0)
    waveform_N = of_this(of_this.change_speed(load_audio(raw[key].audio)))
    assert host.seconds[row] == len(waveform_N) / 16000
    x_TF = FRONTEND.features(waveform_N, masks=of_this.masks(len(waveform_N), FRONTEND))
    np.testing.assert_array_equal(host.batch.features[0][row, : len(x_TF)], x_TF)


def test_waveforms_for_the_device_are_augmented_alike(shards, model_side, everything):
  shards.add(8)
  tokenizer, model = model_side
  waves = dataclasses.replace(everything, freq_masks=0, time_masks=0, time_mask_s=1.0)
  config = shards.config(augment=waves, max_s=2.4)
  on_host, on_device = (
    take_batches(config, (tokenizer, model.with_compute(features=place)), 2)
    for place in ("host", "device")
  )
  for one, other in zip(on_host, on_device):
    assert one.keys == other.keys
    (waveform_BN,), (samples_B,) = other.batch.features, other.batch.frames
    for x_TF, n, row_N, samples in zip(
      one.batch.features[0], one.batch.frames[0], waveform_BN, samples_B
    ):
      np.testing.assert_array_equal(x_TF[:n], FRONTEND.features(row_N[:samples]))


def test_evaluation_is_not_augmented(shards, model_side, everything):
  shards.add(6)
  plain, augmented = (
    list(eval_batches(shards.config(augment=augment, max_s=2.4), *model_side))
    for augment in (AugmentConfig(), everything)
  )
  for one, other in zip(plain, augmented, strict=True):
    _same(one, other)


def test_a_position_belongs_to_its_augmentation(shards, model_side, tmp_path, wav):
  shards.add(8)
  iterator = iter(train_batches(shards.config(), *model_side))
  state = iterator.get_state()
  early = {**state, "of": {k: v for k, v in state["of"].items() if k != "data.augment"}}
  iterator.set_state(json.loads(json.dumps(early)))  # as a version without augmentation saved it
  config = shards.config(augment=AugmentConfig(speed=(0.9, 1.1)))
  for saved in (state, early):
    with pytest.raises(
      ValueError, match=r"settings: data.augment.speed was \[\] and is \[0.9, 1.1\]; set them back"
    ):
      iter(train_batches(config, *model_side)).set_state(saved)

  def of_noise(folder, names, seconds=0.1):
    (tmp_path / folder).mkdir()
    for name in names:
      (tmp_path / folder / name).write_bytes(wav(seconds))
    augment = AugmentConfig(noise=str(tmp_path / folder))
    return iter(train_batches(shards.config(augment=augment), *model_side))

  noisy = of_noise("a", ["x.wav"]).get_state()
  of_noise("moved", ["x.wav"]).set_state(json.loads(json.dumps(noisy)))
  for other in (("more", ["x.wav", "y.wav"]), ("renamed", ["y.wav"]), ("longer", ["x.wav"], 0.2)):
    with pytest.raises(ValueError, match="belongs to other settings: data.augment.noise was"):
      of_noise(*other).set_state(noisy)


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"noise_probability": 0.2}, "noise_probability=0.2 has no effect without data.augment.noise;"),
    ({"time_mask_s": 2.0}, "time_mask_s=2.0 has no effect without data.augment.time_masks;"),
    (
      {"noise": "x", "noise_probability": 0.0},
      "noise_probability=0.* turns data.augment.noise off",
    ),
    ({"room": "x", "room_probability": 1.5}, "room_probability=1.5: must be between 0.0 and 1.0"),
    ({"noise": "x", "noise_snr_db": (9.0, 3.0)}, "noise_snr_db=.*the least value must come first"),
    ({"speed": (0.9, 3.0)}, r"speed=\(0.9, 3.0\): must be between 0.5 and 2.0"),
    ({"speed": (1.0,)}, r"speed=\(1.0,\) changes nothing; add factors"),
    ({"freq_masks": -1}, "freq_masks=-1: must be at least 0"),
    ({"freq_masks": 1, "freq_mask_bins": 0}, "freq_mask_bins=0: must be at least 1"),
  ],
)
def test_a_bad_config_is_refused_by_name(values, words):
  with pytest.raises(ValueError, match=f"data.augment.{words}"):
    AugmentConfig(**values)


def test_settings_that_exclude_each_other_name_both(shards, model_side):
  shards.add(4)
  masks = AugmentConfig(time_masks=1)
  with pytest.raises(ValueError, match="data.cache_features='x' .*data.augment.time_masks .*leave"):
    DataConfig("data.list", cache_features="x", augment=masks)
  tokenizer, model = model_side
  on_device = model.with_compute(features="device")
  with pytest.raises(ValueError, match="time_masks=1 .*compute.features='device'.*='host', or"):
    train_batches(shards.config(augment=masks), tokenizer, on_device)
  wide = AugmentConfig(freq_masks=1, freq_mask_bins=81)
  with pytest.raises(ValueError, match="freq_mask_bins=81 exceeds the 80 mel bins"):
    train_batches(shards.config(augment=wide), tokenizer, model)
