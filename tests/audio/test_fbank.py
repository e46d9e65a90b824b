"""NumPy, JAX and Kaldi have the filter bank of one definition, and padding changes nothing."""

import dataclasses
import functools

import jax
import kaldi_native_fbank
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooer_jax.audio import fbank as fbank_module
from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.fbank import FbankConfig, constants, fbank, fbank_jax, num_fbank_frames
from tests.numerics import assert_within, exceeds_the_bound, log_energy_rounding, rounding

SILENCE = np.log(np.finfo(np.float32).eps)
ONE_LOGARITHM = rounding(1, -SILENCE)


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


def bound_of(run, waveform_N, config=FbankConfig()):
  """Bound on the rounding of `fbank`, `jax_alone` (or a row of a batch) or `kaldi`.

  NumPy's DFT is float64. JAX's rounded products are 2^8 times smaller than a frame's peak. Kaldi's
  are as large as the peak, and its sines are rounded too: it errs by 60 eps of the peak, whatever
  the processor, for it is one compiled program.
  """
  share = {fbank: 0, jax_alone: 2.0**-8, kaldi: 4}[run]
  plain_TF = direct(waveform_N, dataclasses.replace(config, preemphasis=0.0))
  return log_energy_rounding(
    direct(waveform_N, config),
    terms=config.fft_length,
    peak_T1=plain_TF.max(axis=1, keepdims=True),
    share=share,
  )


def check(run, result_TF, waveform_N, config=FbankConfig()):
  """The result is that of the definition; `run` says by which implementation it is."""
  assert_within(result_TF, direct(waveform_N, config), bound_of(run, waveform_N, config))


@pytest.mark.parametrize("run", [fbank, kaldi])
def test_numpy_and_kaldi_are_the_definition_on_real_speech(real_clips, run):
  assert len(real_clips) == 50
  for clip in real_clips:
    check(run, run(clip), clip)


def test_jax_is_the_definition_on_real_speech(real_clips):
  fbank_BTF, frames_B = map(np.asarray, batch_fbank(*pad(real_clips)))
  for row, frames, clip in zip(fbank_BTF, frames_B, real_clips):
    check(jax_alone, row[:frames], clip)


def test_where_kaldi_differs_more_it_is_by_its_own_rounding(shared_data):
  # 110 dB below the frame's peak, Kaldi's float32 transform itself errs by more than 2e-3, in about
  # one value of a million; this clip holds one. Both of ours stay with the definition.
  clip = load_audio(shared_data / "cmn-words" / "前天.mp3")
  assert np.abs(kaldi(clip) - direct(clip)).max() > 2e-3
  for run in (fbank, jax_alone):
    check(run, run(clip), clip)


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
  for run in (fbank, jax_alone, kaldi):
    check(run, run(clip, config), clip, config)


def next_mel_filter(config):
  window_L, mel_KF = constants(config)
  return window_L, np.roll(mel_KF, 1, axis=0)


def periodic_window(config):
  """Of one sample more, the last of which is left out."""
  length = config.frame_length
  window_L = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(length) / length)
  return window_L, constants(config)[1]


@pytest.mark.parametrize("fault", [next_mel_filter, periodic_window])
def test_other_constants_are_noticed(monkeypatch, fault):
  clip = speech_like(4000)
  monkeypatch.setattr(fbank_module, "constants", fault)
  faulty_TF = fbank(clip)
  monkeypatch.undo()
  with exceeds_the_bound():
    check(fbank, faulty_TF, clip)


@pytest.mark.parametrize("run", [fbank, jax_alone])
@pytest.mark.parametrize("fault", ["gain 1.001", "one sample late", "pre-emphasis 0.971"])
def test_a_fault_exceeds_the_bound(run, fault):
  clip = speech_like(4000)
  result_TF = {
    "gain 1.001": lambda: run(clip * np.float32(1.001)),
    "one sample late": lambda: run(np.roll(clip, 1)),
    "pre-emphasis 0.971": lambda: run(clip, FbankConfig(preemphasis=0.971)),
  }[fault]()
  with exceeds_the_bound():
    check(run, result_TF, clip)


def test_bins_too_narrow_for_any_frequency_are_the_floor():
  # BEATs asks for 128: the lowest lie between two frequencies of the transform. kaldi-native-fbank
  # refuses such a bank; torchaudio, with which BEATs was trained, gives the floor.
  config = FbankConfig(bins=128, window="povey")
  empty_F = constants(config)[1].sum(axis=0) == 0
  assert 0 < empty_F.sum() < 20
  for run in (fbank, jax_alone):
    result_TF = run(speech_like(4000), config)
    assert_within(result_TF[:, empty_F], SILENCE, ONE_LOGARITHM)
    assert (result_TF[:, ~empty_F] > SILENCE + 1).all()


@pytest.mark.parametrize("level", [0, 3, -7777, 30000])
def test_digital_silence_and_any_16_bit_constant_are_the_floor(level):
  clip = np.full(2000, level / 32768, np.float32)
  assert_within(kaldi(clip), SILENCE, ONE_LOGARITHM)
  for ours in (fbank(clip), jax_alone(clip)):
    assert_within(ours, SILENCE, ONE_LOGARITHM)


def test_one_impulse_in_silence_is_kaldi():
  clip = np.zeros(2000, np.float32)
  clip[1000] = 0.5
  for run in (fbank, jax_alone, kaldi):
    check(run, run(clip), clip)


@pytest.mark.parametrize("peak", [1e-12, 1e-25, 1e-36, 1e-38, 1e-42])
def test_a_fade_out_down_to_denormals_is_the_floor(peak):
  clip = (np.random.default_rng(0).normal(size=2000) * peak).astype(np.float32)
  for ours in (fbank(clip), jax_alone(clip)):
    assert_within(ours, SILENCE, ONE_LOGARITHM)


@pytest.mark.parametrize("gain", [1.0, 1e-2, 1e-4])
def test_loudness_is_a_constant_in_the_log(gain):
  clip = np.random.default_rng(0).normal(size=4000).astype(np.float32) * 0.1
  quiet = clip * np.float32(gain)
  # White noise at 1e-4 still lies far above the floor; what is left is the rounding of `quiet`, as
  # if the DFT were one in float32.
  for run in (fbank, jax_alone):
    assert_within(run(quiet), direct(clip) + 2 * np.log(gain), bound_of(kaldi, clip))


def test_long_clips_are_worked_in_blocks_that_leave_no_seam():
  clip = speech_like(16000 * 12)
  whole = fbank(clip)
  for start in (0, 505, 1000):
    part = clip[start * 160 : (start + 20) * 160 + 240]
    assert_within(fbank(part), whole[start : start + 20], bound_of(fbank, part))


def test_padding_changes_no_valid_value():
  clips = [speech_like(n, seed=n) for n in (400, 5999)]
  waveform_BN, samples_B = pad(clips, fill=np.nan)
  fbank_BTF, frames_B = map(np.asarray, batch_fbank(waveform_BN, samples_B))
  for row, frames, clip in zip(fbank_BTF, frames_B, clips):
    check(jax_alone, row[:frames], clip)
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
  assert_within(window_L, window_L[::-1], rounding(1, 2 * np.pi, np.float64))
  assert mel_KF.shape == (256, 80) and mel_KF.min() == 0 and mel_KF.max() <= 1
  # Between the centres of the first and the last bin, two triangles add up to 1.
  first, last = mel_KF[:, 0].argmax() + 1, mel_KF[:, -1].argmax()
  # Distances of 35 mel between edges of up to 2840 mel.
  assert_within(mel_KF[first:last].sum(axis=1), 1, rounding(2, 2840 / 35, np.float64))


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
