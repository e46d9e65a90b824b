"""Padding: to the smallest bucket that fits, for one or several encoders."""

import types

import numpy as np
import pytest

from mooer_jax.audio.fbank import FbankConfig
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.data.batches import Batcher
from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import train_batches
from mooer_jax.data.examples import Example
from mooer_jax.data.readers.entries import SkippedUtterance
from mooer_jax.nn.compute import ExecutionConfig

MOOER = FrontendConfig()
FINER = FrontendConfig(fbank=FbankConfig(bins=40), lfr_window=4, lfr_stride=4)


def _example(key, samples, frontends, answer=3):
  waveform_N = np.random.default_rng(samples).uniform(-0.3, 0.3, samples).astype(np.float32)
  made = tuple(frontend.features(waveform_N) for frontend in frontends)
  skipped = (SkippedUtterance("too short", f"before {key}", "a.tar"),)
  tokens = [np.arange(size, dtype=np.int32) for size in (1, 5, answer)]
  return Example(key, key, made, "asr", *tokens, samples / 16000, skipped=skipped)


def _batcher(frontends):
  config = DataConfig(
    "", batch_size=3, shuffle_buffer_size=3, buckets=(9, 20, 34), answer_buckets=(4, 9), max_s=2
  )
  model = types.SimpleNamespace(  # of encoders that there are none of
    frontends=frontends,
    prompts=(("asr", "B<SpeechHere>AFTER"),),
    min_audio_s=0.0,
    sample_rate_hz=16000,
    compute=ExecutionConfig(),
  )
  return Batcher(config, model, (2, 6))


def test_the_smallest_bucket_that_holds_all():
  batcher = _batcher([MOOER])
  # (6 * 9 - 1) hops and a frame are the first 9 steps' last clip; one hop more is a tenth step.
  for samples, length in ((4000, 9), (53 * 160 + 400 + 159, 9), (54 * 160 + 400, 20), (32000, 34)):
    host = batcher([_example("a", 4000, [MOOER]), _example("b", samples, [MOOER])])
    assert host.batch.features[0].shape == (3, length, 560), samples
    assert host.batch.frames[0].tolist() == [*map(FrontendConfig().num_frames, (4000, samples)), 0]
  for answer, length in ((0, 4), (4, 4), (5, 9)):
    host = batcher([_example("a", 4000, [MOOER], answer)])
    assert host.batch.labels_BS.shape == (3, length)


def test_skips_come_in_order_and_with_those_left_over():
  last = SkippedUtterance("no audio", "behind", "a.tar")
  host = _batcher([MOOER])([_example(k, 4000, [MOOER]) for k in "ab"], [last])
  assert [s.key for s in host.skipped] == ["before a", "before b", "behind"]


@pytest.mark.parametrize("samples", [1000, 9039, 9040, 20000, 32000])
def test_two_encoders_each_get_a_length_that_holds_their_features(samples):
  frontends = [MOOER, FINER]
  host = _batcher(frontends)([_example("a", samples, frontends)])
  for x_BTF, frames_B, frontend in zip(host.batch.features, host.batch.frames, frontends):
    assert frames_B.tolist() == [frontend.num_frames(samples), 0, 0]
    assert frames_B[0] <= x_BTF.shape[1]
  # The bucket is chosen by the clip's length, so a second encoder adds no shapes.
  assert [x.shape[1] for x in host.batch.features] in ([9, 14], [20, 30], [34, 51])


def test_batches_are_the_same_wherever_their_features_are_computed(shards, model_side):
  shards.add(12)
  shards.add(11)
  config, (tokenizer, model) = shards.config(), model_side
  on_host, on_device = (
    iter(train_batches(config, tokenizer, model.with_compute(features=place)))
    for place in ("host", "device")
  )
  for iteration in range(6):
    one, other = next(on_host), next(on_device)
    assert one.keys == other.keys
    (waveform_BN,), (samples_B,) = other.batch.features, other.batch.frames
    (frontend,), (x_BTF,) = model.frontends, one.batch.features
    assert frontend.num_frames(waveform_BN.shape[1]) == x_BTF.shape[1]
    for row_TF, frames, row_N, samples in zip(x_BTF, one.batch.frames[0], waveform_BN, samples_B):
      np.testing.assert_array_equal(row_TF[:frames], frontend.features(row_N[:samples]))
      assert not row_N[samples:].any()
    if iteration == 2:  # a position of one is a position of the other
      on_device.set_state(on_host.get_state())
  on_host.close()
  on_device.close()


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"buckets": (20, 10)}, r"data\.buckets=\(20, 10\): .*ascending"),
    ({"answer_buckets": ()}, r"data\.answer_buckets=\(\)"),
    ({"batch_size": 0}, r"data\.batch_size=0: must be at least 1"),
    (
      {"shuffle_buffer_size": 100, "batch_size": 64},
      r"data\.shuffle_buffer_size=100 .*set it to 64",
    ),
    ({"min_s": 3.0, "max_s": 2.0}, r"data\.min_s=3\.0 and data\.max_s=2\.0"),
    ({"max_bad_share": 1.5}, r"data\.max_bad_share=1\.5"),
    ({"workers": -1}, r"data\.workers=-1"),
    ({"prompt_tokens": -1}, r"data\.prompt_tokens=-1"),
    ({"task_weights": {"asr": 2.0}}, r"data\.task_weights=.*set data\.task=''"),
    ({"task": "", "task_weights": {"asr": -1.0}}, r"data\.task_weights\.asr=-1"),
  ],
)
def test_a_bad_config_is_refused_by_name(values, words):
  with pytest.raises(ValueError, match=words):
    DataConfig("data.list", **values)
