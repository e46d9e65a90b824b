"""Augmentation of training data, drawn anew for each reading of an utterance."""

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np

from mooer_jax.audio.augment import (
  NO_MASKS,
  Masks,
  add_noise,
  change_speed,
  change_volume,
  num_samples_at,
  reverberate,
)
from mooer_jax.audio.frontend import Frontend
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.recordings import Recordings

# Options that another one turns on.
_NEEDS = {
  "noise_probability": "noise",
  "noise_snr_db": "noise",
  "room_probability": "room",
  "freq_mask_bins": "freq_masks",
  "time_mask_s": "time_masks",
  "time_mask_share": "time_masks",
}
_BOUNDS = {
  "speed": (0.5, 2.0),
  "room_probability": (0.0, 1.0),
  "noise_probability": (0.0, 1.0),
  "freq_masks": (0, math.inf),
  "freq_mask_bins": (1, math.inf),
  "time_masks": (0, math.inf),
  "time_mask_s": (0.0, math.inf),
  "time_mask_share": (0.0, 1.0),
}


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
  """Augmentation of training data, in this order; by default there is none.

  Attributes:
    speed: factors of the speed, such as (0.9, 1.0, 1.1), each equally probable; tempo and pitch
      change. Limits of length apply afterwards.
    room: folder of room impulse responses, or a list of paths, one a line.
    room_probability: share of the readings that a room is added to.
    noise: folder of noise recordings, or a list of paths, one a line.
    noise_probability: share of the readings that noise is added to.
    noise_snr_db: least and largest signal-to-noise ratio, dB; every value is equally probable.
    volume_db: least and largest gain, dB; every value is equally probable.
    freq_masks, time_masks: number of frequency and of time masks of a clip (SpecAugment).
    freq_mask_bins: largest width of a frequency mask, mel bins of the first encoder.
    time_mask_s: largest width of a time mask, seconds.
    time_mask_share: largest width of a time mask, as a share of the clip.

  The widths are those of SpecAugment's policy LD, which has two masks of each kind.
  """

  speed: tuple[float, ...] = ()
  room: str = ""
  room_probability: float = 0.5
  noise: str = ""
  noise_probability: float = 0.5
  noise_snr_db: tuple[float, float] = (5.0, 20.0)
  volume_db: tuple[float, float] = (0.0, 0.0)
  freq_masks: int = 0
  freq_mask_bins: int = 27
  time_masks: int = 0
  time_mask_s: float = 1.0
  time_mask_share: float = 1.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name, value = field.name, getattr(self, field.name)
      if name in _NEEDS and not getattr(self, _NEEDS[name]) and value != field.default:
        raise ValueError(
          f"data.augment.{name}={value} has no effect without data.augment.{_NEEDS[name]}; set that"
          " too, or leave it out"
        )
      low, high = _BOUNDS.get(name, (-math.inf, math.inf))
      for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, str) and not low <= number <= high:
          limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
          raise ValueError(f"data.augment.{name}={value}: must be {limit}")
    for name in ("noise_probability", "room_probability", "time_mask_s", "time_mask_share"):
      if not getattr(self, name):
        raise ValueError(
          f"data.augment.{name}=0 turns data.augment.{_NEEDS[name]} off; unset that instead"
        )
    for name in ("noise_snr_db", "volume_db"):
      if (value := getattr(self, name))[0] > value[1]:
        raise ValueError(f"data.augment.{name}={value}: the least value must come first")
    if self.speed and set(self.speed) == {1.0}:
      raise ValueError(
        f"data.augment.speed={self.speed} changes nothing; add factors, such as 0.9 and 1.1, or set"
        " it to ()"
      )


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Augments the readings of utterances; without arguments it changes nothing.

  All that is drawn for a reading depends only on the seed, the key of the utterance and the number
  of the reading. Each method draws from a generator of its own, so that one option does not change
  what another draws.
  """

  config: AugmentConfig = AugmentConfig()
  room: Recordings | None = None
  noise: Recordings | None = None
  seed: int = 0
  reading: tuple[str, int | str] = ("", 0)  # key of the utterance, identifier of its reading

  @classmethod
  def load(cls, config: AugmentConfig, model: SpeechLLMConfig, *, seed: int) -> "Augmentation":
    """Opens the recordings and checks that the model can be trained with the config.

    Raises:
      FileNotFoundError, ValueError: as `Recordings`; for masks that are wider than the spectrogram,
        or of features that the compiled program computes.
    """
    masks = [name for name in ("freq_masks", "time_masks") if getattr(config, name)]
    if masks and model.compute.features == "device":
      raise ValueError(
        f"data.augment.{masks[0]}={getattr(config, masks[0])} masks features on the host, but"
        " compute.features='device' computes them in the compiled program; set"
        " compute.features='host', or data.augment.freq_masks=0 and .time_masks=0"
      )
    if config.freq_masks and config.freq_mask_bins > (bins := model.frontends[0].bins):
      raise ValueError(
        f"data.augment.freq_mask_bins={config.freq_mask_bins} exceeds the {bins} mel bins of the"
        " features; lower it"
      )

    def recordings(name: str) -> Recordings | None:
      source, option = getattr(config, name), f"data.augment.{name}"
      rate_hz = model.sample_rate_hz
      return Recordings(source, option=option, sample_rate_hz=rate_hz) if source else None

    return cls(config, recordings("room"), recordings("noise"), seed)

  def of(self, key: str, reading: int | str) -> "Augmentation":
    """The augmentation of a reading of an utterance."""
    return dataclasses.replace(self, reading=(key, reading))

  def description(self) -> dict[str, Any]:
    """The settings, and the recordings, that determine what is drawn."""
    found = dataclasses.asdict(self.config)
    for name, recordings in (("room", self.room), ("noise", self.noise)):
      found[name] = recordings.description() if recordings else []
    return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}

  @property
  def speed(self) -> float:
    factors = self.config.speed
    if not factors:
      return 1.0
    return factors[self._rng("speed").integers(len(factors))]

  def num_samples(self, samples: int) -> int:
    """Length of a clip of `samples` after the change of speed."""
    return num_samples_at(samples, self.speed)

  def change_speed(self, waveform_N: np.ndarray) -> np.ndarray:
    return change_speed(waveform_N, self.speed)

  def __call__(self, waveform_N: np.ndarray) -> np.ndarray:
    """Adds a room and noise, and changes the volume; the length stays."""
    config = self.config
    if self.room and (rng := self._rng("room")).random() < config.room_probability:
      waveform_N = reverberate(waveform_N, self.room[int(rng.integers(len(self.room)))])
    if self.noise and (rng := self._rng("noise")).random() < config.noise_probability:
      noise_M = self.noise[int(rng.integers(len(self.noise)))]
      spare = len(noise_M) - len(waveform_N)
      start = int(rng.integers(spare + 1 if spare >= 0 else len(noise_M)))
      snr_db = rng.uniform(*config.noise_snr_db)
      waveform_N = add_noise(waveform_N, noise_M, start=start, snr_db=snr_db)
    if any(config.volume_db):
      waveform_N = change_volume(waveform_N, self._rng("volume").uniform(*config.volume_db))
    return waveform_N

  def masks(self, samples: int, frontend: Frontend) -> Masks:
    """The masks of the spectrograms of a clip; `frontend` is that of the first encoder."""
    config = self.config
    if not (config.freq_masks or config.time_masks):
      return NO_MASKS
    rng = self._rng("masks")
    longest = round(config.time_mask_s * frontend.sample_rate_hz)
    longest = min(longest, int(config.time_mask_share * samples))
    times = [_interval(rng, longest, samples) for _ in range(config.time_masks)]
    widest, bins = config.freq_mask_bins, frontend.bins
    bands = [_interval(rng, widest, bins) for _ in range(config.freq_masks)]
    return Masks(tuple(times), tuple((low / bins, high / bins) for low, high in bands))

  def _rng(self, purpose: str) -> np.random.Generator:
    values = (purpose, self.seed, self.reading[1], self.reading[0])
    digest = hashlib.blake2b(" ".join(map(str, values)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _interval(rng: np.random.Generator, widest: int, size: int) -> tuple[int, int]:
  """An interval of random width, at most `widest`, at a random place within `size`."""
  width = int(rng.integers(widest + 1))
  start = int(rng.integers(size - width + 1))
  return start, start + width
