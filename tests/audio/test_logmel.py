"""Log-mel features: those of transformers, NumPy equals JAX, and lengths known before the work."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from mooer_jax.audio import logmel
from mooer_jax.audio.decode import AudioError, load_audio
from mooer_jax.audio.logmel import LogMelConfig, constants
from tests.numerics import (
  assert_as_accurate,
  assert_within,
  exceeds_the_bound,
  log_energy_rounding,
  rounding,
)

LONGEST = 4000
DEFAULT = LogMelConfig()


def features(waveform_N, config=DEFAULT, **options):
  return config.features(waveform_N, **options)


@functools.partial(jax.jit, static_argnames="config")
def batch_features(waveform_BN, samples_B, config=LogMelConfig()):
  return config.features_jax(waveform_BN, samples_B)


def jax_alone(waveform_N, config=LogMelConfig()):
  features_BTF, frames_B = batch_features(waveform_N[None], np.array([len(waveform_N)]), config)
  assert frames_B[0] == features_BTF.shape[1]
  return np.asarray(features_BTF[0])


def noise(samples, seed=0):
  return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def filled(features_TF, frames=3000):
  """The features of the clip padded with silence, from those of the clip alone."""
  silence = max(-1.5, features_TF.max() - 2)
  out = np.full((frames, features_TF.shape[1]), silence, np.float32)
  out[: len(features_TF)] = features_TF
  return out


CLIPS = {
  "noise": noise(20000),
  "one sample": np.ones(1, np.float32),
  "two samples": np.array([0.3, -0.3], np.float32),
  "200 samples": noise(200),
  "201 samples": noise(201),
  "silence": np.zeros(5000, np.float32),
  "silence, then a click": np.eye(1, 9000, 8999, dtype=np.float32)[0],
  "below the floor": noise(8000) * np.float32(1e-6),
  "a tone": np.sin(np.arange(32000) * (2 * np.pi / 16)).astype(np.float32),
  "an offset": 0.5 + noise(32000) * np.float32(0.01),
  "30 s": noise(480000),
  "one less than 30 s": noise(479999),
  "29.99 s": noise(479840),
}


def transformers_float64(waveform_N, extractor):
  """Features [T, F] as transformers' NumPy code makes them; its torch code is float32."""
  padded_N = np.pad(waveform_N, (0, extractor.n_samples - len(waveform_N)))
  return extractor._np_extract_fbank_features([padded_N], "cpu")[0].T


def mean_free_peaks(waveform_N, config):
  """Largest log energy [T, 1] of each frame without its mean, whose DFT is rounded in float32.

  At the end of a clip, it may exceed that of the frame: sound lies at the edge of the window, where
  the window is almost 0, and the mean that is subtracted lies at its centre.
  """
  padded_N = np.pad(np.float64(waveform_N), (0, config.chunk_samples - len(waveform_N)))
  padded_N = np.pad(padded_N, config.frame_length // 2, mode="reflect")
  framed_TL = np.lib.stride_tricks.sliding_window_view(padded_N, config.frame_length)
  framed_TL = framed_TL[:: config.hop_length][: config.num_frames(len(waveform_N))]
  window_L, mel_KF = constants(config)
  spectrum_TK = np.fft.rfft((framed_TL - framed_TL.mean(1, keepdims=True)) * window_L)
  power_T1 = np.square(np.abs(spectrum_TK)).max(1, keepdims=True) * mel_KF.sum(0).max()
  return (np.log10(np.maximum(power_T1, logmel.FLOOR)) + 4) / 4


def bound_of(run, exact_TF, waveform_N, config=DEFAULT):
  """Bound on the rounding of `features` (a DFT in float64) or `jax_alone` (in float32)."""
  # Frames behind the clip are those of silence.
  peak_T1 = np.full((len(exact_TF), 1), exact_TF.max())
  found_T1 = mean_free_peaks(waveform_N, config)
  peak_T1[: len(found_T1)] = found_T1[: len(peak_T1)]
  share = {features: 0, jax_alone: 1}[run]
  # log10(energy) / 4
  return log_energy_rounding(
    exact_TF, terms=400, peak_T1=peak_T1, per_neper=0.25 / np.log(10), share=share
  )


def check(run, waveform_N, extractor, config=LogMelConfig(), *, before=None, after=None):
  """Raises unless our features, and silence behind them, are those of transformers in float64.

  `before` and `after` put a fault into the waveform and into the features.
  """
  exact_TF = transformers_float64(waveform_N, extractor)
  ours_TF = run(before(waveform_N) if before else waveform_N, config)
  ours_TF = after(ours_TF) if after else ours_TF
  assert ours_TF.shape == (config.num_frames(len(waveform_N)), config.width)
  assert ours_TF.dtype == np.float32
  bound = bound_of(run, exact_TF, waveform_N, config)
  assert_within(filled(ours_TF, len(exact_TF)), exact_TF, bound)
  # All that was left out is one value: not a frame of sound is missing.
  assert len(np.unique(exact_TF[len(ours_TF) :])) <= 1


RUNS = pytest.mark.parametrize("run", [features, jax_alone])


@RUNS
@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("name", sorted(CLIPS))
def test_they_are_those_of_transformers(name, bins, run):
  check(run, CLIPS[name], WhisperFeatureExtractor(feature_size=bins), LogMelConfig(bins=bins))


@pytest.mark.parametrize("name", ["noise", "a tone", "an offset"])
def test_ours_are_nearer_to_float64_than_those_of_transformers_in_float32(name):
  extractor = WhisperFeatureExtractor()
  theirs_TF = extractor(CLIPS[name], sampling_rate=16000, return_tensors="np").input_features[0].T
  exact_TF = transformers_float64(CLIPS[name], extractor)
  for run in (features, jax_alone):
    floor = bound_of(run, exact_TF, CLIPS[name])
    assert_as_accurate(filled(run(CLIPS[name])), theirs_TF, exact_TF, floor=floor)


def test_they_are_those_of_transformers_on_real_speech(shared_data):
  names = sorted((shared_data / "fsdd").iterdir())[::700]
  names += sorted((shared_data / "cmn-words").iterdir())[5::700]
  for name in names:
    for run in (features, jax_alone):
      check(run, load_audio(name), WhisperFeatureExtractor())


@RUNS
@pytest.mark.parametrize(
  "fault",
  [
    {"before": lambda x_N: x_N * np.float32(1.001)},
    {"before": lambda x_N: np.roll(x_N, 1)},
    {"after": lambda x_TF: np.roll(x_TF, 1, axis=0)},
    {"after": lambda x_TF: np.roll(x_TF, 1, axis=1)},
  ],
  ids=["gain 1.001", "one sample late", "one frame late", "next mel filter"],
)
def test_a_fault_exceeds_the_bound(run, fault):
  with exceeds_the_bound():
    check(run, CLIPS["noise"], WhisperFeatureExtractor(), **fault)


def test_a_symmetric_window_is_noticed(monkeypatch):
  mel_KF = constants(LogMelConfig())[1]
  monkeypatch.setattr(logmel, "constants", lambda config: (np.hanning(400), mel_KF))
  with exceeds_the_bound():
    check(features, CLIPS["noise"], WhisperFeatureExtractor())


@pytest.mark.parametrize("bins", [80, 128])
def test_the_mel_filters_are_those_of_transformers(bins):
  window_L, mel_KF = constants(LogMelConfig(bins=bins))
  assert len(window_L) == 400
  # Weights of size 0.03 from differences of frequencies up to 8000 Hz, 31 Hz apart.
  exact_KF = WhisperFeatureExtractor(feature_size=bins).mel_filters
  assert_within(mel_KF, exact_KF, rounding(4, exact_KF.max() * 8000 / 31, np.float64))


@RUNS
@pytest.mark.parametrize("samples", [16000, 15999, 15900, 3000])
def test_a_shorter_chunk_is_a_shorter_chunk_of_transformers(run, samples):
  extractor = WhisperFeatureExtractor(chunk_length=1)
  check(run, noise(samples), extractor, LogMelConfig(chunk_s=1))


# Beside random lengths, those around the edge of a frame (160 k - 200) and of the mirror.
lengths = st.one_of(
  st.integers(0, LONGEST),
  st.builds(lambda k, d: 160 * k - 200 + d, st.integers(2, 26), st.sampled_from([-1, 0, 1])),
  st.integers(198, 202),
)


@settings(max_examples=25)
@example([0, 0, 0, 2047], 145)  # the last frame has a few samples at its edge
@given(st.lists(lengths, min_size=4, max_size=4), st.integers(0, 1000))
def test_numpy_equals_jax_row_by_row(counts, seed):
  waveform_BN = np.full((4, LONGEST), np.nan, np.float32)
  for number, (row, count) in enumerate(zip(waveform_BN, counts)):
    row[:count] = noise(count, seed + number)
  features_BTF, frames_B = map(np.asarray, batch_features(waveform_BN, np.array(counts)))
  assert features_BTF.shape == (4, DEFAULT.num_frames(LONGEST), 80)
  for row, frames, waveform_N, count in zip(features_BTF, frames_B, waveform_BN, counts):
    assert frames == DEFAULT.num_frames(count)
    if frames:
      exact_TF = features(waveform_N[:count])
      assert_within(row[:frames], exact_TF, bound_of(jax_alone, exact_TF, waveform_N[:count]))
    assert not row[frames:].any()


def test_the_padding_passes_no_gradient():
  waveform_BN = np.full((1, 3000), np.nan, np.float32)
  waveform_BN[:, :2000] = noise(2000)
  gradient = jax.jit(jax.grad(lambda x_BN: DEFAULT.features_jax(x_BN, np.array([2000]))[0].sum()))(
    waveform_BN
  )
  assert np.isfinite(gradient).all() and not np.asarray(gradient)[:, 2000:].any()


@given(st.integers(1, 500_000))
def test_lengths_are_known_before_the_work(samples):
  config = LogMelConfig()
  frames = DEFAULT.num_frames(samples)
  assert frames >= DEFAULT.num_frames(samples - 1)
  if samples <= 480000:
    shortest = max((frames - 1) * 160 - 199, 1)  # whose last sample the last frame just touches
    assert shortest <= samples and DEFAULT.num_frames(shortest) == frames
    assert DEFAULT.num_frames(shortest - 1) < frames
  # A search for the longest clip of so many frames ends at the chunk's end.
  assert (frames > config.chunk_frames) == (samples > config.chunk_samples)


def test_a_clip_that_is_too_long_is_refused_by_name():
  with pytest.raises(ValueError, match=r"talk-7: 30\.00 s, .* at most 30 s .* chunks"):
    features(noise(480001), name="talk-7")
  config = LogMelConfig(chunk_s=0.2)
  waveform_BN = np.stack([noise(3300), noise(3300)])
  features_BTF, frames_B = batch_features(waveform_BN, np.array([3300, 3200]), config)
  np.testing.assert_array_equal(frames_B, [0, 20])
  assert features_BTF.shape == (2, 20, 80) and not np.asarray(features_BTF[0]).any()
  exact_TF = config.features(noise(3300)[:3200])
  bound = bound_of(jax_alone, exact_TF, noise(3300)[:3200], config)
  assert_within(features_BTF[1], exact_TF, bound)


def test_an_empty_clip_is_refused_by_name():
  with pytest.raises(AudioError, match="talk-7: no samples") as caught:
    features(np.zeros(0, np.float32), name="talk-7")
  assert caught.value.cause == "empty audio"
  features_BTF, frames_B = batch_features(np.zeros((2, 0), np.float32), np.zeros(2, int))
  assert features_BTF.shape == (2, 0, 80) and not np.asarray(frames_B).any()


@pytest.mark.parametrize("waveform", [np.zeros((2, 9), np.float32), np.zeros(9, np.int16)])
def test_what_is_no_waveform_is_refused(waveform):
  with pytest.raises(ValueError, match="talk-7 is .* takes mono floats"):
    features(waveform, name="talk-7")


@pytest.mark.parametrize(
  "values, message",
  [
    ({"bins": 0}, "logmel bins is 0"),
    ({"frame_ms": 0.1}, "frame_ms=0.1"),
    ({"frame_ms": 25.1}, "frame_ms=25.1 is 401 samples at 16000 Hz; the number must be even"),
    ({"hop_ms": 0}, "hop_ms=0"),
    ({"chunk_s": 0.01}, "chunk_s=0.01 is 160 samples"),
  ],
)
def test_impossible_settings_are_refused_by_name(values, message):
  with pytest.raises(ValueError, match=message):
    LogMelConfig(**values)
