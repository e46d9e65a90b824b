"""Statistics of a data set: hours, lengths, languages, and buckets that fit."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mooer_jax import storage
from mooer_jax.audio.decode import AudioError, decode
from mooer_jax.data.filters import Filter
from mooer_jax.data.labels import Labels
from mooer_jax.data.readers import file_of, read, shard_names
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance
from mooer_jax.data.workers import run_in_processes

_TICKS = 100  # lengths are counted in hundredths of a second
_SHARES = (0.0, 0.01, 0.5, 0.99, 1.0)  # of the utterances, at which lengths are printed


@dataclasses.dataclass
class Stats:
  """Counts of a data set, or of a part of it.

  Attributes:
    lengths: number of utterances by length, in hundredths of a second, rounded up.
    texts: number of utterances without audio, which only tasks that take text can use.
    lengths_by: {field: {value: sum of lengths}} for the fields "language" and "task".
    skipped: number of utterances that cannot be used, by cause.
    examples: the first of them, by cause.
    left_out: number of utterances that the filter does not accept.
    speakers: values of the field "speaker".
  """

  shards: int = 0
  lengths: Counter[int] = dataclasses.field(default_factory=Counter)
  lengths_by: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
  texts: int = 0
  skipped: Counter[str] = dataclasses.field(default_factory=Counter)
  examples: dict[str, SkippedUtterance] = dataclasses.field(default_factory=dict)
  left_out: int = 0
  speakers: set[str] = dataclasses.field(default_factory=set)

  @property
  def utterances(self) -> int:
    return self.lengths.total()

  @property
  def seconds(self) -> float:
    return sum(ticks * count for ticks, count in self.lengths.items()) / _TICKS

  def add(self, other: "Stats") -> None:
    self.shards += other.shards
    self.lengths += other.lengths
    self.texts += other.texts
    self.skipped += other.skipped
    self.examples = {**other.examples, **self.examples}
    self.left_out += other.left_out
    self.speakers |= other.speakers
    for field, lengths in other.lengths_by.items():
      self.lengths_by.setdefault(field, Counter()).update(lengths)

  def length_at(self, share: float) -> float:
    """The length that a share of the utterances does not exceed, seconds."""
    ticks = np.array(sorted(self.lengths))
    below = np.cumsum([self.lengths[t] for t in ticks]) / self.utterances
    return float(ticks[np.searchsorted(below, share - 1e-12)]) / _TICKS

  def to_json(self) -> dict[str, Any]:
    return {
      "shards": self.shards,
      "utterances": self.utterances,
      "without_audio": self.texts,
      "hours": self.seconds / 3600,
      "speakers": len(self.speakers),
      "seconds": {str(share): self.length_at(share) for share in _SHARES} if self.lengths else {},
      "hours_by": {
        field: {value: ticks / _TICKS / 3600 for value, ticks in of.most_common()}
        for field, of in self.lengths_by.items()
      },
      "skipped": dict(self.skipped.most_common()),
      "left_out": self.left_out,
    }


def describe(stats: Stats, *, max_s: float) -> list[str]:
  """Lines of text about a data set, with its lengths as a bar chart; `max_s` as `data.max_s`."""
  lines = [
    f"{stats.utterances:,} utterances, {stats.seconds / 3600:,.2f} hours in {stats.shards:,} shards"
  ]
  if stats.texts:
    lines.append(f"without audio: {stats.texts:,} utterances more, for tasks that take text")
  if stats.left_out:
    lines.append(f"left out by the filter: {stats.left_out:,} utterances")
  if stats.skipped:
    counts = ", ".join(f"{cause} {number:,}" for cause, number in stats.skipped.most_common())
    lines.append(f"cannot be used: {stats.skipped.total():,} utterances ({counts})")
    for cause, _ in stats.skipped.most_common():
      one = stats.examples[cause]
      detail = f": {one.detail}" if one.detail else ""
      lines.append(f"  {cause}: for example {one.key or 'no key'} in {file_of(one.shard)}{detail}")
  if not stats.lengths:
    return lines
  if stats.speakers:
    lines.append(f"speakers: {len(stats.speakers):,}")
  for field, of in stats.lengths_by.items():
    hours = (f"{value} {ticks / _TICKS / 3600:,.2f}" for value, ticks in of.most_common())
    lines.append(f"hours by {field}: {', '.join(hours)}")
  shortest, low, median, high, longest = (f"{stats.length_at(share):g} s" for share in _SHARES)
  lines.append(f"lengths: {shortest} to {longest}, median {median}, 98 % from {low} to {high}")
  if too_long := sum(n for ticks, n in stats.lengths.items() if ticks > max_s * _TICKS):
    lines.append(
      f"longer than {max_s:g} s: {too_long:,} utterances, which training skips, or truncates with"
      " data.truncate=True"
    )
  return [*lines, *_bars(stats)]


def _bars(stats: Stats) -> list[str]:
  """A bar of hours for each of at most 15 intervals of lengths."""
  longest = stats.length_at(1.0)
  size_s = next((s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300) if longest <= 15 * s), 3600)
  hours: Counter[int] = Counter()
  for ticks, number in stats.lengths.items():
    hours[math.ceil(ticks / _TICKS / size_s - 1e-9) - 1] += number * ticks
  most = max(hours.values())
  return [
    f"up to {(row + 1) * size_s:6g} s {'█' * round(40 * hours[row] / most):40}"
    f" {hours[row] / _TICKS / 3600:,.2f} h"
    for row in range(max(hours) + 1)
  ]


def data_stats(
  source: str | Path,
  *,
  condition: str = "",
  labels: Labels | None = None,
  processes: int | None = None,
  progress: bool = False,
) -> Stats:
  """Reads all utterances of a data set and counts them.

  Audio is decoded, so that what training would skip is counted as such. Audio in files of its own
  is not opened if the utterance has a field "duration" or is a segment, which is then its length.

  Args:
    source: as `data.shards`.
    condition: as `data.filter`.
    labels: as `data.labels`; utterances without a usable label are counted as such.
    processes: shards read at a time; default: the number of CPUs.
    progress: whether to show a bar.

  Raises:
    FileNotFoundError, ValueError: for a source without data, or another syntax of the condition.
  """
  Filter(condition)
  names = shard_names(str(source))
  known = storage.sizes(names)
  sizes = [known.get(name, 1) for name in names]
  total = Stats()
  jobs = [(name, condition, labels) for name in names]
  for found in run_in_processes(
    shard_stats, jobs, processes=processes, progress="reading" if progress else "", sizes=sizes
  ):
    total.add(found)
  return total


def shard_stats(name: str, condition: str, labels: Labels | None = None) -> Stats:
  """The counts of one shard."""
  stats, wanted = Stats(shards=1), Filter(condition)
  for entry in read(name):
    selected = wanted.select(entry)
    if selected is None:
      stats.left_out += 1
      continue
    joined = selected
    if labels is not None and isinstance(selected, RawUtterance):
      joined = labels.join(selected, 0.0)
    if isinstance(joined, RawUtterance) and not joined.has_audio and joined.text.strip():
      stats.texts += 1
      continue
    seconds = _seconds(joined) if isinstance(joined, RawUtterance) else joined
    if isinstance(seconds, SkippedUtterance):
      stats.skipped[seconds.cause] += 1
      stats.examples.setdefault(seconds.cause, seconds)
      continue
    assert isinstance(selected, RawUtterance)
    ticks = math.ceil(seconds * _TICKS - 1e-6)
    stats.lengths[ticks] += 1
    fields = {"language": selected.about.get("language"), "task": selected.task}
    for field, value in fields.items():
      if value:
        stats.lengths_by.setdefault(field, Counter())[str(value)] += ticks
    if speaker := selected.about.get("speaker"):
      stats.speakers.add(str(speaker))
  return stats


def _seconds(raw: RawUtterance) -> float | SkippedUtterance:
  """The length of an utterance, or why training would skip it.

  Audio is decoded, as in training: the lengths in headers and labels are those of files before they
  were truncated. Only of audio in files of its own, which is not read yet, a label is believed.
  """
  if not raw.text.strip():
    return raw.skip("empty transcript")
  announced = raw.about.get("duration")
  not_read = raw.loader is not None
  if not_read and isinstance(announced, int | float) and 0 < announced < 1e9:
    return float(announced)
  loaded = raw.load()
  if isinstance(loaded, SkippedUtterance):
    return loaded
  seconds = 0.0
  for audio in (loaded.audio, *loaded.more):
    try:
      samples_NC, rate_hz = decode(audio, name=raw.key)
    except AudioError as error:
      return raw.skip(error.cause, str(error))
    seconds += len(samples_NC) / rate_hz
  return seconds


def suggest_buckets(stats: Stats, *, count: int, step_s: float, max_s: float) -> list[int]:
  """The lengths, in encoder input steps, that waste the least padding.

  Args:
    stats: of the data set.
    count: number of buckets, at most; each is compiled once.
    step_s: length of a step in seconds; MooER's encoder has 0.06.
    max_s: longest clip; longer ones are left out. It fits into the last bucket.

  Returns:
    Ascending lengths.
  """
  steps: Counter[int] = Counter()
  for ticks, number in stats.lengths.items():
    if ticks <= max_s * _TICKS:
      steps[max(1, math.ceil(ticks / _TICKS / step_s - 1e-9))] += number
  last = max(1, math.ceil(max_s / step_s - 1e-9))
  steps.setdefault(last, 0)
  lengths = np.array(sorted(steps))
  counts = np.cumsum([0] + [steps[length] for length in lengths])
  n = len(lengths)
  # best[j]: the least sum of padded lengths of the first j lengths, in the buckets so far or fewer.
  best = np.where(np.arange(n + 1) == 0, 0.0, np.inf)
  ends: list[np.ndarray] = []
  for _ in range(min(count, n)):
    table = np.full((n + 1, n + 1), np.inf)
    for j in range(1, n + 1):
      table[j, :j] = best[:j] + (counts[j] - counts[:j]) * lengths[j - 1]
    ends.append(table.argmin(axis=1))
    best = table.min(axis=1)
    best[0] = 0.0
  found, j = [], n
  for end in reversed(ends):
    if j == 0:
      break
    found.append(int(lengths[j - 1]))
    j = int(end[j])
  return found[::-1]


def padding_share(stats: Stats, buckets: list[int], *, step_s: float) -> float:
  """The share of padding in batches of these buckets, if each has clips of one bucket only."""
  padded, real = 0.0, 0.0
  for ticks, number in stats.lengths.items():
    steps = ticks / _TICKS / step_s
    if fits := [bucket for bucket in buckets if steps <= bucket + 1e-9]:
      padded += number * fits[0]
      real += number * steps
  return 1 - real / padded if padded else 0.0


def draw_lengths(stats: Stats, buckets: list[int], path: Path, *, step_s: float) -> None:
  """Draws the histogram of lengths, with the buckets, into a local file."""
  path = storage.local(path, "path")
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.4), layout="constrained")
  axes = figure.subplots()
  ticks = np.array(sorted(stats.lengths))
  weights = [stats.lengths[t] * t / _TICKS / 3600 for t in ticks]
  axes.hist(ticks / _TICKS, bins=min(60, len(ticks)), weights=weights)
  for number, bucket in enumerate(buckets):
    axes.axvline(
      bucket * step_s, color="C1", linewidth=1, label="data.buckets" if not number else None
    )
  axes.set(xlabel="length, seconds", ylabel="hours", title=f"{stats.seconds / 3600:,.1f} hours")
  axes.legend()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)
