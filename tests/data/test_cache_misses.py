"""Cached frames are those that training reads, for all prompts and numbers of workers."""

import json
from collections import Counter

import numpy as np
import pytest

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.data.dataset import train_batches
from mooer_jax.data.feature_cache import EncodedCache, digest
from mooer_jax.data.readers.shards import read_shard
from mooer_jax.encoders.beats import BEATsConfig
from mooer_jax.encoders.whisper import WhisperConfig
from mooer_jax.run.fill_feature_cache import cache_misses, dataset_name

WHISPER = WhisperConfig(hidden_size=8, layers=1, heads=1, positions=100, context=100, trim=True)
BEATS = BEATsConfig(hidden_size=16, layers=1, heads=1, conv_pos_groups=1)


def fill(cache, config, model, skipped=None):
  """Writes made-up frames of the lengths that the encoders would give; returns how many clips."""
  count = 0
  for batch, digests, seconds in cache_misses(
    config, model, known={*cache.clips}, skipped=Counter() if skipped is None else skipped
  ):
    rows = []
    for row, name in enumerate(digests):
      rng = np.random.default_rng(int(name[:8], 16))
      lengths = (e.num_outputs(n[row]) for e, n in zip(model.encoders, batch.frames))
      made = [rng.normal(size=(n, e.hidden_size)) for n, e in zip(lengths, model.encoders)]
      rows.append((name, made, seconds[row]))
    cache.write(rows)
    count += len(rows)
  return count


def open_cache(folder, model):
  return EncodedCache(folder, {e.kind: e.hidden_size for e in model.encoders})


def test_clips_are_cached_that_evaluation_would_leave_out(shards, wav, tokenizer, tmp_path):
  """Keys that come twice, tasks that the prompts do not have, questions that are missing."""
  prompts = (("asr", "ASK"), ("qa", "ASK {}"))
  model = SpeechLLMConfig(chat_template="bare", prompts=prompts)
  (tmp_path / "drawn.json").write_text(json.dumps({"qa": ["ASK", "ASK IT"]}))
  config = shards.config(task="", prompts=str(tmp_path / "drawn.json"), prompt_tokens=4)
  for number in range(2):
    audio = wav(0.5, seed=number)
    about = json.dumps({"task": "qa"}).encode()
    shards.add_members([("same.wav", audio), ("same.txt", b"A"), ("same.json", about)])
  shards.add_members([("lost.wav", wav(0.5, seed=2)), ("lost.txt", b"A"), ("short.wav", wav(0.1))])
  cache = open_cache(tmp_path / "cache", model)
  skipped = Counter()
  assert fill(cache, config, model, skipped) == 3
  assert skipped == {"no transcript": 1}
  iterator = iter(train_batches(config, tokenizer, model, cache=cache))
  hosts = [next(iterator) for _ in range(3)]
  iterator.close()
  causes = {skip.cause for host in hosts for skip in host.skipped}
  assert causes == {"unknown task", "no transcript"}
  assert {row.tobytes() for host in hosts for row in host.batch.features[0]} == {
    np.pad(cache.get(name)[0][0], ((0, 10 - cache.get(name)[0][0].shape[0]), (0, 0))).tobytes()
    for name in list(cache.clips)[:2]
  }


@pytest.mark.parametrize("workers", [0, 2])
def test_two_encoders_frames_come_from_the_cache_also_in_workers(
  shards, tokenizer, tmp_path, workers
):
  model = SpeechLLMConfig(
    encoders=(WHISPER, BEATS),
    frontends=(WHISPER.frontend(), BEATS.frontend()),
    chat_template="bare",
    prompts=(("asr", "ASK"),),
    max_audio_s=2.0,
  )
  raw = {e.key: e for count in (5, 4) for e in read_shard(str(shards.add(count)))}
  config = shards.config(buckets=(100, 200), workers=workers)
  cache = open_cache(tmp_path, model)
  assert fill(cache, config, model) == 9
  assert fill(cache, config, model) == 0
  iterator = iter(train_batches(config, tokenizer, model, cache=cache))
  for host in [next(iterator) for _ in range(3)]:
    assert not host.skipped and host.batch.encoded
    for row, key in enumerate(host.keys):
      frames, seconds = cache.get(digest(raw[key]))
      assert host.seconds[row] == seconds
      for x_BTD, frames_B, kept_TD in zip(host.batch.features, host.batch.frames, frames):
        np.testing.assert_array_equal(x_BTD[row, : frames_B[row]], kept_TD)
        assert not x_BTD[row, frames_B[row] :].any()
  iterator.close()


def test_other_limits_add_clips_and_leave_out_others(shards, wav, model_side, tmp_path):
  tokenizer, model = model_side
  for number, seconds in enumerate((0.5, 1.0, 1.5)):
    shards.add_members([(f"{number}.wav", wav(seconds)), (f"{number}.txt", b"A")])
  cache = open_cache(tmp_path, model)
  short, long = shards.config(max_s=1.2), shards.config(max_s=1.6, min_s=0.7)
  assert fill(cache, short, model) == 2
  assert dataset_name(short) != dataset_name(long)
  assert fill(cache, long, model) == 1
  for config, keys, cause in ((short, {"0", "1"}, "too long"), (long, {"1", "2"}, "too short")):
    iterator = iter(train_batches(config, tokenizer, model, cache=cache))
    hosts = [next(iterator) for _ in range(2)]
    iterator.close()
    assert {key for host in hosts for key in host.keys} == keys
    assert {skip.cause for host in hosts for skip in host.skipped} == {cause}


def test_a_data_set_is_named_by_what_can_be_heard(shards, wav, tmp_path):
  (tmp_path / "a.wav").write_bytes(wav(0.5))
  entries = [
    {"path": "a.wav", "text": "A"},
    {"path": "b.wav", "text": "B", "expand_wav": ["c.wav"]},
  ]
  (tmp_path / "all.json").write_text(json.dumps({"annotation": entries}))
  config = shards.config(shards=str(tmp_path / "all.json"))
  names = [dataset_name(config)]
  assert dataset_name(shards.config(shards=config.shards, task="", prompts="x", seed=1)) == names[0]
  for name, seconds in (("a", 0.6), ("b", 0.5), ("c", 0.5)):
    (tmp_path / f"{name}.wav").write_bytes(wav(seconds))
    names.append(dataset_name(config))
  shards.add(2)
  names.append(dataset_name(shards.config()))
  shards.add(2)
  names.append(dataset_name(shards.config()))
  assert len(set(names)) == len(names)


def test_a_cached_clip_is_left_out_where_the_connector_makes_no_token_of_it(
  shards, wav, tokenizer, tmp_path
):
  """The frames are shared by connectors, so what one of them makes of them is asked each time."""
  for seed, seconds in enumerate((0.3, 1.3, 1.4)):
    audio = wav(seconds, seed=seed)
    shards.add_members([(f"{seed}.wav", audio), (f"{seed}.txt", b"A")])
  config = shards.config(max_s=2.0, buckets=(40,), min_s=0.1)
  model = SpeechLLMConfig(chat_template="bare", prompts=(("asr", "ASK"),))
  cache = open_cache(tmp_path / "cache", model)
  assert fill(cache, config, model) == 3
  for edge, causes in (("pad", set()), ("drop", {"0: too short"})):
    wanted = model.replace(connector=QFormerConfig(edge=edge))
    iterator = iter(train_batches(config, tokenizer, wanted, cache=cache))
    hosts = [next(iterator) for _ in range(3)]
    iterator.close()
    assert {f"{s.key}: {s.cause}" for host in hosts for s in host.skipped} == causes


def test_a_pass_with_a_filter_of_several_lines_is_not_repeated(shards, tmp_path):
  shards.add(1)
  name = dataset_name(shards.config(filter="(language == 'en'\n and duration < 3)"))
  cache = EncodedCache(tmp_path / "cache", {"sanm": 8})
  cache.mark_complete(name)
  assert cache.complete(name) and not cache.complete(dataset_name(shards.config()))
