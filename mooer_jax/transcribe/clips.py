"""Loading of clips: decoded, checked, and split into chunks if requested."""

import dataclasses
import itertools
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mooer_jax.audio.decode import SILENCE, AudioError, check_samples, load_audio
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation import NOT_FINITE
from mooer_jax.prompts import split_answer
from mooer_jax.speech_llm import num_speech_tokens, shortest_s
from mooer_jax.transcribe.transcript import Transcript, join_transcripts

# A long clip is split at the quietest 0.2 s of the last 5 s that a chunk may have. Chunks of less
# than a second would contain little more than the end of a word.
PAUSE_S, SEARCH_S, SHORTEST_S = 0.2, 5.0, 1.0

Audio = str | os.PathLike | bytes | np.ndarray


@dataclasses.dataclass
class Clip:
  """A clip from its reading to its transcript.

  Attributes:
    name, path: its name in errors; its path, None for an array or bytes.
    adapter: name of the LoRA that it is decoded with; None is the checkpoint's own weights.
    parts: result of each chunk; an empty text until `fill`.
    chunks: float32 [samples] of each chunk, None once taken.
    loud: the chunks that are not silent; the others keep their empty text.
    missing: number of loud chunks that are not filled in yet.
    failure: why the clip cannot be used: missing, undecodable, empty, silent, not finite, too long.
  """

  name: str
  path: str | None
  task: str
  adapter: str | None = None
  parts: list[Transcript] = dataclasses.field(default_factory=list)
  chunks: list[Any] = dataclasses.field(default_factory=list)
  loud: list[int] = dataclasses.field(default_factory=list)
  missing: int = 0
  failure: ValueError | OSError | None = None

  def take(self, n: int) -> np.ndarray:
    """Chunk n, which the clip keeps no longer."""
    chunk_N, self.chunks[n] = self.chunks[n], None
    return chunk_N

  def fill(self, n: int, **values: Any) -> None:
    self.parts[n] = dataclasses.replace(self.parts[n], **values)
    self.missing -= 1

  def transcript(self) -> Transcript:
    """The result of the whole clip, or its error."""
    error = None if self.failure is None else str(self.failure)
    if error is None and not all(math.isfinite(part.score) for part in self.parts):
      error = f"{self.name}: {NOT_FINITE}"
    if error is not None:
      return Transcript("", [], 0.0, self.task, path=self.path, finished=False, error=error)
    return dataclasses.replace(join_transcripts(self.parts), path=self.path)


def read_windows(
  audio: Iterable[tuple[Audio, str | None]],
  config: SpeechLLMConfig,
  *,
  size: int,
  task: str,
  chunk_length_s: float | None = None,
  stop: threading.Event | None = None,
) -> Iterator[list[Clip]]:
  """Reads clips, `size` at a time, and splits long ones.

  Args:
    audio: (clip, name of its adapter) pairs; clips are paths, bytes of audio files, or float arrays
      [samples] in [-1, 1] at the model's rate.
    config: the model, whose limits the clips must fit.
    task: task of the transcripts.
    chunk_length_s: longest chunk, in seconds; longer clips are split at pauses. None: they are
      errors.
    stop: no further clip is read once it is set.

  Raises:
    ValueError: for a chunk_length_s out of range.
  """
  lengths = chunk_lengths(chunk_length_s, config)
  window: list[Clip] = []
  sources, failure = iter(audio), None
  for index in itertools.count():
    try:
      source, adapter = next(sources)
    except StopIteration:
      break
    except Exception as error:  # raised after the clips before it
      failure = error
      break
    if stop is not None and stop.is_set():
      return
    clip = _clip(source, index, config, task, lengths)
    window.append(dataclasses.replace(clip, adapter=adapter))
    if len(window) == size:
      yield window
      window = []
  if window:
    yield window
  if failure is not None:
    raise failure


def _clip(source: Any, index: int, config: SpeechLLMConfig, task: str, lengths) -> Clip:
  name, path = f"audio[{index}]", None
  try:
    if isinstance(source, (str, os.PathLike)):
      source = name = path = os.fsdecode(source)
    chunks = _chunks(_read(source, name, config), name, config, lengths=lengths)
  except (ValueError, OSError, TypeError) as error:  # TypeError: of a PathLike
    failure = ValueError(f"{name}: {error}") if isinstance(error, TypeError) else error
    return Clip(name, path, task, failure=failure)
  empty = Transcript("", [], 0.0, task, **split_answer(task, "")._asdict())
  parts = [
    dataclasses.replace(empty, seconds=len(chunk_N) / config.sample_rate_hz) for chunk_N in chunks
  ]
  loud = [n for n, chunk_N in enumerate(chunks) if np.abs(chunk_N).max() >= SILENCE]
  return Clip(name, path, task, parts=parts, chunks=chunks, loud=loud, missing=len(loud))


def read_clip(source: Audio, config: SpeechLLMConfig) -> np.ndarray:
  """One clip as float32 [samples] at the model's rate; see `read_windows` for the arguments.

  Raises:
    FileNotFoundError, ValueError: if it cannot be used, also if it is longer than the limit.
  """
  name = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else "audio"
  waveform_N = _read(source, name, config)
  _check_speech(waveform_N, name, config)
  if (seconds := len(waveform_N) / config.sample_rate_hz) > config.max_audio_s:
    raise ValueError(
      f"{name}: {seconds:.1f} s, but this model takes at most {config.max_audio_s:g} s; give a"
      " shorter clip"
    )
  return waveform_N


def chunk_lengths(chunk_length_s: float | None, config: SpeechLLMConfig) -> tuple[int, int] | None:
  """(shortest, longest) chunk in samples; None without chunks.

  Raises:
    ValueError: for a chunk_length_s out of range.
  """
  if chunk_length_s is None:
    return None
  shortest, longest = max(SHORTEST_S, shortest_s(config)), config.max_audio_s
  if not 2 * shortest <= chunk_length_s <= longest:
    raise ValueError(
      f"chunk_length_s={chunk_length_s:g}: must be between {2 * shortest:g} and {longest:g} (the"
      " limit of this model) seconds"
    )
  rate_hz = config.sample_rate_hz
  return round(shortest * rate_hz), int(chunk_length_s * rate_hz)


def raise_first(failures: Sequence[Exception | None]) -> None:
  """Raises the failure among those of clips, or one error that lists all if there are several."""
  errors = [failure for failure in failures if failure is not None]
  if len(errors) == 1:
    raise errors[0]
  if errors:
    said = "; ".join(str(error) for error in errors)
    raise ValueError(f"{len(errors)} of {len(failures)} audio files could not be used: {said}")


def _read(clip: Any, name: str, config: SpeechLLMConfig) -> np.ndarray:
  """One clip as float32 [samples], which are checked."""
  rate_hz = config.sample_rate_hz
  if isinstance(clip, (str, os.PathLike, bytes)):
    name = f"{len(clip)} bytes of {name}" if isinstance(clip, bytes) else name
    return load_audio(clip, sample_rate_hz=rate_hz, channel=config.channel, name=name)
  is_array = isinstance(clip, np.ndarray) and not np.ma.isMaskedArray(clip)
  if not is_array or clip.ndim != 1 or not np.issubdtype(clip.dtype, np.floating):
    given = f"{clip.dtype} array of shape {clip.shape}" if is_array else type(clip).__name__
    raise ValueError(
      f"{name}: {given}; give a path, the bytes of a file, or a NumPy array of floats [samples] in"
      f" [-1, 1] at {rate_hz} Hz"
    )
  waveform_N = clip.astype(np.float32)
  check_samples(waveform_N, name)
  return waveform_N


def _chunks(
  waveform_N: np.ndarray, name: str, config: SpeechLLMConfig, *, lengths: tuple[int, int] | None
) -> list[np.ndarray]:
  """Returns the clip if it is within the model's limits; with lengths, its chunks."""
  rate_hz = config.sample_rate_hz
  seconds = len(waveform_N) / rate_hz
  _check_speech(waveform_N, name, config)
  if lengths is not None:
    search, window = (round(length * rate_hz) for length in (SEARCH_S, PAUSE_S))
    return split_at_pauses(
      waveform_N, shortest=lengths[0], longest=lengths[1], search=search, window=window
    )
  if seconds > (limit := config.max_audio_s):
    remedy = "give shorter ones"
    if limit >= 2 * max(SHORTEST_S, shortest_s(config)):
      remedy = f"--chunk-length-s {limit:g} (chunk_length_s={limit:g}) splits it at pauses"
    raise ValueError(f"{name}: {seconds:.1f} s, but this model takes at most {limit:g} s; {remedy}")
  return [waveform_N]


def _check_speech(waveform_N: np.ndarray, name: str, config: SpeechLLMConfig) -> None:
  """Raises AudioError for a clip that is too short or silent."""
  if not num_speech_tokens(len(config.pad_to_min_duration(waveform_N)), config):
    seconds, least = len(waveform_N) / config.sample_rate_hz, shortest_s(config)
    raise AudioError(
      f"{name}: {seconds:.3f} s is too short to hold speech; this model needs {least:.3f} s",
      "too short",
    )
  if np.abs(waveform_N).max(initial=0) < SILENCE:
    raise AudioError(f"{name}: silent (no sample above {SILENCE})", "silent")


def split_at_pauses(
  waveform_N: np.ndarray, *, longest: int, shortest: int, search: int, window: int
) -> list[np.ndarray]:
  """Splits a long clip into chunks; concatenated, they are the clip, sample for sample.

  Each boundary is where the `window` samples around it have the least energy, among the last
  `search` samples that the chunk may have; of equally quiet places, the last one.

  Args:
    waveform_N: float [N]; the chunks are views of it, in order.
    longest: maximum number of samples of a chunk, at least 2 * shortest.
    shortest: minimum number of samples of a chunk, unless the clip is shorter.
    search: samples before the maximum among which a pause is searched for.
    window: samples over which energy is averaged.
  """
  # Else not every length could be split.
  assert longest >= 2 * shortest > 0, f"chunks of {shortest} to {longest} samples"
  chunks = []
  while len(waveform_N) > longest:
    last = min(longest, len(waveform_N) - shortest)
    first = max(shortest, last - search)
    end = first + _quietest(waveform_N, first=first, last=last, window=window)
    chunks.append(waveform_N[:end])
    waveform_N = waveform_N[end:]
  return [*chunks, waveform_N]


def _quietest(waveform_N: np.ndarray, *, first: int, last: int, window: int) -> int:
  """The quietest place in first..last, counted from first."""
  half = max(1, window // 2)
  begin = max(0, first - half)
  near_N = waveform_N[begin : last + half].astype(np.float64)
  energy_N = np.concatenate([[0.0], np.cumsum(near_N**2)])
  places = np.arange(first, last + 1) - begin
  left, right = np.maximum(places - half, 0), np.minimum(places + half, len(near_N))
  mean = (energy_N[right] - energy_N[left]) / (right - left)
  return int(len(mean) - 1 - mean[::-1].argmin())
