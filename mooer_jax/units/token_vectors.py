"""Encoder frames of a data set, interpolated to one vector for each audio token."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mooer_jax import checkpoint, speech_llm, tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.config import SpeechLLMConfig, from_json, part_to_json
from mooer_jax.data.batches import input_padding
from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import PAUSE_S, load_features
from mooer_jax.data.readers import read, shard_names
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance
from mooer_jax.inputs import longest_clip
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.speech_llm import Batch

_BUCKETS = 4  # padded lengths, each half of the next; each is compiled once


class Rate(NamedTuple):
  """The samples that an audio token stands for, at a sample rate."""

  samples_per_token: int
  sample_rate_hz: int

  def num_tokens(self, samples: int) -> int:
    """Tokens of a clip of this many samples."""
    return -(-samples // self.samples_per_token)


@dataclasses.dataclass(frozen=True)
class UnitEncoder:
  """One encoder of a checkpoint, in float32.

  Attributes:
    model: the checkpoint's, with this encoder alone.
    params: its `frontend` and `encoders`, layers stacked.
    hash: of its config and weights.
    checkpoint: the opened checkpoint, without weights.
  """

  model: SpeechLLMConfig
  params: dict
  hash: str
  checkpoint: checkpoint.Checkpoint

  @classmethod
  def load(
    cls, path: str | Path, *, kind: str | None = None, base: str | Path | None = None
  ) -> "UnitEncoder":
    """Loads an encoder; nothing else of the checkpoint is read.

    Args:
      path: checkpoint of a speech LLM, or a run.
      kind: the encoder's kind; may be left out if there is only one.
      base: base of a fine-tune, if it has moved.

    Raises:
      FileNotFoundError, ValueError: for a folder that is not the checkpoint of a speech LLM, or
        does not have the encoder.
    """
    about = checkpoint.describe(checkpoint.find(path), base=base)
    if "connector" not in about.config:
      raise ValueError(
        f"{about.folder} holds a part of a speech LLM ({', '.join(about.config)}); name a"
        " checkpoint of training"
      )
    compute = ExecutionConfig(dtype="float32", scan=True)
    model = from_json(about.config, compute, path=about.folder / "config.json")
    kinds = [encoder.kind for encoder in model.encoders]
    if kind is None and len(kinds) > 1:
      raise ValueError(
        f"{about.folder} has several encoders; choose --encoder {' or '.join(kinds)}"
      )
    if kind is not None and kind not in kinds:
      raise ValueError(f"{about.folder} has no encoder {kind!r}, but {', '.join(kinds)}")
    number = kinds.index(kind) if kind else 0
    encoder, frontend = model.encoders[number], model.frontends[number]
    others = set(about.params) - {"frontend", "encoders"}
    loaded = checkpoint.load(about.folder, dtype="float32", base=base, without=others)
    params = {
      part: {encoder.kind: of[encoder.kind]}
      for part, of in loaded.params.items()
      if encoder.kind in of
    }
    described = [part_to_json(encoder), part_to_json(frontend), model.min_audio_s, model.channel]
    text = json.dumps([described, tree.digest(params)], sort_keys=True)
    return cls(
      model=model.replace(encoders=(encoder,), frontends=(frontend,), encoder_norm=False),
      params=tree.stack_layers(params),
      hash=hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
      checkpoint=about,
    )

  @property
  def kind(self) -> str:
    return self.model.encoders[0].kind

  @property
  def frame_s(self) -> float:
    """Time from one frame to the next, seconds."""
    (encoder,), (frontend,) = self.model.encoders, self.model.frontends
    step = (longest_clip(20, frontend) - longest_clip(10, frontend)) / 10  # samples
    frames = encoder.max_frames or 4800
    return step * frames / encoder.num_outputs(frames) / frontend.sample_rate_hz


def resample_frames(frames_TD: np.ndarray, positions_N: np.ndarray) -> np.ndarray:
  """Linear interpolation in time, float32 [N, D]; frames before the first and after the last hold.

  Args:
    frames_TD: at least one frame.
    positions_N: times in frames; frame t is at time t.
  """
  positions_N = np.clip(positions_N, 0, len(frames_TD) - 1)
  below_N = np.floor(positions_N).astype(int)
  above_N = np.minimum(below_N + 1, len(frames_TD) - 1)
  share_N1 = (positions_N - below_N)[:, None].astype(np.float32)
  return (1 - share_N1) * frames_TD[below_N] + share_N1 * frames_TD[above_N]


def token_vectors(
  source: str,
  encoder: UnitEncoder,
  rate: Rate,
  *,
  batch_size: int,
  skipped: Counter[str],
  prepare: Callable[[RawUtterance], RawUtterance | SkippedUtterance] = lambda raw: raw,
) -> Generator[tuple[RawUtterance, np.ndarray]]:
  """Yields the utterances of a data set in order, each with a vector for each of its audio tokens.

  The vector of a token is the interpolation of the frames at the middle of the token.

  Args:
    source: as data.shards.
    skipped: numbers of utterances without vectors by cause, which are added to.
    prepare: changes an utterance before its audio is read, or returns why it is skipped.

  Yields:
    (utterance without its audio, float32 [tokens, D]).

  Raises:
    FileNotFoundError, ValueError: for a source without data.
  """
  model = encoder.model
  config = _data_config(source, model, batch_size)
  pad = input_padding(config, model)
  encode = jax.jit(lambda params, batch: speech_llm.encode_each(params, batch, model))
  clips = _clips(config, model, rate, skipped, prepare)
  none_BS = np.zeros((batch_size, 0), np.int32)

  def started():
    while some := list(itertools.islice(clips, batch_size)):
      utterances, features, tokens = zip(*some, strict=True)
      padded, frames = pad(features)
      batch = Batch(padded, frames, none_BS, none_BS, none_BS)
      yield utterances, tokens, encode(encoder.params, batch)[encoder.kind]

  batches = started()
  current = next(batches, None)
  while current:
    utterances, tokens, result = current
    current = next(batches, None)  # is read while the device works on the previous one
    x_BTD, valid_BT = jax.device_get(result)
    for row, (raw, count) in enumerate(zip(utterances, tokens, strict=True)):
      frames_TD = x_BTD[row][valid_BT[row]]
      if not len(frames_TD):
        skipped["too short"] += 1
        continue
      middle_N = (np.arange(count) + 0.5) * rate.samples_per_token / rate.sample_rate_hz
      yield raw, resample_frames(frames_TD, middle_N / encoder.frame_s)


def _data_config(source: str, model: SpeechLLMConfig, batch_size: int) -> DataConfig:
  """Limits and buckets: all clips that the model takes."""
  longest = model.frontends[0].num_frames(int(model.max_audio_s * model.sample_rate_hz))
  buckets = sorted({math.ceil(longest / 2**n) for n in range(_BUCKETS)})
  return DataConfig(
    shards=source,
    batch_size=batch_size,
    shuffle_buffer_size=batch_size,
    buckets=tuple(buckets),
    min_s=0.0,
    max_s=model.max_audio_s,
  )


def _clips(
  config: DataConfig, model: SpeechLLMConfig, rate: Rate, skipped: Counter[str], prepare: Callable
) -> Iterator[tuple[RawUtterance, tuple[np.ndarray, ...], int]]:
  """(utterance without its audio, features, number of audio tokens) of each usable utterance."""
  keys: set[str] = set()
  for shard in shard_names(config.shards):
    for entry in read(shard):
      if isinstance(entry, RawUtterance):
        entry = entry.skip("duplicate key") if entry.key in keys else prepare(entry)
      raw = entry.load()
      found = raw if isinstance(raw, SkippedUtterance) else load_features(raw, config, model)
      if isinstance(found, SkippedUtterance):
        skipped[found.cause] += 1
        continue
      assert isinstance(raw, RawUtterance)
      keys.add(raw.key)
      samples = _num_samples(raw, found[1], model, rate.sample_rate_hz)
      bare = dataclasses.replace(raw, audio=b"", more=())
      yield bare, found[0], rate.num_tokens(samples)


def _num_samples(raw: RawUtterance, seconds: float, model: SpeechLLMConfig, rate_hz: int) -> int:
  """Samples of an utterance at the vocoder's rate, where it is `seconds` long at the model's.

  Clips are decoded again for another rate: resampling rounds the length, and a token too many or
  too few would not fit the waveform.
  """
  if rate_hz == model.sample_rate_hz:
    return round(seconds * rate_hz)
  lengths = [
    len(load_audio(clip, sample_rate_hz=rate_hz, channel=model.channel, name=raw.key))
    for clip in (raw.audio, *raw.more)
  ]
  return sum(lengths) + round(PAUSE_S * rate_hz) * len(raw.more)
