"""Evaluation of a checkpoint on a test set: decode, write the hypotheses, score them."""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from mooer_jax import checkpoint
from mooer_jax.data.annotation import is_annotation
from mooer_jax.evaluation import report
from mooer_jax.evaluation.answer_matching import score_by_task
from mooer_jax.evaluation.answer_matching import table as task_table
from mooer_jax.evaluation.answer_matching import write as write_by_task
from mooer_jax.evaluation.error_rate import METRICS, Score, ScoreConfig, score
from mooer_jax.evaluation.text_files import read_text, write_text
from mooer_jax.evaluation.translation import Bleu, bleu_of_task
from mooer_jax.prompts import split_answer
from mooer_jax.run.config import EvalConfig, Run
from mooer_jax.run.decoding import decode_set, load, out_folder
from mooer_jax.run.process import prepare_process

_SHORT = {"mixed": "MooER", "character": "CER", "word": "WER"}


def evaluate(
  run: Run, path: str, *, base: str | None = None
) -> tuple[dict[str, Score], Bleu | None]:
  """Runs `eval.py`: writes `text`, report.json, report.txt.

  Args:
    run: the config; its `generation` overrides the options of the checkpoint.
    path: checkpoint folder, or training workdir.
    base: base checkpoint path of a fine-tune, if it has moved.

  Returns:
    (error rates by metric, BLEU if the task translates). For multitask texts of two lines, error
    rates are of the transcripts, BLEU is of the translations.

  Raises:
    FileNotFoundError, ValueError: for a bad config, checkpoint, test set or reference file.
  """
  prepare_process()
  options = run.eval
  folder = checkpoint.find(path)
  shards = Path(options.shards).absolute()
  out = out_folder(options, folder, _name(shards))
  references = _given_references(options, out)  # before minutes of work, since it may raise
  start = time.perf_counter()
  decoded = decode_set(run, options, load(run, folder, base))
  seconds = time.perf_counter() - start
  if decoded.skipped and not decoded.hypotheses:
    first = decoded.skipped[0]
    raise ValueError(
      f"none of {len(decoded.skipped)} utterances could be decoded; the first,"
      f" {first.key}: {first.cause} {first.detail}"
    )
  write_text(out / "text", decoded.hypotheses)

  references = decoded.transcripts if references is None else references
  counted = references
  if options.skip_missing:
    counted = {key: text for key, text in references.items() if key in decoded.hypotheses}
  by_task = score_by_task(decoded.tasks, counted, decoded.hypotheses)
  translated = bleu_of_task(
    options.task, counted, decoded.hypotheses, tokenize=options.bleu_tokenize
  )
  missing = "skip" if options.skip_missing else "count"
  scores = {
    metric: score(
      _to_score(options.task, references),
      _to_score(options.task, decoded.hypotheses),
      ScoreConfig(metric=metric, missing=missing, space_mark=options.space_mark),
    )
    for metric in METRICS
  }
  details = {
    "checkpoint": str(folder),
    "audio_seconds": round(decoded.audio_s, 2),
    "decode_seconds_with_compilation": round(seconds, 2),
    "rates": {m: s.rate if math.isfinite(s.rate) else None for m, s in scores.items()},
    "cut_off": len(decoded.unfinished),
    "not_decoded": [f"{s.key}: {s.cause}" for s in decoded.skipped],
    **({"bleu": dataclasses.asdict(translated)} if translated else {}),
  }
  report.write_report(out, scores[options.metric], name=options.shards, details=details)
  console = Console()
  (out / "tasks.json").unlink(missing_ok=True)  # of an earlier evaluation
  if by_task:
    write_by_task(out / "tasks.json", by_task)
    console.print(task_table(by_task))
    for note in dict.fromkeys(s.bleu_notes for s in by_task.values() if s.bleu_notes):
      console.print(f"BLEU: {note}", markup=False, soft_wrap=True)
  console.print(report.table({_SHORT[metric]: s for metric, s in scores.items()}))
  if translated:
    lines = (translated.details, translated.signature, *translated.notes)
    console.print("\n".join(lines), markup=False, soft_wrap=True)
  for note in scores[options.metric].notes:
    console.print(f"note: {note}", markup=False)
  for s in decoded.skipped:
    console.print(f"not decoded: {s.key}: {s.cause} {s.detail}", markup=False)
  console.print(f"hypotheses and reports in {out}", markup=False, soft_wrap=True)
  return scores, translated


def _name(shards: Path) -> str:
  folder = shards.parent.name
  return f"{folder}-{shards.stem}" if is_annotation(shards) else folder


def _to_score(task: str, texts: Mapping[str, str]) -> dict[str, str]:
  """The transcripts in the texts; the texts themselves if the task has no transcript."""
  parts = {key: split_answer(task, text).transcript for key, text in texts.items()}
  return {key: texts[key] if part is None else part for key, part in parts.items()}


def _given_references(options: EvalConfig, out: Path) -> dict[str, str] | None:
  """References from a file; None if those in the shards apply."""
  beside = Path(options.shards).with_name("text")
  if options.references:
    given = Path(options.references)
    if not given.is_file():
      raise FileNotFoundError(f"eval.references={given}: no such file")
  elif beside.is_file() and not is_annotation(options.shards):
    given = beside
  else:
    return None
  if given.resolve() == (out / "text").resolve():
    raise ValueError(
      f"{given} holds the references and would be overwritten by the hypotheses: set eval.out to"
      " another folder"
    )
  print(f"references: {given}")
  return read_text(given)
