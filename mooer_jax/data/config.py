"""Data pipeline configuration."""

import dataclasses
import itertools
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the utterances come from and how they become batches.

  Attributes:
    shards: path of a `data.list`, one tar a line; relative tars are sought beside the list. Or a
      SALMONN annotation file (`.json`).
    task: which of the model's prompts the utterances are trained on; "" takes each utterance's own
      task, which the annotation or a `.json` in the shard names.
    task_weights: with task="", how often an utterance of a task is read in an epoch, on average; 1
      for tasks that are not named.
    prompts: file of prompts, {task: [prompts]}, from which one is drawn for each reading; "": the
      model's own, one for each task. In training the model gets tasks that it lacks from there,
      each with the first of its prompts.
    prompt_tokens: length in tokens that the side of a prompt with the question is padded to; needed
      where prompts take questions.
    batch_size: utterances a batch, for one process (host).
    buckets: lengths in encoder input steps (MooER: 60 ms each) that a batch is padded to,
      ascending; the longest must hold a clip of max_s.
    answer_buckets: lengths in tokens, eos included, that answers are padded to, ascending.
    min_s: shorter clips are skipped and counted, seconds (MooER: 0.2).
    max_s: longer clips are skipped and counted, seconds (MooER: 20).
    truncate: take the first max_s of longer clips instead, as SALMONN does.
    shuffle_buffer_size: utterances that are shuffled and sorted by length together; a multiple of
      batch_size.
      Memory is that of the features, for each worker: SAN-M 37 kB a second of audio in it, Whisper
      32 (of 128 bins 51), BEATs 51 more.
    seed: of the order of shards and of batches.
    cache_features: folder for the frames of frozen encoders, which are computed once, before
      training; "": in every step. A second of audio takes 20 to 130 kB (float16), BEATs 77 more;
      each clip as much as 30 s where Whisper's frames of silence are kept (trim=False).
    workers: worker processes that decode; each owns whole shards. 0: a thread of this process.
    prefetch: batches made ahead, for each worker.
    max_bad_share: the run stops once more than this share of the utterances read was skipped, or
      of the shards read in an epoch (two or more, or all of them) is damaged.
    tolerance: utterances read before max_bad_share is applied (or the end of the first epoch).
  """

  RENAMED: ClassVar = {"window": "shuffle_buffer_size", "cut_longer": "truncate"}
  shards: str
  task: str = "asr"
  task_weights: dict[str, float] = dataclasses.field(default_factory=dict)
  prompts: str = ""
  prompt_tokens: int = 0
  batch_size: int = 8
  buckets: tuple[int, ...] = (50, 100, 167, 250, 334)
  answer_buckets: tuple[int, ...] = (16, 32, 64, 128, 256)
  min_s: float = 0.2
  max_s: float = 20.0
  truncate: bool = False
  shuffle_buffer_size: int = 2048
  seed: int = 0
  cache_features: str = ""
  workers: int = 0
  prefetch: int = 4
  max_bad_share: float = 0.5
  tolerance: int = 100

  def __post_init__(self):
    for name in ("buckets", "answer_buckets"):
      value = getattr(self, name)
      if not value or value[0] < 1 or any(a >= b for a, b in itertools.pairwise(value)):
        raise ValueError(f"data.{name}={value}: give positive lengths in ascending order")
    for name, least in (("batch_size", 1), ("workers", 0), ("prefetch", 1), ("tolerance", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"data.{name}={getattr(self, name)}: must be at least {least}")
    multiple = max(1, self.shuffle_buffer_size // max(1, self.batch_size)) * self.batch_size
    if self.shuffle_buffer_size < 1 or self.shuffle_buffer_size % self.batch_size:
      raise ValueError(
        f"data.shuffle_buffer_size={self.shuffle_buffer_size} is not a positive multiple of"
        f" data.batch_size={self.batch_size}; set it to {multiple}"
      )
    if not 0 <= self.min_s < self.max_s:
      raise ValueError(f"data.min_s={self.min_s} and data.max_s={self.max_s}: want 0 <= min < max")
    if self.prompt_tokens < 0:
      raise ValueError(f"data.prompt_tokens={self.prompt_tokens}: must be at least 0")
    if self.task and self.task_weights:
      raise ValueError(
        f"data.task_weights={self.task_weights}, but all utterances are of data.task={self.task!r};"
        " set data.task=''"
      )
    for task, weight in self.task_weights.items():
      if not 0 <= weight < float("inf"):
        raise ValueError(f"data.task_weights.{task}={weight}: must be at least 0")
    if not 0 <= self.max_bad_share <= 1:
      raise ValueError(f"data.max_bad_share={self.max_bad_share}: must lie between 0 and 1")
