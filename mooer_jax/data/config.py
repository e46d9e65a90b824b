"""Data pipeline configuration."""

import dataclasses
import itertools
from typing import ClassVar

from mooer_jax.audio import speaker_mel
from mooer_jax.data.augment import AugmentConfig
from mooer_jax.data.filters import Filter
from mooer_jax.data.labels import MODES, SEPARATOR, check_options


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """A data set of a mixture.

  Attributes:
    shards: path, as data.shards.
    weight: share of the utterances of training, relative to the weights of the other data sets.
    task: with data.task="", task of all utterances of the data set; "": each utterance's own.
    filter: condition on the utterances of the data set, as data.filter, which it replaces.
    labels, labels_mode, labels_separator: other texts of the data set, as data.labels.
  """

  shards: str
  weight: float = 1.0
  task: str = ""
  filter: str = ""
  labels: str = ""
  labels_mode: str = MODES[0]
  labels_separator: str = SEPARATOR


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Data pipeline configuration.

  Attributes:
    shards: path of a `data.list`, one tar per line, relative to the list; of a raw list, one JSON
      object with "key", "wav" and "txt" per line; of a SALMONN annotation file (`.json`); of a
      folder, whose tars and recordings of Emilia-Pipe are found; or of the output folder of
      `mooer-jax data prepare`, which training reads in a random order of all utterances.
    mixture: data sets to train on in place of `shards`, by name; each has a weight.
    filter: condition on the fields that the data have for each utterance, such as "language == 'zh'
      and dnsmos >= 3.0 and 3 <= duration <= 20"; training reads those that satisfy it. "": all.
    augment: augmentation of training data; default: none.
    labels: file of `KEY text` lines, such as translations, that replace or join the transcripts;
      "": none. Utterances without a line are skipped and counted.
    labels_mode: "replace", "concat" (transcript, then label), "concat_r" (label, then transcript)
      or "instruction" (task asr, ast or asr_ast_mtl, sampled for each reading; needs task="").
    labels_separator: between transcript and label.
    target_audio: file of `KEY path` lines, the recordings of the answers, to train a vocoder with
      train.objective="vocoder"; paths are relative to the current folder. "": none.
    target_s: length of the segments of these recordings, seconds; rounded to audio tokens.
    voice_s: length of the part of a recording that gives the voice, seconds.
    task: task of all utterances; "": each utterance's own task, from the annotation or a `.json` in
      the shard.
    task_weights: with task="", mean number of readings of an utterance in an epoch, by task;
      default: 1.
    prompts: file of prompts, {task: [prompts]}, one of which is sampled for each reading; "": the
      model's own, one per task. Training adds its tasks to the model's, with their first prompts.
    prompt_tokens: length in tokens that the side of a prompt with the question is padded to;
      required for prompts with questions.
    batch_size: utterances per batch, over all processes (hosts).
    streams: number of streams, each with its own shards and its own rows of a batch. A run resumes
      exactly with any number of processes that divides it. 0: the number of processes.
    buckets: lengths in encoder input steps (MooER: 60 ms each) that batches are padded to,
      ascending; the longest must fit a clip of max_s.
    answer_buckets: lengths in tokens, including eos, that labels are padded to, ascending.
    min_s, max_s: limits of the length, seconds; other clips are skipped and counted.
    truncate: truncate longer clips to max_s instead, as SALMONN does.
    shuffle_buffer_size: utterances that are shuffled and sorted by length together; a multiple of
      batch_size. Memory for their features, per worker and second of audio: SAN-M 37 kB, Whisper
      32 kB (128 bins: 51), BEATs 51 kB more; with compute.features="device" 64 kB of waveform.
    seed: seed of the order of shards (of a prepared dataset: of utterances) and batches.
    cache_features: folder for the frames of frozen encoders, computed once before training; "":
      in every step. A second of audio takes 20 to 130 kB (float16), BEATs 77 more; each clip as
      much as 30 s if Whisper's frames of silence are kept (trim=False).
    workers: number of worker processes of each stream, each with its own shards; 0: a thread.
    prefetch: number of batches made ahead, per worker.
    max_bad_share: largest share of skipped utterances, and of damaged shards in an epoch (of two or
      more read, or of all), before the run stops.
    tolerance: utterances read before max_bad_share is applied, at most one epoch.
  """

  RENAMED: ClassVar = {"window": "shuffle_buffer_size", "cut_longer": "truncate"}
  shards: str = ""
  mixture: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
  filter: str = ""
  augment: AugmentConfig = AugmentConfig()
  labels: str = ""
  labels_mode: str = MODES[0]
  labels_separator: str = SEPARATOR
  target_audio: str = ""
  target_s: float = 0.4
  voice_s: float = 2.0
  task: str = "asr"
  task_weights: dict[str, float] = dataclasses.field(default_factory=dict)
  prompts: str = ""
  prompt_tokens: int = 0
  batch_size: int = 8
  streams: int = 0
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
    Filter(self.filter)
    check_options(
      self.labels, self.labels_mode, self.labels_separator,
      task=self.task, task_weights=self.task_weights,
    )  # fmt: skip
    self._check_mixture()
    self._check_target()
    for name in ("buckets", "answer_buckets"):
      value = getattr(self, name)
      if not value or value[0] < 1 or any(a >= b for a, b in itertools.pairwise(value)):
        raise ValueError(f"data.{name}={value}: give positive lengths in ascending order")
    least = {
      "batch_size": 1,
      "streams": 0,
      "workers": 0,
      "prefetch": 1,
      "tolerance": 1,
      "prompt_tokens": 0,
    }
    for name, value in least.items():
      if getattr(self, name) < value:
        raise ValueError(f"data.{name}={getattr(self, name)}: must be at least {value}")
    multiple = max(1, self.shuffle_buffer_size // self.batch_size) * self.batch_size
    if self.shuffle_buffer_size < 1 or self.shuffle_buffer_size % self.batch_size:
      raise ValueError(
        f"data.shuffle_buffer_size={self.shuffle_buffer_size} is not a positive multiple of"
        f" data.batch_size={self.batch_size}; set it to {multiple}"
      )
    if not 0 <= self.min_s < self.max_s:
      raise ValueError(
        f"data.min_s={self.min_s} and data.max_s={self.max_s}: must satisfy 0 <= min_s < max_s"
      )
    if self.task and self.task_weights:
      raise ValueError(
        f"data.task_weights={self.task_weights}, but all utterances are of data.task={self.task!r};"
        " set data.task=''"
      )
    for task, weight in self.task_weights.items():
      if not 0 <= weight < float("inf"):
        raise ValueError(f"data.task_weights.{task}={weight}: must be at least 0")
    if self.cache_features and self.augment != AugmentConfig():
      on = [f.name for f in dataclasses.fields(AugmentConfig)]
      on = [name for name in on if getattr(self.augment, name) != getattr(AugmentConfig, name)]
      raise ValueError(
        f"data.cache_features={self.cache_features!r} stores the frames of each clip once, but"
        f" data.augment.{on[0]} changes them in each epoch; set data.cache_features='', or leave"
        " data.augment out"
      )
    if not 0 <= self.max_bad_share <= 1:
      raise ValueError(f"data.max_bad_share={self.max_bad_share}: must be between 0 and 1")

  def _check_target(self) -> None:
    for name in ("target_s", "voice_s"):
      value = getattr(self, name)
      if not 0 < value < float("inf"):
        raise ValueError(f"data.{name}={value:g}: must be above 0 seconds")
    least_s = speaker_mel.MIN_SAMPLES / speaker_mel.SAMPLE_RATE_HZ
    if self.voice_s < least_s:
      raise ValueError(f"data.voice_s={self.voice_s:g}: must be at least {least_s:g} seconds")

  def _check_mixture(self) -> None:
    if self.mixture and self.shards:
      raise ValueError(
        f"data.shards={self.shards!r} and data.mixture ({', '.join(self.mixture)}) are both set;"
        " set data.shards='', or leave data.mixture out"
      )
    if self.filter and self.mixture and all(of.filter for of in self.mixture.values()):
      raise ValueError(
        f"data.filter={self.filter!r} has no effect, since every data set of data.mixture has a"
        " filter of its own; remove it"
      )
    if self.labels and self.mixture:
      raise ValueError(
        f"data.labels={self.labels!r} is for one data set, not for data.mixture; set the labels of"
        f" a data set of the mixture, such as data.mixture.{next(iter(self.mixture))}.labels"
      )
    for name, source in self.mixture.items():
      option = f"data.mixture.{name}"
      Filter(source.filter, f"{option}.filter")
      check_options(
        source.labels, source.labels_mode, source.labels_separator,
        task=source.task, task_weights=self.task_weights, option=option,
      )  # fmt: skip
      if source.labels_mode == "instruction" and self.task:
        raise ValueError(
          f"data.task={self.task!r} gives all utterances one prompt, but"
          f" {option}.labels_mode='instruction' samples their tasks; set data.task=''"
        )
      if not source.shards:
        raise ValueError(f"{option}.shards='': name a data.list, an annotation file or a folder")
      if not 0 < source.weight < float("inf"):
        raise ValueError(
          f"{option}.weight={source.weight}: must be above 0, or remove the data set"
        )
      if source.task and self.task:
        raise ValueError(
          f"{option}.task={source.task!r} has no effect, since all utterances are of data.task="
          f"{self.task!r}; set data.task=''"
        )
