"""Loading of clips: decoded, checked, and split into chunks if requested."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mooer_jax.audio.decode import AudioError, load_audio
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.speech_llm import num_speech_tokens, shortest_s

SILENCE = 1e-4  # peak below -80 dBFS
LOUDEST = 4.0  # resampling may overshoot 1; 16-bit integers as floats are far above
# Where a long clip is cut: at the quietest 0.2 s of the last 5 s that a piece may have. Pieces of
# less than a second would hold little more than the end of a word.
PAUSE_S, SEARCH_S, SHORTEST_S = 0.2, 5.0, 1.0


def load_clips(
  audio: Sequence[str | os.PathLike | bytes | np.ndarray],
  config: SpeechLLMConfig,
  *,
  chunk_length_s: float | None = None,
) -> list[list[np.ndarray] | ValueError | OSError]:
  """Reads clips and splits long ones.

  Args:
    audio: paths, bytes of audio files, or float arrays [samples] at the model's sample rate in
      [-1, 1].
    config: the model, whose limits the clips must fit.
    chunk_length_s: longest chunk, seconds; longer clips are split at pauses. None: they are errors.

  Returns:
    For each clip its chunks, float32 [samples], or the error that names the clip: missing,
    undecodable, empty, silent, not finite or too long.

  Raises:
    ValueError: for a chunk_length_s out of range.
  """
  lengths = None if chunk_length_s is None else _piece_lengths(chunk_length_s, config)
  clips: list[list[np.ndarray] | ValueError | OSError] = []
  for index, clip in enumerate(audio):
    try:
      name = os.fsdecode(clip) if isinstance(clip, (str, os.PathLike)) else f"audio[{index}]"
      waveform_N = _read(clip, name, config)
      clips.append(_pieces(waveform_N, name, config, lengths=lengths))
    except (ValueError, OSError) as error:
      clips.append(error)
  return clips


def raise_first(clips: Sequence[Any]) -> None:
  """Raises the error of `load_clips`, or one error that lists all if there are several."""
  errors = [clip for clip in clips if isinstance(clip, Exception)]
  if len(errors) == 1:
    raise errors[0]
  if errors:
    said = "; ".join(str(error) for error in errors)
    raise ValueError(f"{len(errors)} of {len(clips)} audio files could not be used: {said}")


def _rate_hz(config: SpeechLLMConfig) -> int:
  return config.frontends[0].sample_rate_hz


def _piece_lengths(chunk_length_s: float, config: SpeechLLMConfig) -> tuple[int, int]:
  """Samples that the pieces of a long clip may have: (at least, at most)."""
  shortest, longest = max(SHORTEST_S, shortest_s(config)), config.max_audio_s
  if not 2 * shortest <= chunk_length_s <= longest:
    raise ValueError(
      f"chunk_length_s={chunk_length_s:g}: must be between {2 * shortest:g} and {longest:g} (the"
      " limit of this model) seconds"
    )
  return round(shortest * _rate_hz(config)), int(chunk_length_s * _rate_hz(config))


def _read(clip: Any, name: str, config: SpeechLLMConfig) -> np.ndarray:
  """One clip as float32 [samples] of a sensible range."""
  rate_hz = _rate_hz(config)
  if isinstance(clip, (str, os.PathLike, bytes)):
    name = f"{len(clip)} bytes of {name}" if isinstance(clip, bytes) else name
    return load_audio(clip, sample_rate_hz=rate_hz, channel=config.channel, name=name)
  if not isinstance(clip, np.ndarray):
    raise ValueError(
      f"{name}: {type(clip).__name__}; give a path, the bytes of a file, or a float array [samples]"
      f" in [-1, 1] at {rate_hz} Hz"
    )
  if clip.ndim != 1 or not np.issubdtype(clip.dtype, np.floating):
    raise ValueError(
      f"{name}: {clip.dtype} array of shape {clip.shape}; give float samples [samples] in"
      f" [-1, 1] at {rate_hz} Hz"
    )
  waveform_N = clip.astype(np.float32)
  if not np.isfinite(waveform_N).all():
    raise AudioError(f"{name}: holds NaN or infinite samples", "not finite")
  if (peak := np.abs(waveform_N).max(initial=0)) > LOUDEST:
    raise ValueError(f"{name}: samples up to {peak:.6g}; they must lie in [-1, 1]: divide them")
  return waveform_N


def _pieces(
  waveform_N: np.ndarray,
  name: str,
  config: SpeechLLMConfig,
  *,
  lengths: tuple[int, int] | None,
) -> list[np.ndarray]:
  """The clip if the model takes it as it is; where lengths are given, in such pieces."""
  rate_hz = _rate_hz(config)
  seconds = len(waveform_N) / rate_hz
  if not num_speech_tokens(len(config.filled_up(waveform_N)), config):
    least = f"this model needs {shortest_s(config):.3f} s"
    raise AudioError(f"{name}: {seconds:.3f} s is too short to hold speech; {least}", "too short")
  if np.abs(waveform_N).max(initial=0) < SILENCE:
    raise AudioError(f"{name}: silent (no sample above {SILENCE})", "silent")
  if lengths is not None:
    search, window = (round(length * rate_hz) for length in (SEARCH_S, PAUSE_S))
    return cut_at_pauses(
      waveform_N, shortest=lengths[0], longest=lengths[1], search=search, window=window
    )
  if seconds > (limit := config.max_audio_s):
    remedy = "give shorter ones"
    if limit >= 2 * max(SHORTEST_S, shortest_s(config)):
      remedy = f"--chunk-length-s {limit:g} (chunk_length_s={limit:g}) splits it at pauses"
    raise ValueError(f"{name}: {seconds:.1f} s, but this model takes at most {limit:g} s; {remedy}")
  return [waveform_N]


def cut_at_pauses(
  waveform_N: np.ndarray, *, longest: int, shortest: int, search: int, window: int
) -> list[np.ndarray]:
  """Cuts a long clip into pieces; joined again they are the clip, sample for sample.

  Each cut lies where the `window` samples around it hold the least energy, among the last `search`
  samples of what a piece may take; of equally quiet places, digital silence say, at the last one.

  Args:
    waveform_N: float [N].
    longest: samples that a piece may have.
    shortest: samples that a piece must have, unless the whole clip is shorter.
    search: samples before a piece's end among which a pause is looked for.
    window: samples over which energy is averaged.

  Returns:
    One view or more into the waveform, in order; the clip itself if it is no longer than `longest`.

  Raises:
    ValueError: if longest < 2 * shortest, for then not every length can be cut.
  """
  if longest < 2 * shortest or shortest < 1:
    raise ValueError(
      f"pieces of {shortest} to {longest} samples: the longest must have twice the shortest's"
    )
  pieces = []
  while len(waveform_N) > longest:
    last = min(longest, len(waveform_N) - shortest)
    first = max(shortest, last - search)
    cut = first + _quietest(waveform_N, first, last, window)
    pieces.append(waveform_N[:cut])
    waveform_N = waveform_N[cut:]
  return [*pieces, waveform_N]


def _quietest(waveform_N: np.ndarray, first: int, last: int, window: int) -> int:
  """The quietest place in first..last, counted from first."""
  half = max(1, window // 2)
  begin = max(0, first - half)
  near_N = waveform_N[begin : last + half].astype(np.float64)
  energy_N = np.concatenate([[0.0], np.cumsum(near_N**2)])
  places = np.arange(first, last + 1) - begin
  left, right = np.maximum(places - half, 0), np.minimum(places + half, len(near_N))
  mean = (energy_N[right] - energy_N[left]) / (right - left)
  return int(len(mean) - 1 - mean[::-1].argmin())
