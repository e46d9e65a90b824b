"""Padded encoder inputs."""

import numpy as np
import pytest

from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.inputs import bucket_lengths, encoder_inputs, extract_features, padded_lengths
from tests import tiny


@pytest.mark.parametrize("first", [FrontendConfig(), LogMelConfig()])
@pytest.mark.parametrize("bucket", [2, 3, 50, 167])
def test_a_bucket_has_the_frames_of_its_longest_clip(first, bucket):
  second = LogMelConfig(hop_ms=5)
  samples = next(n for n in range(1, 10**6) if first.num_frames(n + 1) > bucket)
  assert bucket_lengths(bucket, [first, second]) == (bucket, second.num_frames(samples))


def test_no_bucket_leaves_an_encoder_without_frames():
  """The first sample of a clip makes two frames of Whisper."""
  assert bucket_lengths(1, [LogMelConfig(), LogMelConfig()]) == (1, 2)


@pytest.mark.parametrize("make", [tiny.model_config, tiny.salmonn_config])
def test_a_clip_is_in_the_same_bucket_wherever_its_features_are_computed(make):
  host, device = make(), make(features="device")
  buckets = (5, 20, 41)
  of_frames, of_samples = (padded_lengths(buckets, config) for config in (host, device))
  ends = [length for (length,) in of_samples]
  for samples in sorted({n + d for n in ends for d in (-400, -1, 0, 1)} | {401, 2000, 4000}):
    frames = tuple(frontend.num_frames(samples) for frontend in host.frontends)
    fits = [all(n <= m for n, m in zip(frames, bucket, strict=True)) for bucket in of_frames]
    assert fits == [samples <= end for end in ends], samples
  for bucket, lengths, samples in zip(buckets, of_frames, ends, strict=True):
    made = tuple(frontend.num_frames(samples) for frontend in host.frontends)
    assert made == lengths if bucket < 41 else made[0] >= 40


def test_all_encoders_share_one_waveform():
  config = tiny.salmonn_config(features="device").replace(min_audio_s=0.5)
  clips = [np.full(samples, 0.1, np.float32) for samples in (100, 9000)]
  (waveform_BN,), (samples_B,) = encoder_inputs([extract_features(c, config) for c in clips])
  assert waveform_BN.shape == (2, 9000) and samples_B.tolist() == [8000, 9000]
  for row, clip_N in zip(waveform_BN, clips, strict=True):
    np.testing.assert_array_equal(row[: len(clip_N)], clip_N)
    assert not row[len(clip_N) :].any()
  with pytest.raises(ValueError, match=r"clips of \(9000,\) samples do not fit"):
    encoder_inputs([extract_features(clips[1], config)], buckets=[(8999,)])


@pytest.mark.parametrize(
  "clip", [np.zeros(399, np.float32), np.zeros(0, np.float32), np.zeros(12801), np.zeros(9, int)]
)
def test_clips_are_refused_alike_wherever_their_features_are_computed(clip):
  said = []
  for features in ("host", "device"):
    with pytest.raises(ValueError) as error:
      extract_features(clip, tiny.salmonn_config(features=features), name="talk-7")
    said.append((type(error.value), str(error.value)))
  assert said[0] == said[1] and "talk-7" in said[0][1]
