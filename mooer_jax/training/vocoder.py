"""The loss of a vocoder: mel spectrogram, and discriminators that are trained beside it.

Generator and discriminators are one tree of parameters with one loss, the sum of theirs. In each
term, the parameters of the other side are constants, so that the gradient of the sum has those of
both sides, and the train step is that of any other model.

Source: HiFi-GAN (Kong et al., 2020); there, the discriminators take their step first.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import speech_llm, vocoders
from mooer_jax.audio.fbank import cut_frames, matmul
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.speech_llm import Batch
from mooer_jax.vocoders.discriminators import DiscriminatorConfig

MEL_FLOOR = 1e-5
_POWER_OFFSET = 1e-9  # the gradient of an amplitude is not finite at 0


@dataclasses.dataclass(frozen=True)
class VocoderTrainingConfig:
  """Losses of the vocoder and sizes of its discriminators; the defaults are HiFi-GAN's.

  Attributes:
    mel_weight, feature_weight: of the distance between mel spectrograms, and between activations
      of the discriminators, beside the adversarial loss, whose weight is 1.
    mel_bins: bins of the mel spectrogram, up to half the sample rate.
    mel_window, mel_hop: samples of its Hann windows, and from one to the next.
    discriminators: their sizes.
  """

  mel_weight: float = 45.0
  feature_weight: float = 2.0
  mel_bins: int = 80
  mel_window: int = 1024
  mel_hop: int = 256
  discriminators: DiscriminatorConfig = DiscriminatorConfig()

  def __post_init__(self):
    if self.mel_weight <= 0 or self.feature_weight < 0:
      raise ValueError(
        f"vocoder_training.mel_weight={self.mel_weight:g} must be above 0, and"
        f" feature_weight={self.feature_weight:g} not negative"
      )
    if self.mel_bins < 1 or not 0 < self.mel_hop <= self.mel_window or self.mel_window % 2:
      raise ValueError(
        f"vocoder_training.mel_bins={self.mel_bins}, mel_window={self.mel_window} and"
        f" mel_hop={self.mel_hop}: must be positive, the window even and at least the hop"
      )


def check_trainable(trained: Iterable[str]) -> None:
  """Raises ValueError unless the paths of trained parameters are of the vocoder, with its voices.

  The gradient of all others would be 0.
  """
  trained = list(trained)
  allowed = (*vocoders.PARTS, vocoders.DISCRIMINATORS)
  if odd := [path for path in trained if path.partition("/")[0] not in allowed]:
    raise ValueError(
      f"trainable selects {odd[0]} and {len(odd) - 1} others that train.objective='vocoder' does"
      " not train; select vocoder/.* and, to train the voices, speaker/.*"
    )
  if not any(path.startswith("vocoder/") for path in trained):
    raise ValueError("trainable selects no parameter of the vocoder; add vocoder/.*")


def loss(
  params: dict,
  batch: Batch,
  model: SpeechLLMConfig,
  config: VocoderTrainingConfig,
  *,
  rows: jax.sharding.NamedSharding | None = None,
) -> tuple[jax.Array, dict]:
  """Loss of vocoder and discriminators on a segment of each answer's recording, `batch.target`.

  The vocoder takes the LLM's states of the segment from a teacher-forced pass without dropout, as
  it does in generation, and the voice of the same recording.

  Args:
    params: of the model, and those of its discriminators.
    rows: sharding of the rows of the batch on a mesh, as of `speech_llm.answer_hidden`.

  Returns:
    (mean loss, sums over rows: "loss_sum"; "tokens", the number of segments; "correct", the share
    of right judgements of the discriminators, where 0.5 is chance; "per_token", the parts of the
    loss without their weights).
  """
  target, speech = batch.target, model.speech_output
  assert target is not None and speech is not None, "the config is checked before"
  frames = target.waveform_BN.shape[1] // speech.vocoder.samples_per_frame
  hidden_BAD = jax.lax.stop_gradient(speech_llm.answer_hidden(params, batch, model, rows=rows))
  states_BSD = vocoders.segment(hidden_BAD, target.first_B, frames)
  speaker_BE = speech_llm.speaker_vector(params, target.voice_BTF, model)
  fake_BN = speech_llm.speak(params, states_BSD, target.frames_B, speaker_BE, model)
  of_discriminators = params[vocoders.DISCRIMINATORS]
  with jax.named_scope("discriminate"):
    judged_B, right_B = discriminator_loss(
      of_discriminators, target.waveform_BN, jax.lax.stop_gradient(fake_BN), config
    )
    adversarial_B, features_B = adversarial_losses(
      jax.lax.stop_gradient(of_discriminators), target.waveform_BN, fake_BN, config
    )
  with jax.named_scope("mel_loss"):
    rate_hz = speech.vocoder.sample_rate_hz
    mels = (log_mel(x_BN, config, sample_rate_hz=rate_hz) for x_BN in (target.waveform_BN, fake_BN))
    mel_B = _row_means(jnp.abs(jnp.subtract(*mels)))
  parts = {
    "mel_loss": mel_B,
    "feature_loss": features_B,
    "adversarial_loss": adversarial_B,
    "discriminator_loss": judged_B,
  }
  total_B = (
    config.mel_weight * mel_B + config.feature_weight * features_B + adversarial_B + judged_B
  )
  used_B = target.frames_B > 0
  summed = functools.partial(jnp.sum, where=used_B)
  sums = {
    "loss_sum": summed(total_B),
    "tokens": used_B.sum(),
    "correct": summed(right_B),
    "per_token": {name: summed(value_B) for name, value_B in parts.items()},
  }
  return sums["loss_sum"] / jnp.maximum(sums["tokens"], 1), sums


def discriminator_loss(
  params: dict, real_BN: jax.Array, fake_BN: jax.Array, config: VocoderTrainingConfig
) -> tuple[jax.Array, jax.Array]:
  """(squared distance of the scores from 1 and 0, share of scores on the right side), each [B]."""
  real, fake = (_activations(params, x_BN, config) for x_BN in (real_BN, fake_BN))
  losses, right = [], []
  for of_real, of_fake in zip(real, fake, strict=True):
    losses += [_row_means((1 - of_real[-1]) ** 2), _row_means(of_fake[-1] ** 2)]
    right += [_row_means(of_real[-1] > 0.5), _row_means(of_fake[-1] <= 0.5)]
  return jnp.stack(losses).sum(0), jnp.stack(right).mean(0)


def adversarial_losses(
  params: dict, real_BN: jax.Array, fake_BN: jax.Array, config: VocoderTrainingConfig
) -> tuple[jax.Array, jax.Array]:
  """(squared distance of the generated scores from 1, distance of all activations), each [B]."""
  real, fake = (_activations(params, x_BN, config) for x_BN in (real_BN, fake_BN))
  scores = [_row_means((1 - of_fake[-1]) ** 2) for of_fake in fake]
  distances = [
    _row_means(jnp.abs(a - b))
    for of_real, of_fake in zip(real, fake, strict=True)
    for a, b in zip(of_real, of_fake, strict=True)
  ]
  return jnp.stack(scores).sum(0), jnp.stack(distances).sum(0)


def _activations(params: dict, waveform_BN: jax.Array, config: VocoderTrainingConfig):
  module = config.discriminators.module()
  found: Any = module.apply({"params": params}, waveform_BN)
  return found


def _row_means(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32).reshape(len(x), -1).mean(1)


def log_mel(
  waveform_BN: jax.Array, config: VocoderTrainingConfig, *, sample_rate_hz: int
) -> jax.Array:
  """Log amplitudes in mel bins, float32 [B, N // hop, bins]; N must exceed half the window."""
  window, hop = config.mel_window, config.mel_hop
  edge = (window - hop) // 2
  padded_BN = jnp.pad(waveform_BN.astype(jnp.float32), ((0, 0), (edge, edge)), mode="reflect")
  frames = (padded_BN.shape[1] - window) // hop + 1
  frames_BTL = cut_frames(padded_BN, frames, length=window, hop=hop)
  window_L = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)).astype(np.float32)
  spectrum_BTK = jnp.fft.rfft(frames_BTL * window_L)
  power_BTK = spectrum_BTK.real**2 + spectrum_BTK.imag**2
  mel_BTF = matmul(jnp.sqrt(power_BTK + _POWER_OFFSET), _mel_matrix(config, sample_rate_hz))
  return jnp.log(jnp.maximum(mel_BTF, MEL_FLOOR))


@functools.cache
def _mel_matrix(config: VocoderTrainingConfig, sample_rate_hz: int) -> np.ndarray:
  """Slaney's triangles, float32 [frequencies, bins]."""
  import librosa.filters

  mel_FK = librosa.filters.mel(
    sr=sample_rate_hz, n_fft=config.mel_window, n_mels=config.mel_bins, dtype=np.float64
  )
  return mel_FK.T.astype(np.float32)
