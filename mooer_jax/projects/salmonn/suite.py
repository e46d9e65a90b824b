"""Evaluation on SALMONN's 15 tasks: decode, score and print one table."""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mooer_jax import checkpoint, hosts, storage
from mooer_jax.config import to_json
from mooer_jax.data.readers.annotation import entry_key, read_annotation
from mooer_jax.evaluation.text_files import read_text, write_text
from mooer_jax.files import read_json_object, replace_file, write_json
from mooer_jax.projects.salmonn import tasks
from mooer_jax.projects.salmonn.external_scores import judgement_sheet, read_judgements, read_scores
from mooer_jax.projects.salmonn.scorers import Row, Scored
from mooer_jax.projects.salmonn.tasks import ROWS, score_task
from mooer_jax.run.config import EvalConfig, Run
from mooer_jax.run.decoding import batches_of, decode_set, find_checkpoint, load, out_folder
from mooer_jax.run.process import prepare_process


def run_suite(
  annotations: str | Path,
  out: str | Path,
  decode: Callable[[Path], Mapping[str, str]],
  *,
  check: Callable[[Path], object] = lambda file: None,
  identity: str = "",
) -> dict[str, Scored | str]:
  """Decode and score every task that has an annotation file, and print the table.

  docs/salmonn.md describes the files. Tasks that have answers from an earlier run are only scored.

  Args:
    annotations: folder of the annotation files, named as in `tasks.ROWS`; other .json files in it
      are named in the output.
    out: folder for suite.json and suite.txt, written after each task; hypotheses/NAME.text; and the
      forms to_judge/NAME.json. NAME.scores.json and NAME.judgements.json (`external_scores`) are
      read from it if they exist.
    decode: returns the answers to an annotation file by key (`entry_key`), without clips that
      cannot be read.
    check: raises if `decode` would not accept an annotation file.
    identity: description of the checkpoint and the decoding options.

  Returns:
    The scores, or the reason why a task was not run, by name of the annotation file without .json.

  Raises:
    FileNotFoundError: if the folder of annotation files does not exist.
    ValueError: if it contains none of the files; if a file is invalid; if `out` contains answers
      with another identity or annotation, or scores without their answers.
  """
  annotations, out = Path(annotations), storage.local(out, "out")
  if not annotations.is_dir():
    raise FileNotFoundError(f"{annotations}: no such folder of annotation files")
  there = [row for row in ROWS if (annotations / row.file).is_file()]
  if not there:
    names = ", ".join(row.file for row in ROWS)
    raise ValueError(f"{annotations}: contains none of the suite's annotation files: {names}")
  unknown = _unknown(annotations, out)
  entries, sources = {}, {}
  for row in there:  # all files are checked before hours of decoding
    file = annotations / row.file
    check(file)
    entries[row] = _checked_entries(file, row)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    sources[row] = {"annotation_sha256": digest, "identity": identity}
    _hypotheses(out, row, sources[row])
    _external(out, row)

  results: dict[str, Scored | str] = {
    row.stem: "not run yet" if row in there else f"no {row.file}" for row in ROWS
  }
  for row in there:
    decoded = hosts.on_first(functools.partial(_hypotheses, out, row, sources[row]))
    if decoded is None:
      answers = decode(annotations / row.file)
      new = {"entries": entries[row], "answers": answers}
      decoded = hosts.on_first(functools.partial(_keep, out, row, sources[row], **new))
    results[row.stem] = score_task(row, entries[row], decoded, **_external(out, row))
    if not hosts.is_first():
      continue
    if row.judged:
      sheet = judgement_sheet(entries[row], decoded, row.judged)
      write_json(out / "to_judge" / row.file, sheet)
    _report(out, results, unknown=unknown, identity=identity)
  if hosts.is_first():
    print((out / "suite.txt").read_text("utf-8"), end="")
  return results


def _checked_entries(path: Path, row: Row) -> dict[str, dict[str, Any]]:
  """Entries by key; to check the references, they are scored as their own hypotheses."""
  listed = read_annotation(str(path))
  entries = {entry_key(number, entry): entry for number, entry in enumerate(listed)}
  score_task(row, entries, {key: entry["text"] for key, entry in entries.items()})
  return entries


def _hypotheses(out: Path, row: Row, source: Mapping[str, str]) -> dict[str, str] | None:
  """Answers of an earlier run from the same source, or None."""
  record = out / "hypotheses" / row.file
  text = record.with_suffix(".text")
  if record.is_file() and text.is_file():
    if (left := read_json_object(record)) != source:
      raise ValueError(
        f"{text}: these answers come from {left}, not {source}; remove the file, or choose another"
        " folder"
      )
    return read_text(text)
  for given in (out / row.scores_file, out / row.judgements_file):
    if given.is_file():
      raise ValueError(f"{given}: belongs to answers that no longer exist; remove the file")
  return None


def _keep(out: Path, row: Row, source, *, entries, answers) -> dict[str, str]:
  """Writes new answers and returns them as they are read back."""
  if foreign := [key for key in answers if key not in entries]:
    raise ValueError(
      f"{row.file}: {len(foreign)} answers belong to no entry, first {foreign[0]!r}; entries have"
      f" keys such as {next(iter(entries))!r}"
    )
  record = out / "hypotheses" / row.file
  text = record.with_suffix(".text")
  record.unlink(missing_ok=True)  # marks complete answers, so it is written last
  write_text(text, answers)
  write_json(record, source)
  return read_text(text)


def _external(out: Path, row: Row) -> dict[str, Any]:
  scores, judgements = out / row.scores_file, out / row.judgements_file
  found: dict[str, Any] = {}
  if row.external and scores.is_file():
    found["scores"] = read_scores(scores, row.metrics)
  if row.judged and judgements.is_file():
    found["judgements"] = read_judgements(judgements)
  return found


def _unknown(annotations: Path, out: Path) -> list[str]:
  """Names of .json files that are not read, with a hint for misplaced ones."""
  listed = {row.file for row in ROWS}
  given = {row.scores_file for row in ROWS if row.external}
  given |= {row.judgements_file for row in ROWS if row.judged}
  ours, found = {"suite.json", *given}, []
  if annotations.resolve() == out.resolve():
    ours |= listed
  else:
    other = [path for path in sorted(annotations.glob("*.json")) if path.name not in listed]
    found = [f"{path} (belongs in {out})" if path.name in given else str(path) for path in other]
  return found + [str(path) for path in sorted(out.glob("*.json")) if path.name not in ours]


def _report(out: Path, results: tasks.Results, *, unknown: list[str], identity: str):
  scores = [tasks.as_dict(row, results[row.stem]) for row in ROWS]
  content = {"identity": identity, "unknown_files": unknown, "tasks": scores}
  write_json(out / "suite.json", content, allow_nan=False)
  text = io.StringIO()
  Console(file=text, width=160).print(tasks.table(ROWS, results))
  lines = tasks.notes(ROWS, results) + [f"not read: {name}" for name in unknown]
  with replace_file(out / "suite.txt") as beside:
    beside.write_text(text.getvalue() + "".join(f"{n}\n" for n in lines), encoding="utf-8")


def evaluate_suite(
  run: Run, path: str, annotations: str, *, base: str | None = None
) -> dict[str, Scored | str]:
  """Run `eval.py --suite=salmonn`: `run_suite` with arguments and errors of `evaluate.evaluate`."""
  prepare_process()
  options = run.eval
  folder = find_checkpoint(path, options)
  out = out_folder(options, folder, "salmonn")
  loaded = load(run, folder, base, lora_scale=options.lora_scale)

  def of_file(file: Path) -> EvalConfig:
    return dataclasses.replace(options, shards=str(file), task="")

  def check(file: Path):
    if lacking := [n for n, e in enumerate(read_annotation(str(file))) if not e.get("task")]:
      raise ValueError(
        f"{file}: annotation[{lacking[0]}] and {len(lacking) - 1} others have no task; add the"
        ' field "task" to each'
      )
    batches_of(run, of_file(file), loaded)

  def decode(file: Path) -> dict[str, str]:
    decoded = decode_set(run, of_file(file), loaded)
    for s in decoded.skipped:
      hosts.say(f"{file.name}: not decoded: {s.key}: {s.cause} {s.detail}")
    return decoded.hypotheses

  model_json = json.dumps(to_json(loaded.model), sort_keys=True, ensure_ascii=False)
  of = [checkpoint.describe(folder, base=base).hash, loaded.generation, model_json]
  of += [loaded.model.compute.dtype, options.lora_scale, options.max_s, options.truncate]
  return run_suite(annotations, out, decode, check=check, identity=" ".join(map(str, of)))
