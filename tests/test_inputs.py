"""Padded encoder inputs."""

import pytest

from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.inputs import bucket_lengths


@pytest.mark.parametrize("first", [FrontendConfig(), LogMelConfig()])
@pytest.mark.parametrize("bucket", [2, 3, 50, 167])
def test_a_bucket_has_the_frames_of_its_longest_clip(first, bucket):
  second = LogMelConfig(hop_ms=5)
  samples = next(n for n in range(1, 10**6) if first.num_frames(n + 1) > bucket)
  assert bucket_lengths(bucket, [first, second]) == (bucket, second.num_frames(samples))


def test_no_bucket_leaves_an_encoder_without_frames():
  """The first sample of a clip makes two frames of Whisper."""
  assert bucket_lengths(1, [LogMelConfig(), LogMelConfig()]) == (1, 2)
