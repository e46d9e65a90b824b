"""Clips as a user gives them: checked, and where it is wanted cut into pieces."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mooer_jax.audio.decode import SILENCE, AudioError, check_samples, load_audio
from mooer_jax.audio.pauses import cut_at_pauses
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.speech_llm import num_speech_tokens, shortest_s

# Where a long clip is cut: at the quietest 0.2 s of the last 5 s that a piece may have. Pieces of
# less than a second would hold little more than the end of a word.
PAUSE_S, SEARCH_S, SHORTEST_S = 0.2, 5.0, 1.0


def load_clips(
  audio: Sequence[str | os.PathLike | np.ndarray],
  config: SpeechLLMConfig,
  *,
  chunk_s: float | None = None,
) -> list[list[np.ndarray]]:
  """Reads all clips, or none.

  Args:
    audio: paths, or float arrays [samples] at the model's sample rate in [-1, 1].
    config: the model, and with it what it can hear.
    chunk_s: longest piece, seconds; longer clips are cut at pauses. None: they are an error.

  Returns:
    For each clip its pieces, float32 [samples].

  Raises:
    FileNotFoundError: for a missing file.
    ValueError: for an undecodable, empty, silent, non-finite or too long clip, by name; for a
      chunk_s out of range.
  """
  lengths = None if chunk_s is None else _piece_lengths(chunk_s, config)
  clips: list[list[np.ndarray]] = []
  errors: list[Exception] = []
  for index, clip in enumerate(audio):
    try:
      name = os.fspath(clip) if isinstance(clip, (str, os.PathLike)) else f"audio[{index}]"
      waveform_N = _read(clip, str(name), config)
      clips.append(_pieces(waveform_N, str(name), config, lengths=lengths))
    except (ValueError, OSError) as error:
      errors.append(error)
  if len(errors) == 1:
    raise errors[0]
  if errors:
    said = "; ".join(str(error) for error in errors)
    raise ValueError(f"{len(errors)} of {len(audio)} clips cannot be heard: {said}")
  return clips


def _rate_hz(config: SpeechLLMConfig) -> int:
  return config.frontends[0].sample_rate_hz


def _piece_lengths(chunk_s: float, config: SpeechLLMConfig) -> tuple[int, int]:
  """Samples that the pieces of a long clip may have: (at least, at most)."""
  shortest, longest = max(SHORTEST_S, shortest_s(config)), config.max_audio_s
  if not 2 * shortest <= chunk_s <= longest:
    raise ValueError(
      f"chunk_s={chunk_s:g}: {2 * shortest:g} to {longest:g} seconds are possible; this model"
      f" takes at most {longest:g} s"
    )
  return round(shortest * _rate_hz(config)), int(chunk_s * _rate_hz(config))


def _read(clip: Any, name: str, config: SpeechLLMConfig) -> np.ndarray:
  """One clip as float32 [samples] of a sensible range."""
  rate_hz = _rate_hz(config)
  if isinstance(clip, (str, os.PathLike)):
    return load_audio(clip, sample_rate_hz=rate_hz, channel=config.channel)
  if not isinstance(clip, np.ndarray):
    raise ValueError(
      f"{name}: {type(clip).__name__}; give a path, or a float array [samples] in [-1, 1]"
      f" at {rate_hz} Hz"
    )
  if clip.ndim != 1 or not np.issubdtype(clip.dtype, np.floating):
    raise ValueError(
      f"{name}: {clip.dtype} array of shape {clip.shape}; give float samples [samples] in"
      f" [-1, 1] at {rate_hz} Hz"
    )
  waveform_N = clip.astype(np.float32)
  check_samples(waveform_N, name)
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
      remedy = f"--chunk-s {limit:g} (chunk_s={limit:g}) cuts it at pauses"
    raise ValueError(f"{name}: {seconds:.1f} s, but this model takes at most {limit:g} s; {remedy}")
  return [waveform_N]
