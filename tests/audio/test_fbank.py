"""NumPy and JAX filter banks equal Kaldi's on real speech, and each other, and ignore padding."""

import functools

import jax
import kaldi_native_fbank
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.fbank import FbankConfig, constants, fbank, fbank_jax, num_fbank_frames

# The project's bounds for log energies against Kaldi.
MAX, MEAN = 2e-3, 2e-5
# Further than 90 dB below their frame's peak (16-bit sound spans 96 dB), some values of Kaldi's
# float32 are off by more than MAX: 3 of 6.8 million in 1000 real clips. A test holds one.
DEPTH = 90 / 10 * np.log(10)
SILENCE = np.log(np.finfo(np.float32).eps)


def kaldi(waveform_N, config=FbankConfig()):
  options = kaldi_native_fbank.FbankOptions()
  frame, mel = options.frame_opts, options.mel_opts
  frame.samp_freq, frame.window_type, frame.dither = config.sample_rate_hz, config.window, 0
  frame.frame_length_ms, frame.frame_shift_ms = config.frame_ms, config.hop_ms
  frame.preemph_coeff, frame.snip_edges = config.preemphasis, True
  mel.num_bins, mel.low_freq, mel.high_freq = config.bins, config.low_hz, config.high_hz
  options.energy_floor = 0
  stream = kaldi_native_fbank.OnlineFbank(options)
  stream.accept_waveform(config.sample_rate_hz, (waveform_N * np.float32(32768)).tolist())
  stream.input_finished()
  rows = [stream.get_frame(i) for i in range(stream.num_frames_ready)]
  return np.array(rows, np.float32).reshape(-1, config.bins)


def direct(waveform_N, config=FbankConfig()):
  """The definition in float64, frame by frame; shares the constants alone."""
  window_L, mel_KF = constants(config)
  rows = []
  for start in range(0, len(waveform_N) - config.frame_length + 1, config.hop_length):
    x = waveform_N[start : start + config.frame_length].astype(np.float64) * 32768
    x = x - x.mean()
    x = (x - config.preemphasis * np.concatenate([x[:1], x[:-1]])) * window_L
    power_K = np.abs(np.fft.rfft(x, config.fft_length)[:-1]) ** 2
    rows.append(np.log(np.maximum(power_K @ mel_KF, np.finfo(np.float32).eps)))
  return np.array(rows)


@functools.partial(jax.jit, static_argnames="config")
def batch_fbank(waveform_BN, samples_B, config=FbankConfig()):
  return fbank_jax(waveform_BN, samples_B, config)


def jax_alone(waveform_N, config=FbankConfig()):
  fbank_BTF, frames_B = batch_fbank(waveform_N[None], np.array([len(waveform_N)]), config)
  assert frames_B[0] == fbank_BTF.shape[1]
  return np.asarray(fbank_BTF[0])


def speech_like(samples, seed=0):
  """Noise with a falling spectrum, loud and soft in turns, in 16 bits as recordings are."""
  rng = np.random.default_rng(seed)
  noise = np.cumsum(rng.normal(size=samples)) * 0.01
  noise -= np.convolve(noise, np.ones(200) / 200, "same")
  loudness = 10 ** (1.5 * np.sin(np.arange(samples) / 3000) - 1.5)
  return (np.round(noise * loudness * 32768) / 32768).astype(np.float32)


@pytest.fixture(scope="module")
def real_clips(shared_data):
  names = sorted((shared_data / "fsdd").iterdir())[::80]
  names += sorted((shared_data / "cmn-words").iterdir())[5::60]
  return [load_audio(name) for name in names]


def pad(clips, fill=0.0):
  samples_B = np.array([len(clip) for clip in clips])
  waveform_BN = np.full((len(clips), samples_B.max()), fill, np.float32)
  for row, clip in zip(waveform_BN, clips):
    row[: len(clip)] = clip
  return waveform_BN, samples_B


def check(ours, theirs):
  """Bounds on lists of [T, F]; the greatest difference counts only where Kaldi itself keeps it."""
  difference = np.concatenate([np.abs(a - b).ravel() for a, b in zip(ours, theirs)])
  depth = np.concatenate([(b.max(axis=1, keepdims=True) - b).ravel() for b in theirs])
  assert (depth > DEPTH).mean() < 1e-4
  assert difference[depth <= DEPTH].max() <= MAX
  assert difference.mean() <= MEAN


def test_numpy_is_kaldi_on_real_speech(real_clips):
  assert len(real_clips) == 50
  check([fbank(clip) for clip in real_clips], [kaldi(clip) for clip in real_clips])


def test_jax_is_kaldi_and_numpy_on_real_speech(real_clips):
  fbank_BTF, frames_B = map(np.asarray, batch_fbank(*pad(real_clips)))
  rows = [row[:frames] for row, frames in zip(fbank_BTF, frames_B)]
  check(rows, [kaldi(clip) for clip in real_clips])
  for row, clip in zip(rows, real_clips):
    difference = np.abs(row - fbank(clip))  # here everywhere
    assert difference.max() <= MAX and difference.mean() <= MEAN


def test_where_kaldi_differs_more_it_is_by_its_own_rounding(shared_data):
  # 110 dB below the frame's peak, Kaldi's float32 transform itself errs by more than the bound, in
  # about one value of a million; this clip holds one. Both of ours stay with the definition.
  clip = load_audio(shared_data / "cmn-words" / "前天.mp3")
  exact = direct(clip)
  assert np.abs(kaldi(clip) - exact).max() > MAX
  assert np.abs(fbank(clip) - exact).max() < 2e-5
  assert np.abs(jax_alone(clip) - exact).max() < 5e-4


@pytest.mark.parametrize(
  "config",
  [
    FbankConfig(),
    FbankConfig(bins=64, window="povey"),
    FbankConfig(window="hanning", preemphasis=0.0, low_hz=100, high_hz=6000),
    FbankConfig(sample_rate_hz=8000, bins=40, high_hz=3800),
    FbankConfig(sample_rate_hz=22050),
    FbankConfig(frame_ms=10, hop_ms=20, bins=20),
  ],
  ids=["mooer", "povey", "hanning", "8kHz", "odd-frame", "gaps"],
)
def test_any_setting_is_kaldi_and_the_definition(config):
  clip = speech_like(9000)
  check([fbank(clip, config), jax_alone(clip, config)], [kaldi(clip, config)] * 2)
  # The result is float32 of size 20: 2e-6 is its last bit.
  np.testing.assert_allclose(fbank(clip, config), direct(clip, config), atol=5e-6)


def test_bins_too_narrow_for_any_frequency_are_the_floor():
  # BEATs asks for 128: the lowest lie between two frequencies of the transform. kaldi-native-fbank
  # refuses such a bank; torchaudio, with which BEATs was trained, gives the floor.
  config = FbankConfig(bins=128, window="povey")
  empty_F = constants(config).mel_KF.sum(axis=0) == 0
  assert 0 < empty_F.sum() < 20
  for run in (fbank, jax_alone):
    result_TF = run(speech_like(4000), config)
    np.testing.assert_allclose(result_TF[:, empty_F], SILENCE, rtol=1e-6)
    assert (result_TF[:, ~empty_F] > SILENCE + 1).all()


@pytest.mark.parametrize("level", [0, 3, -7777, 30000])
def test_digital_silence_and_any_16_bit_constant_are_the_floor(level):
  clip = np.full(2000, level / 32768, np.float32)
  np.testing.assert_array_equal(kaldi(clip), np.float32(SILENCE))
  for ours in (fbank(clip), jax_alone(clip)):
    np.testing.assert_allclose(ours, SILENCE, rtol=1e-6)  # the logarithm's last bit


def test_one_impulse_in_silence_is_kaldi():
  clip = np.zeros(2000, np.float32)
  clip[1000] = 0.5
  for ours in (fbank(clip), jax_alone(clip)):
    difference = np.abs(ours - kaldi(clip))
    assert difference.max() <= MAX and difference.mean() <= MEAN


@pytest.mark.parametrize("peak", [1e-12, 1e-25, 1e-36, 1e-38, 1e-42])
def test_a_fade_out_down_to_denormals_is_the_floor(peak):
  clip = (np.random.default_rng(0).normal(size=2000) * peak).astype(np.float32)
  for ours in (fbank(clip), jax_alone(clip)):
    np.testing.assert_allclose(ours, SILENCE, rtol=1e-6)  # the logarithm's last bit


@pytest.mark.parametrize("gain", [1.0, 1e-2, 1e-4])
def test_loudness_is_a_constant_in_the_log(gain):
  clip = np.random.default_rng(0).normal(size=4000).astype(np.float32) * 0.1
  quiet = clip * np.float32(gain)
  # White noise at 1e-4 still lies far above the floor; what is left is the rounding of `quiet`.
  for run in (fbank, jax_alone):
    np.testing.assert_allclose(run(quiet), run(clip) + 2 * np.log(gain), atol=1e-4)


def test_long_clips_are_worked_in_blocks_that_leave_no_seam():
  clip = speech_like(16000 * 12)
  whole = fbank(clip)
  for start in (0, 505, 1000):
    part = fbank(clip[start * 160 : (start + 20) * 160 + 240])
    np.testing.assert_allclose(part, whole[start : start + 20], atol=5e-6)  # last bits


def test_padding_changes_no_valid_value():
  clips = [speech_like(n, seed=n) for n in (400, 5999)]
  waveform_BN, samples_B = pad(clips, fill=np.nan)
  fbank_BTF, frames_B = map(np.asarray, batch_fbank(waveform_BN, samples_B))
  for row, frames, clip in zip(fbank_BTF, frames_B, clips):
    # Another batch shape may add up in another order: rounding only.
    np.testing.assert_allclose(row[:frames], jax_alone(clip), atol=1e-4)
    assert not row[frames:].any()


def test_padding_of_nan_leaves_the_gradient_finite():
  waveform_BN, samples_B = pad([speech_like(1000), speech_like(3000)], fill=np.nan)
  gradient = jax.jit(jax.grad(lambda x: fbank_jax(x, samples_B)[0].sum()))(waveform_BN)
  # A frame that straddles the end is masked whole, so behind the last valid frame all is 0.
  assert np.isfinite(gradient).all()
  assert np.abs(gradient[0, :880]).max() > 0


@given(st.integers(0, 3000), st.sampled_from([(25, 10), (10, 20), (25, 25)]))
def test_number_of_frames(samples, frame_and_hop):
  config = FbankConfig(frame_ms=frame_and_hop[0], hop_ms=frame_and_hop[1], bins=20)
  clip = np.zeros(samples, np.float32)
  frames = len(fbank(clip, config))
  assert frames == num_fbank_frames(samples, config) == len(kaldi(clip, config))
  batch = jax.ShapeDtypeStruct((1, samples), np.float32)
  counts = jax.ShapeDtypeStruct((1,), np.int32)
  fbank_BTF, frames_B = jax.eval_shape(lambda x, n: fbank_jax(x, n, config), batch, counts)
  assert fbank_BTF.shape == (1, frames, 20) and frames_B.shape == (1,)


def test_rows_shorter_than_a_frame_have_no_frames():
  fbank_BTF, frames_B = batch_fbank(np.ones((3, 800), np.float32), np.array([0, 399, 400]))
  np.testing.assert_array_equal(frames_B, [0, 0, 1])
  assert not np.asarray(fbank_BTF)[:2].any()


def test_constants_are_float64_and_triangles_cover_the_band():
  window_L, mel_KF = constants(FbankConfig())
  assert window_L.dtype == mel_KF.dtype == np.float64
  np.testing.assert_allclose(window_L, window_L[::-1], atol=1e-15)
  assert mel_KF.shape == (256, 80) and mel_KF.min() == 0 and mel_KF.max() <= 1
  # Between the centres of the first and the last bin, two triangles add up to 1.
  first, last = mel_KF[:, 0].argmax() + 1, mel_KF[:, -1].argmax()
  np.testing.assert_allclose(mel_KF[first:last].sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize(
  ("options", "word"),
  [
    ({"window": "kaiser"}, "kaiser"),
    ({"bins": 0}, "bins"),
    ({"low_hz": 9000}, "low_hz"),
    ({"high_hz": 9000}, "high_hz"),
    ({"hop_ms": 0}, "hop_ms"),
    ({"preemphasis": 2.0}, "preemphasis"),
  ],
)
def test_impossible_settings_are_named(options, word):
  with pytest.raises(ValueError, match=word):
    FbankConfig(**options)


@pytest.mark.parametrize("waveform", [np.zeros((2, 800)), np.zeros(800, np.int16)])
def test_stereo_and_integers_are_refused(waveform):
  with pytest.raises(ValueError, match="mono floats"):
    fbank(waveform)
