"""The C library espeak-ng through ctypes: offline text to speech with many synthetic voices."""

import ctypes
import dataclasses
import functools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

_SYNCHRONOUS = 2
_UTF8 = 1
_IPA = 2
_RATE, _PITCH, _RANGE, _WORD_GAP = 1, 3, 4, 7
_CALLBACK = ctypes.CFUNCTYPE(
  ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclasses.dataclass(frozen=True)
class Manner:
  """Voice and prosody of a sentence; the voice is ACCENT+VARIANT, such as "en-us+f3"."""

  voice: str
  words_per_minute: int = 170  # 80 to 450
  pitch: int = 50  # within the range of the voice, 0 to 100
  pitch_range: int = 50  # 0 (monotone) to 100 (lively)
  word_gap: int = 0  # silence between words, in units of 10 ms at the default rate


class Espeak:
  """One synthesizer; espeak-ng is global to a process, so use `synthesizer()`."""

  def __init__(self):
    try:
      import espeakng_loader
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError(
        "the demo needs the package espeakng-loader for speech; pip install 'mooer-jax[demo]'"
      ) from error
    self._library = ctypes.CDLL(espeakng_loader.get_library_path())
    # Links to the data, to which `define` can add voices. The path must be short, because espeak-ng
    # keeps it in a fixed buffer and crashes beyond that.
    self._folder = tempfile.TemporaryDirectory(prefix="espeak")
    source = Path(espeakng_loader.get_data_path())
    self._data = Path(self._folder.name) / source.name
    shutil.copytree(source, self._data, copy_function=os.symlink)
    self._variants = self._data / "voices" / "!v"
    self._variants.chmod(0o700)  # that of the package may be read-only
    folder = self._folder.name.encode()
    self.sample_rate_hz = self._library.espeak_Initialize(_SYNCHRONOUS, 0, folder, 0)
    if self.sample_rate_hz <= 0:
      raise RuntimeError(f"{source}: espeak-ng did not start (code {self.sample_rate_hz})")
    self._chunks: list[np.ndarray] = []
    # ctypes does not keep the callback alive, so this object does.
    self._callback = _CALLBACK(self._receive)
    self._library.espeak_SetSynthCallback(self._callback)
    self._voice = ""
    # espeak-ng seeds its breath noise from the clock.
    self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))

  def define(self, name: str, description: str):
    """Add the voice variant ACCENT+NAME, described in espeak-ng's voice format."""
    (self._variants / name).write_text(description, encoding="ascii")

  def _receive(self, samples, count, _events) -> int:
    if samples and count > 0:
      self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
    return 0

  def say(self, text: str, manner: Manner) -> np.ndarray:
    """Synthesize a sentence: int16 [samples] at `sample_rate_hz`."""
    self._choose(manner.voice)
    for parameter, value in (
      (_RATE, manner.words_per_minute),
      (_PITCH, manner.pitch),
      (_RANGE, manner.pitch_range),
      (_WORD_GAP, manner.word_gap),
    ):
      self._library.espeak_SetParameter(parameter, value, 0)
    self._chunks = []
    data = text.encode()
    code = self._library.espeak_Synth(data, len(data) + 1, 0, 0, 0, _UTF8, None, None)
    if code != 0 or not self._chunks:
      raise RuntimeError(f"{text!r} with {manner}: espeak-ng returned no speech (code {code})")
    return np.concatenate(self._chunks)

  def restart_noise(self):
    """Make the next sentence independent of other libraries in the process.

    The klatt voices draw their noise from the C library's generator, which all libraries share.
    """
    ctypes.CDLL(None).srand(1)
    self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))

  def phonemes(self, text: str, voice: str) -> str:
    """Return the phonemes of a text in the International Phonetic Alphabet, without punctuation."""
    self._choose(voice)
    convert = self._library.espeak_TextToPhonemes
    convert.restype = ctypes.c_char_p
    data = ctypes.c_char_p(text.encode())
    rest = ctypes.cast(data, ctypes.c_void_p)
    clauses = []
    # Each call reads one clause and moves the pointer on; it is null at the end.
    while rest.value:
      clauses.append(convert(ctypes.byref(rest), _UTF8, _IPA).decode())
    return " ".join(clauses)

  def _choose(self, voice: str):
    if voice == self._voice:
      return
    if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
      raise ValueError(f"{voice!r}: espeak-ng has no such voice; see `espeak-ng --voices`")
    self._voice = voice


@functools.cache
def synthesizer() -> Espeak:
  """Return the synthesizer of this process."""
  return Espeak()
