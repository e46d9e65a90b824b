"""Waveforms to padded encoder inputs, for training, transcription and verification."""

import bisect
from collections.abc import Sequence

import numpy as np

from mooer_jax.audio.frontend import Frontend
from mooer_jax.config import SpeechLLMConfig


def extract_features(
  waveform_N: np.ndarray, config: SpeechLLMConfig, *, name: str = "waveform"
) -> tuple[np.ndarray, ...]:
  """Compute the features of one clip for each encoder in NumPy: float32 [frames, features].

  Args:
    waveform_N: float [samples] at the model's sample rate; silence is appended up to min_audio_s.
    config: the model; CMVN follows in its compiled step.
    name: name of the clip in errors.

  Raises:
    AudioError, ValueError: if the clip is empty, too short or longer than an encoder supports.
  """
  padded_N = config.pad_to_min_duration(waveform_N)
  return tuple(frontend.features(padded_N, name=name) for frontend in config.frontends)


def encoder_inputs(
  clips: Sequence[tuple[np.ndarray, ...]],
  *,
  rows: int | None = None,
  buckets: Sequence[tuple[int, ...]] | None = None,
  dtype=np.float32,
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
  """Pad the features of clips to the smallest bucket that fits all of them.

  Args:
    clips: at least one clip, each with [frames, features] for every encoder.
    rows: number of rows; rows without a clip have 0 frames. Default: one row per clip.
    buckets: number of frames for every encoder in each bucket, in increasing order. Default: the
      lengths of the longest clip.
    dtype: dtype of the result.

  Returns:
    (features [rows, frames, features], valid frames int32 [rows]), each a tuple over encoders:
    `features` and `frames` of `speech_llm.Batch`.

  Raises:
    ValueError: if a clip is longer than the last bucket, or there are more clips than rows.
  """
  rows = len(clips) if rows is None else rows
  if not 0 < len(clips) <= rows:
    raise ValueError(f"{len(clips)} clips for {rows} rows; give 1 to {rows} clips")
  longest = tuple(max(map(len, stream)) for stream in zip(*clips, strict=True))
  buckets = buckets or [longest]
  fitting = (b for b in buckets if all(n <= m for n, m in zip(longest, b, strict=True)))
  lengths = next(fitting, None)
  if lengths is None:
    raise ValueError(f"clips of {longest} frames do not fit into the largest bucket, {buckets[-1]}")
  sizes = zip(lengths, clips[0], strict=True)
  padded = tuple(np.zeros((rows, length, x_TF.shape[1]), dtype) for length, x_TF in sizes)
  frames = tuple(np.zeros(rows, np.int32) for _ in lengths)
  for row, clip in enumerate(clips):
    for x_BTF, frames_B, made_TF in zip(padded, frames, clip, strict=True):
      x_BTF[row, : len(made_TF)] = made_TF
      frames_B[row] = len(made_TF)
  return padded, frames


def bucket_lengths(bucket: int, frontends: Sequence[Frontend]) -> tuple[int, ...]:
  """Frames for every encoder of the longest clip with `bucket` frames for the first encoder."""
  if len(frontends) == 1:
    return (bucket,)
  # The largest number of samples that gives at most `bucket` frames. At least 1: the first sample
  # already makes two frames of Whisper, and the other encoders would get none.
  samples = max(1, bisect.bisect_right(range(1 << 40), bucket, key=frontends[0].num_frames) - 1)
  return (bucket, *(frontend.num_frames(samples) for frontend in frontends[1:]))
