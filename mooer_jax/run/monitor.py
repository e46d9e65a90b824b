"""Records of a training run: progress line, metrics.jsonl, TensorBoard, loss curve."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mooer_jax.data.readers.entries import SkippedUtterance, in_order
from mooer_jax.files import replace_file
from mooer_jax.run.config import TrainConfig
from mooer_jax.run.feed import BatchSummary
from mooer_jax.training.step import describe_bad_step

_ESCAPED = "backslashreplace"  # of lone surrogates, which file names may have, the escape of JSON


class Evaluator(Protocol):
  """Measures a model every `every` optimizer steps, and the first and the last model."""

  every: int

  def lacks(self, step: int) -> bool:
    """Whether no earlier part of the run has measured this step."""

  def __call__(self, step: int, params: dict) -> tuple[dict[str, float], str]:
    """Measures the parameters after a step: (values for TensorBoard by name, line for the log)."""


class SkippedLog:
  """`skipped.jsonl` of a run: each skipped utterance, once for each cause, however many epochs."""

  def __init__(self, workdir: Path, *, first: int):
    """Keeps the lines of the first steps of the run."""
    self.path = workdir / "skipped.jsonl"
    self.names = {(row["shard"], row["key"], row["cause"]) for row in _keep_until(self.path, first)}

  def add(self, step: int, skipped: Sequence[SkippedUtterance]) -> None:
    """Appends the utterances that are new, in order."""
    for utterance in in_order(skipped):
      name = (utterance.shard, utterance.key, utterance.cause)
      if name not in self.names:
        self.names.add(name)
        line = {"step": step, **dataclasses.asdict(utterance)}
        with self.path.open("a", encoding="utf-8", errors=_ESCAPED) as file:
          file.write(json.dumps(line, ensure_ascii=False) + "\n")


class Monitor:
  """Records every step, prints every `log_every`; draws the loss curve when the run ends."""

  def __init__(self, workdir: Path, config: TrainConfig, *, first: int, tasks: Sequence[str] = ()):
    """Starts the records of a run, or continues them after the step `first`.

    `tasks` are those of the model, in the order of its prompts.
    """
    self._workdir, self._config, self._first, self._tasks = workdir, config, first, tuple(tasks)
    self._console = Console(stderr=True)
    self._progress = Progress(
      TextColumn("training"),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn("{task.fields[line]}"),
      TimeRemainingColumn(),
      console=self._console,
      disable=not self._console.is_terminal,
    )
    self._bar = self._progress.add_task("", total=config.steps, completed=first, line="compiling")
    workdir.mkdir(parents=True, exist_ok=True)
    self._metrics, self.skipped = workdir / "metrics.jsonl", SkippedLog(workdir, first=first)
    self._rows = _keep_until(self._metrics, first)
    # Since the last line:
    self._start, self._logged = time.perf_counter(), len(self._rows)
    self._task_sums = np.zeros((len(self._tasks), 3))
    self._waited_s = self._intervals_s = 0.0

  def __enter__(self) -> "Monitor":
    from tensorboardX import SummaryWriter

    self._metrics_file = self._metrics.open("a", encoding="utf-8", buffering=1)
    self._tensorboard = SummaryWriter(
      str(self._workdir / "tensorboard"), purge_step=self._first + 1
    )
    self._progress.start()
    return self

  def record(self, metrics: dict[str, jax.Array], batch: BatchSummary):
    """Records the metrics of a step and its batch."""
    values = jax.device_get(metrics)
    sums = values.pop("task_sums", None)
    row = {name: value.item() for name, value in values.items()}
    if not row["bad_steps"]:
      del row["bad_steps"]
    else:
      self.message(
        f"step {row['step']} skipped: {describe_bad_step(row)} (bad steps in a row:"
        f" {row['bad_steps']})"
      )
    if sums is not None and "bad_steps" not in row:
      self._task_sums += sums
      row["tasks"] = self._by_task(sums)
    row["audio_s"] = batch.audio_s
    if batch.num_truncated:
      row["truncated"] = batch.num_truncated
    self._waited_s += batch.waited_s
    self._intervals_s += batch.interval_s
    self._rows.append(row)
    self._metrics_file.write(json.dumps(row) + "\n")
    self.skipped.add(row["step"], batch.skipped)
    if row["step"] % self._config.log_every == 0 or row["step"] == self._config.steps:
      self._log(row)

  def _by_task(self, sums) -> dict[str, dict[str, float]]:
    """Loss per token and token accuracy of each task in the batches."""
    return {
      task: {"loss": loss / tokens, "accuracy": correct / tokens, "tokens": tokens}
      for task, (loss, tokens, correct) in zip(self._tasks, sums.tolist(), strict=True)
      if tokens
    }

  def _log(self, row):
    step, recent = row["step"], self._rows[self._logged :]
    audio_s = sum(row["audio_s"] for row in recent)
    # Not the time since the last line: steps are recorded late, the last two of a run at once.
    elapsed = self._intervals_s or time.perf_counter() - self._start
    rates = {
      "steps_per_s": len(recent) / elapsed,
      "audio_s_per_s": audio_s / elapsed,
      "data_wait_share": self._waited_s / elapsed,
    }
    tasks = self._by_task(self._task_sums)
    self._start, self._logged = time.perf_counter(), len(self._rows)
    self._task_sums[:], self._waited_s, self._intervals_s = 0, 0.0, 0.0
    by_task = {f"{name}/{task}": of[name] for task, of in tasks.items() for name in of}
    for name, value in {**row, **rates, **by_task}.items():
      if name not in ("step", "finite", "tasks"):
        self._tensorboard.add_scalar(f"train/{name}", value, step)
    line = (
      f"loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  lr {row['lr']:.2e}"
      f"  {rates['steps_per_s']:.2f} steps/s  {rates['audio_s_per_s']:.0f} audio-s/s"
      f"  data wait {rates['data_wait_share']:.0%}"
    )
    parts = [name for name in row if name.endswith("_loss") and name != "mean_loss"]
    line += "".join(f"  {name.removesuffix('_loss')} {row[name]:.3f}" for name in parts)
    if self.skipped.names:
      line += f"  skipped {len(self.skipped.names)}"
    if row.get("truncated"):
      line += f"  truncated {row['truncated']}"
    if tasks:
      said = (f"{task} {of['loss']:.3f}/{of['accuracy']:.3f}" for task, of in tasks.items())
      self.message(f"step {step}  loss/accuracy by task: {'  '.join(said)}")
    self._progress.update(self._bar, completed=step, line=line)
    if not self._console.is_terminal:
      self.message(f"step {step}/{self._config.steps}  {line}")

  def evaluate(self, evaluator: Evaluator, step: int, params: dict):
    """Runs an evaluator and records its result; its time does not count as training."""
    before = time.perf_counter()
    scalars, line = evaluator(step, params)
    self._start += time.perf_counter() - before
    for name, value in scalars.items():
      self._tensorboard.add_scalar(name, value, step)
    self.message(f"step {step}  {line}")

  def message(self, text: str):
    """Prints a line above the progress bar."""
    self._console.print(text, markup=False, highlight=False, soft_wrap=True)

  def __exit__(self, *error):
    self._progress.stop()
    for stream in (self._metrics_file, self._tensorboard):
      stream.close()
    if self.skipped.names:
      causes = Counter(cause for _, _, cause in self.skipped.names)
      counts = ", ".join(f"{cause}: {n}" for cause, n in causes.most_common())
      self.message(f"skipped utterances: {counts}; see {self.skipped.path}")
    # "cut" in runs of version 0.1
    if truncated := sum(row.get("truncated", row.get("cut", 0)) for row in self._rows):
      self.message(f"clips truncated to data.max_s, but not their transcripts: {truncated}")
    if self._rows:
      self.message(f"loss curve: {draw_curve(self._rows, self._workdir / 'loss.png')}")


class NoMonitor:
  """Records nothing: the `Monitor` of all processes but the first."""

  skipped: Any

  def __init__(self):
    self.skipped = self

  def __enter__(self) -> "NoMonitor":
    return self

  def __exit__(self, *error) -> None: ...

  def add(self, step: int, skipped: Sequence[SkippedUtterance]) -> None: ...

  def record(self, metrics: dict[str, jax.Array], batch: BatchSummary) -> None: ...

  def evaluate(self, evaluator: Evaluator, step: int, params: dict) -> None:
    evaluator(step, params)

  def message(self, text: str) -> None: ...


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
  """Drops the lines of later steps, which a resumed run repeats; returns the others."""
  if not path.exists():
    return []
  # The last line is empty, or torn when the run was killed; that was after the last checkpoint.
  *lines, _ = path.read_text("utf-8").split("\n")  # `splitlines` splits at U+2028 too
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      if row["step"] <= step:
        rows.append(row)
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{path}:{number}: damaged ({error}); restore the file, or move it away to begin a new one"
      ) from error
  with replace_file(path) as beside:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    beside.write_text(text, encoding="utf-8", errors=_ESCAPED)
  return rows


def draw_curve(rows: list[dict[str, Any]], path: Path) -> Path:
  """Draws loss and accuracy against the step: steps pale, their running mean strong."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 4), layout="constrained")
  left = figure.add_subplot()
  right = left.twinx()
  steps, window = [row["step"] for row in rows], max(1, len(rows) // 50)
  good = np.array(["bad_steps" not in row for row in rows])
  unit, judged = "nats per answer token", "token"
  if "mel_loss" in rows[-1]:
    unit, judged = "per segment", "discriminator"
  for axes, name, color, label in (
    (left, "loss", "tab:blue", f"loss ({unit})"),
    (right, "accuracy", "tab:orange", f"{judged} accuracy"),
  ):
    values = np.array([row[name] for row in rows])
    axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.35)
    if good.sum() >= window:
      means = np.convolve(values[good], np.ones(window) / window, mode="valid")
      axes.plot(np.array(steps)[good][window - 1 :], means, color=color, linewidth=1.5)
    axes.set_ylabel(label, color=color)
  left.set(xlabel="step", yscale="log")
  left.set_title(f"{len(rows)} steps, last loss {rows[-1]['loss']:.4f}")
  right.set_ylim(0, 1)
  figure.savefig(path, dpi=120)
  return path
