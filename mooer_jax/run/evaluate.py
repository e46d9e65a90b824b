"""Evaluation of a checkpoint on a test set: decode, write the hypotheses, score them."""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from mooer_jax import hosts, storage
from mooer_jax.data.readers.annotation import is_annotation
from mooer_jax.evaluation import answer_matching, report
from mooer_jax.evaluation.error_rate import METRICS, Score, ScoreConfig, score
from mooer_jax.evaluation.text_files import read_text, write_text
from mooer_jax.evaluation.translation import Bleu, bleu_of_task
from mooer_jax.prompts import split_answer
from mooer_jax.run.config import EvalConfig, Run
from mooer_jax.run.decoding import decode_set, find_checkpoint, load, out_folder
from mooer_jax.run.process import prepare_process

_SHORT = {"mixed": "MooER", "character": "CER", "word": "WER"}


def evaluate(
  run: Run, path: str, *, base: str | None = None
) -> tuple[dict[str, Score], Bleu | None]:
  """Runs `eval.py`: writes `text`, report.json, report.txt.

  Each process decodes its share of the test set, and the first one writes.

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
  folder = find_checkpoint(path, options)
  options.require_shards()
  shards = Path(storage.absolute(options.shards))
  folder_name = shards.name if storage.is_folder(options.shards) else shards.parent.name
  name = f"{folder_name}-{shards.stem}" if is_annotation(shards) else folder_name
  out = out_folder(options, folder, name)
  references = _given_references(options, out)  # before minutes of work, since it may raise
  start = time.perf_counter()
  decoded = decode_set(run, options, load(run, folder, base, lora_scale=options.lora_scale))
  seconds = time.perf_counter() - start
  if decoded.skipped and not decoded.hypotheses:
    first = decoded.skipped[0]
    raise ValueError(
      f"none of {len(decoded.skipped)} utterances could be decoded; the first,"
      f" {first.key}: {first.cause} {first.detail}"
    )
  if hosts.is_first():
    write_text(out / "text", decoded.hypotheses)

  hypotheses = decoded.hypotheses
  references = decoded.transcripts if references is None else references
  missing, counted = "count", references
  if options.skip_missing:
    missing, counted = "skip", {key: references[key] for key in references if key in hypotheses}
  by_task = answer_matching.score_by_task(decoded.tasks, counted, hypotheses)
  translated = bleu_of_task(options.task, counted, hypotheses, tokenize=options.bleu_tokenize)
  expected, recognised = (_to_score(options.task, texts) for texts in (references, hypotheses))
  rules = ScoreConfig(missing=missing, space_mark=options.space_mark)
  scores = {m: score(expected, recognised, dataclasses.replace(rules, metric=m)) for m in METRICS}
  details = {
    "checkpoint": str(folder),
    "audio_seconds": round(decoded.audio_s, 2),
    "decode_seconds_with_compilation": round(seconds, 2),
    "rates": {m: s.rate if math.isfinite(s.rate) else None for m, s in scores.items()},
    "cut_off": len(decoded.unfinished),
    "not_decoded": [f"{s.key}: {s.cause}" for s in decoded.skipped],
    **({"bleu": dataclasses.asdict(translated)} if translated else {}),
  }
  if not hosts.is_first():
    return scores, translated
  report.write_report(out, scores[options.metric], name=options.shards, details=details)
  console = Console()
  (out / "tasks.json").unlink(missing_ok=True)  # of an earlier evaluation
  if by_task:
    answer_matching.write(out / "tasks.json", by_task)
    console.print(answer_matching.table(by_task))
  console.print(report.table({_SHORT[metric]: s for metric, s in scores.items()}))
  lines = [*dict.fromkeys(f"BLEU: {s.bleu_notes}" for s in by_task.values() if s.bleu_notes)]
  if translated:
    lines += [translated.details, translated.signature, *translated.notes]
  lines += [f"note: {note}" for note in scores[options.metric].notes]
  lines += [f"not decoded: {s.key}: {s.cause} {s.detail}" for s in decoded.skipped]
  lines += [f"hypotheses and reports in {out}"]
  console.print("\n".join(lines), markup=False, soft_wrap=True)
  return scores, translated


def _to_score(task: str, texts: Mapping[str, str]) -> dict[str, str]:
  """The transcripts in the texts; the texts themselves if the task has no transcript."""
  parts = {key: split_answer(task, text).transcript for key, text in texts.items()}
  return {key: texts[key] if part is None else part for key, part in parts.items()}


def _given_references(options: EvalConfig, out: Path) -> dict[str, str] | None:
  """References from a file; None if those in the shards apply."""
  beside = storage.join(storage.parent(options.shards), "text")
  if options.references:
    given = options.references
    try:
      storage.stat_file(given)
    except FileNotFoundError as error:
      raise FileNotFoundError(f"eval.references={given}: no such file") from error
  elif storage.is_file(beside) and not is_annotation(options.shards):
    given = beside
  else:
    return None
  if Path(given).resolve() == (out / "text").resolve():
    raise ValueError(
      f"{given} holds the references and would be overwritten by the hypotheses: set eval.out to"
      " another folder"
    )
  hosts.say(f"references: {given}")
  return read_text(given)
