"""The benchmark of the data pipeline: both sides do the same work, and padding is counted."""

import numpy as np
import pytest

from benchmarks import data, data_input
from mooer_jax.audio.decode import load_audio
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.inputs import extract_features


@pytest.mark.parametrize("name", data.CASES)
def test_both_sides_deliver_the_same_audio_and_frames(tmp_path, monkeypatch, name):
  monkeypatch.setattr(data_input, "lengths_s", lambda count: np.linspace(0.5, 2, count))
  suffix, rate_hz, _ = data.CASES[name]
  shards = data_input.write_shards(
    tmp_path, suffix=suffix, rate_hz=rate_hz, count=5, per_shard=3
  )  # fmt: skip
  ours, theirs = data.run_ours(shards), data.run_theirs(shards)
  assert (ours.clips, ours.frames) == (theirs.clips, theirs.frames) and ours.clips == 5
  assert ours.audio_s == pytest.approx(theirs.audio_s) == pytest.approx(5 * 1.25, abs=0.01)


def test_both_sides_compute_the_same_features():
  clip = data_input.encode(data_input.speech_like(1.0, rate_hz=16000, seed=0), "wav", 16000)
  samples_N = load_audio(clip)
  [ours_TF] = extract_features(samples_N, SpeechLLMConfig())
  theirs_TF = data.torch_features(samples_N).numpy()
  assert ours_TF.shape == theirs_TF.shape
  # Energies of two float32 FFTs of 512 points, relative to the largest of all.
  ours_TF, theirs_TF = np.exp(ours_TF), np.exp(theirs_TF)
  assert np.abs(ours_TF - theirs_TF).max() < 512 * np.finfo(np.float32).eps * theirs_TF.max()


def test_lengths_are_within_the_limits_of_emilia():
  lengths = data_input.lengths_s(5000)
  assert len(lengths) == 5000 and lengths.min() >= 3 and lengths.max() <= 30


def test_more_buckets_pad_less():
  few, many = data.padding((2, 12), utterances=512).values()
  assert 0 < many < few < 1
