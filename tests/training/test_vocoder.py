"""The loss of a vocoder: both sides in one gradient, segments in their place, mel spectrogram."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mooer_jax import speech_llm, tree
from mooer_jax.audio.speaker_mel import BINS
from mooer_jax.sharding import batch_sharding, make_mesh
from mooer_jax.training import step as state_lib
from mooer_jax.training import vocoder
from mooer_jax.training.optimizer import OptimizerConfig, make_optimizer
from mooer_jax.training.program import abstract_state, init_params, jitted_step
from mooer_jax.training.vocoder import VocoderTrainingConfig, log_mel
from mooer_jax.vocoders import SpeechTarget
from mooer_jax.vocoders.discriminators import DiscriminatorConfig
from tests import tiny
from tests.numerics import assert_within, exceeds_the_bound, rounding

MODEL = tiny.model_config().replace(speech_output=tiny.SPEECH)
CONFIG = VocoderTrainingConfig(
  mel_window=64,
  mel_hop=16,
  mel_bins=10,
  discriminators=DiscriminatorConfig(width=1, periods=(2, 3), scales=0),
)
PER_FRAME = tiny.SPEECH.vocoder.samples_per_frame
FRAMES, FIRST = 12, 3
STEPS = 20
TRAINED = ("vocoder/.*", "speaker/.*", "discriminators/.*")


@pytest.fixture(scope="module")
def params():
  """Random ones, with weights and statistics that are those of norms."""
  shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), MODEL, CONFIG))
  flat = tree.flatten(tiny.random_params(shapes))
  for path, x in flat.items():
    if path.endswith(("/g", "/var")):
      flat[path] = 1 + x
  return tree.unflatten(flat)


def make_batch(rows=2, *, short=FRAMES):
  """Answers with a clip each: a tone whose pitch follows the tokens; the last row is `short`."""
  rng = np.random.default_rng(0)
  batch = tiny.batch([tiny.row(n, frames=9, answer=FRAMES + 4, config=MODEL) for n in range(rows)])
  hz_BS = rng.uniform(300, 2000, (rows, FRAMES)).repeat(PER_FRAME, axis=1)
  waveform_BN = 0.3 * np.sin(2 * np.pi * np.cumsum(hz_BS, axis=1) / 16000).astype(np.float32)
  waveform_BN[-1, short * PER_FRAME :] = 0
  frames_B = np.full(rows, FRAMES, np.int32)
  frames_B[-1] = short
  target = SpeechTarget(
    waveform_BN=waveform_BN,
    first_B=np.full(rows, FIRST, np.int32),
    frames_B=frames_B,
    voice_BTF=rng.normal(size=(rows, 20, BINS)).astype(np.float32),
  )
  return dataclasses.replace(batch, target=target)


def test_one_gradient_is_that_of_both_sides(params):
  """Of the summed loss, each side has the gradient of its own loss, the other side constant."""
  batch = make_batch(rows=1)
  target = batch.target
  trained, frozen = tree.partition(params, TRAINED)

  def together(trained):
    return vocoder.loss(tree.merge(trained, frozen), batch, MODEL, CONFIG)[1]["loss_sum"]

  def speak(generator):
    hidden_BAD = speech_llm.answer_hidden(params, batch, MODEL)
    speaker_BE = speech_llm.speaker_vector(generator, target.voice_BTF, MODEL)
    states_BSD = hidden_BAD[:, FIRST : FIRST + FRAMES]
    return speech_llm.speak(generator, states_BSD, target.frames_B, speaker_BE, MODEL)

  def of_generator(generator):
    fake_BN = speak(generator)
    judged = params["discriminators"], target.waveform_BN, fake_BN, CONFIG
    adversarial_B, features_B = vocoder.adversarial_losses(*judged)
    mels = [log_mel(x, CONFIG, sample_rate_hz=16000) for x in (target.waveform_BN, fake_BN)]
    mel_B = jnp.abs(mels[0] - mels[1]).mean((1, 2))
    return (45 * mel_B + 2 * features_B + adversarial_B).sum()

  def of_discriminators(discriminators, fake_BN):
    return vocoder.discriminator_loss(discriminators, target.waveform_BN, fake_BN, CONFIG)[0].sum()

  @jax.jit
  def gradients(trained):
    generator = {name: trained[name] for name in ("vocoder", "speaker")}
    judges = jax.grad(of_discriminators)(trained["discriminators"], speak(generator))
    apart = {**jax.grad(of_generator)(generator), "discriminators": judges}
    return jax.grad(together)(trained), apart

  ours, apart = jax.device_get(gradients(trained))
  # Sums over the samples of a segment, through some thirty layers. Some of a part are exactly 0.
  largest = {name: max(np.abs(x).max() for x in jax.tree.leaves(of)) for name, of in apart.items()}
  assert min(largest.values()) > 1e-3
  for name, of in apart.items():
    assert_within(ours[name], of, rounding(30 * FRAMES * PER_FRAME, largest[name]))
  statistics = [x for path, x in tree.flatten(ours).items() if path.endswith(("/mean", "/var"))]
  assert statistics and not any(x.any() for x in statistics)
  bound = rounding(30 * FRAMES * PER_FRAME, largest["speaker"])
  with exceeds_the_bound():
    assert_within(jax.tree.map(lambda x: 1.01 * x, ours["speaker"]), apart["speaker"], bound)


OPTIMIZER = OptimizerConfig(
  peak_lr=2e-3, betas=(0.8, 0.99), warmup_steps=0, decay="exponential", end_lr=1e-3, total_steps=100
)


def run_steps(params, steps, *, devices):
  """The metrics of steps on one batch of a row for each of two devices."""
  mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
  options = dict(trainable=TRAINED, mesh=mesh, vocoder=CONFIG)
  model = MODEL.with_compute(scan=True)
  step = jitted_step(model, OPTIMIZER, accumulation=1, **options)
  _, shardings = abstract_state(model, OPTIMIZER, **options)
  trained, frozen = tree.partition(tree.stack_layers(params), TRAINED)
  state = state_lib.create(trained, make_optimizer(OPTIMIZER), jax.random.key(0))
  state, frozen = jax.device_put((state, frozen), shardings)
  batch, seen = jax.device_put(make_batch(), batch_sharding(mesh)), []
  for _ in range(steps):
    state, metrics = step(state, frozen, batch)
    seen.append(jax.device_get(metrics))
  return seen


def test_the_loss_falls(params):
  """With the train step and the optimizer of every run."""
  seen = run_steps(params, STEPS, devices=1)
  names = ("adversarial_loss", "discriminator_loss", "feature_loss", "mel_loss")
  for metrics in seen:
    adversarial, judged, features, mel = (float(metrics[name]) for name in names)
    expected = 45 * mel + 2 * features + adversarial + judged
    assert_within(metrics["loss"], expected, rounding(4, expected))
    assert metrics["tokens"] == 2 and 0 <= metrics["accuracy"] <= 1
  assert seen[-1]["mel_loss"] < 0.7 * seen[0]["mel_loss"]
  assert seen[-1]["lr"] < seen[0]["lr"]


@pytest.mark.nightly  # two programs are compiled; tests/training/test_composite.py has a mesh
def test_the_mesh_changes_nothing(params):
  [on_one], [on_two] = (run_steps(params, 1, devices=n) for n in (1, 2))
  for name in ("mel_loss", "feature_loss", "discriminator_loss", "grad_norm"):
    bound = rounding(30 * FRAMES * PER_FRAME, on_one[name])
    assert_within(on_two[name], on_one[name], bound)


def test_the_loss_is_that_of_the_segments_own_states(params):
  """A vocoder that speaks exactly the target from its states has no distance, one frame off it has.

  The target is what the vocoder makes of the states at `first_B`.
  """

  @jax.jit
  def mel_loss(shift):
    batch = make_batch(short=5)
    target = batch.target
    hidden_BAD = speech_llm.answer_hidden(params, batch, MODEL)
    states_BSD = hidden_BAD[:, FIRST : FIRST + FRAMES]
    speaker_BE = speech_llm.speaker_vector(params, target.voice_BTF, MODEL)
    spoken_BN = speech_llm.speak(params, states_BSD, target.frames_B, speaker_BE, MODEL)
    target = target.replace(waveform_BN=spoken_BN, first_B=target.first_B + shift)
    sums = vocoder.loss(params, batch.replace(target=target), MODEL, CONFIG)[1]
    return sums["per_token"]["mel_loss"]

  assert mel_loss(0) <= rounding(64, 20)
  assert mel_loss(1) > 0.05 and mel_loss(-1) > 0.05


def test_padding_rows_count_nothing(params):
  @jax.jit
  def sums(batch):
    return vocoder.loss(params, batch, MODEL, CONFIG)[1]

  batch = make_batch()
  empty = batch.target.replace(frames_B=np.array([FRAMES, 0], np.int32))
  both, one = sums(batch), sums(batch.replace(target=empty))
  assert (both["tokens"], one["tokens"]) == (2, 1)
  assert 0 < one["loss_sum"] < both["loss_sum"]


def test_mels_are_those_of_the_original():
  """HiFi-GAN's: reflected edges, amplitudes, Slaney's triangles, log(max(x, 1e-5))."""
  import librosa

  config = VocoderTrainingConfig()
  waveform_BN = np.random.default_rng(0).uniform(-1, 1, (2, 4096)).astype(np.float32)
  waveform_BN[1, 2000:] = 0
  ours = log_mel(waveform_BN, config, sample_rate_hz=22050)
  padded = torch.nn.functional.pad(torch.tensor(waveform_BN).double()[None], (384, 384), "reflect")
  spectrum = torch.stft(
    padded[0], 1024, 256, window=torch.hann_window(1024, dtype=torch.float64), center=False,
    return_complex=True,
  )  # fmt: skip
  amplitude = (spectrum.abs() ** 2 + 1e-9).sqrt()
  mel = librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, dtype=np.float64)
  theirs = (torch.tensor(mel) @ amplitude).clamp(min=1e-5).log().mT.numpy()
  assert ours.shape == (2, 16, 80)
  # Amplitudes err by the rounding of the largest, the logarithm by that over the amplitude.
  bound = rounding(1024, np.exp(theirs).max(-1, keepdims=True) / np.exp(theirs))
  assert_within(ours, theirs, bound)
  with exceeds_the_bound():
    assert_within(ours[:, 1:], theirs[:, :-1], bound[:, 1:])


@pytest.mark.parametrize(
  "paths, message",
  [
    (["vocoder/a", "decoder/b"], "trainable selects decoder/b and 0 others .* does not train"),
    (["speaker/a", "discriminators/b"], "no parameter of the vocoder; add vocoder/"),
  ],
)
def test_only_the_vocoder_and_its_voices_can_be_trained(paths, message):
  with pytest.raises(ValueError, match=message):
    vocoder.check_trainable(paths)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"mel_weight": 0.0}, "mel_weight=0 must be above 0"),
    ({"mel_hop": 2000}, "mel_hop=2000: must be positive"),
    ({"mel_window": 1023}, "the window even"),
  ],
)
def test_losses_that_make_no_sense_are_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    VocoderTrainingConfig(**changes)
