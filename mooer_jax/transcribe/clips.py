"""Loading of clips: decoded, checked, and split into chunks if requested."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mooer_jax.audio.decode import SILENCE, AudioError, check_samples, load_audio
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.speech_llm import num_speech_tokens, shortest_s

# A long clip is split at the quietest 0.2 s of the last 5 s that a chunk may have. Chunks of less
# than a second would contain little more than the end of a word.
PAUSE_S, SEARCH_S, SHORTEST_S = 0.2, 5.0, 1.0


def load_clips(
  audio: Sequence[str | os.PathLike | bytes | np.ndarray],
  config: SpeechLLMConfig,
  *,
  chunk_length_s: float | None = None,
  first: int = 0,
) -> list[list[np.ndarray] | ValueError | OSError]:
  """Reads clips and splits long ones.

  Args:
    audio: paths, bytes of audio files, or float arrays [samples] in [-1, 1] at the model's rate.
    config: the model, whose limits the clips must fit.
    chunk_length_s: longest chunk, in seconds; longer clips are split at pauses. None: they are
      errors.
    first: index of the first clip, for the names of arrays in errors.

  Returns:
    For each clip its chunks, float32 [samples], or the error that names the clip: missing,
    undecodable, empty, silent, not finite or too long.

  Raises:
    ValueError: for a chunk_length_s out of range.
  """
  lengths = chunk_lengths(chunk_length_s, config)
  clips: list[list[np.ndarray] | ValueError | OSError] = []
  for index, clip in enumerate(audio, first):
    try:
      name = os.fsdecode(clip) if isinstance(clip, (str, os.PathLike)) else f"audio[{index}]"
      waveform_N = _read(clip, name, config)
      clips.append(_chunks(waveform_N, name, config, lengths=lengths))
    except (ValueError, OSError) as error:
      clips.append(error)
  return clips


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


def raise_first(clips: Sequence[Any]) -> None:
  """Raises the error of `load_clips`, or one error that lists all if there are several."""
  errors = [clip for clip in clips if isinstance(clip, Exception)]
  if len(errors) == 1:
    raise errors[0]
  if errors:
    said = "; ".join(str(error) for error in errors)
    raise ValueError(f"{len(errors)} of {len(clips)} audio files could not be used: {said}")


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
      f"{name}: {given}; give a path, the bytes of a file, or a float array [samples] in [-1, 1] at"
      f" {rate_hz} Hz"
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
  if not num_speech_tokens(len(config.pad_to_min_duration(waveform_N)), config):
    least = f"this model needs {shortest_s(config):.3f} s"
    raise AudioError(f"{name}: {seconds:.3f} s is too short to hold speech; {least}", "too short")
  if np.abs(waveform_N).max(initial=0) < SILENCE:
    raise AudioError(f"{name}: silent (no sample above {SILENCE})", "silent")
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
