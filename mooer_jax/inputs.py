"""Waveforms to padded encoder inputs, for training, transcription and verification."""

import bisect
from collections.abc import Sequence

import numpy as np

from mooer_jax.audio.augment import NO_MASKS, Masks
from mooer_jax.audio.frontend import Frontend
from mooer_jax.config import SpeechLLMConfig


def extract_features(
  waveform_N: np.ndarray,
  config: SpeechLLMConfig,
  *,
  name: str = "waveform",
  masks: Masks = NO_MASKS,
) -> tuple[np.ndarray, ...]:
  """Compute the features of one clip in NumPy, unless the compiled program computes them.

  Args:
    waveform_N: float [samples] at the model's sample rate; silence is appended up to min_audio_s.
    config: the model; CMVN follows in its compiled step.
    name: name of the clip in errors.
    masks: parts of the spectrograms that SpecAugment hides; needs compute.features="host".

  Returns:
    Features, float32 [frames, features], for every encoder; with compute.features="device" the
    waveform, float32 [samples], which all encoders share.

  Raises:
    AudioError, ValueError: if the clip is empty, too short or longer than an encoder supports.
  """
  padded_N = config.pad_to_min_duration(waveform_N)
  if config.compute.features == "device":
    assert masks == NO_MASKS, "the compiled program computes the features"
    for frontend in config.frontends:
      frontend.check(padded_N, name=name)
    return (np.asarray(padded_N, np.float32),)
  return tuple(frontend.features(padded_N, name=name, masks=masks) for frontend in config.frontends)


def encoder_inputs(
  clips: Sequence[tuple[np.ndarray, ...]],
  *,
  rows: int | None = None,
  buckets: Sequence[tuple[int, ...]] | None = None,
  dtype=np.float32,
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
  """Pad the features, or waveforms, of clips to the smallest bucket that fits all of them.

  Args:
    clips: at least one clip, each from `extract_features`: [frames, features] for every encoder, or
      one waveform [samples].
    rows: number of rows; rows without a clip have 0 frames. Default: one row per clip.
    buckets: lengths in each bucket, in increasing order, from `padded_lengths`. Default: the
      lengths of the longest clip.
    dtype: dtype of the result.

  Returns:
    (features [rows, frames, features] or waveforms [rows, samples], valid frames or samples int32
    [rows]), each a tuple: `features` and `frames` of `speech_llm.Batch`.

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
    unit = "samples" if clips[0][0].ndim == 1 else "frames"
    raise ValueError(f"clips of {longest} {unit} do not fit into the largest bucket, {buckets[-1]}")
  sizes = zip(lengths, clips[0], strict=True)
  padded = tuple(np.zeros((rows, length, *x.shape[1:]), dtype) for length, x in sizes)
  frames = tuple(np.zeros(rows, np.int32) for _ in lengths)
  for row, clip in enumerate(clips):
    for x_BTF, frames_B, made_TF in zip(padded, frames, clip, strict=True):
      x_BTF[row, : len(made_TF)] = made_TF
      frames_B[row] = len(made_TF)
  return padded, frames


def padded_lengths(buckets: Sequence[int], config: SpeechLLMConfig) -> list[tuple[int, ...]]:
  """Lengths that inputs are padded to, for each bucket of frames of the first encoder.

  Returns:
    The number of frames for every encoder; with compute.features="device" the number of samples
    that makes them, so that each clip is in the same bucket.
  """
  if config.compute.features == "device":
    return [(longest_clip(bucket, config.frontends[0]),) for bucket in buckets]
  return [bucket_lengths(bucket, config.frontends) for bucket in buckets]


def bucket_lengths(bucket: int, frontends: Sequence[Frontend]) -> tuple[int, ...]:
  """Frames for every encoder of the longest clip with `bucket` frames for the first encoder."""
  if len(frontends) == 1:
    return (bucket,)
  samples = longest_clip(bucket, frontends[0])
  return (bucket, *(frontend.num_frames(samples) for frontend in frontends[1:]))


def longest_clip(bucket: int, frontend: Frontend) -> int:
  """Number of samples of the longest clip with at most `bucket` frames.

  At least 1: the first sample already makes two frames of Whisper, and the other encoders would get
  none.
  """
  return max(1, bisect.bisect_right(range(1 << 40), bucket, key=frontend.num_frames) - 1)
