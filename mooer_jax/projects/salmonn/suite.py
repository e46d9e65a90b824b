"""Evaluation on SALMONN's 15 tasks: decode, score and print one table."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mooer_jax import checkpoint
from mooer_jax.config import to_json
from mooer_jax.data.annotation import entry_key, read_annotation
from mooer_jax.evaluation.text_files import read_text, write_text
from mooer_jax.files import read_json_object, replace_file
from mooer_jax.projects.salmonn import tasks
from mooer_jax.projects.salmonn.external_scores import judgement_sheet, read_judgements, read_scores
from mooer_jax.projects.salmonn.scorers import Extras, Row, Scored
from mooer_jax.projects.salmonn.tasks import ROWS, score_task
from mooer_jax.run.config import EvalConfig, Run
from mooer_jax.run.decoding import batches_of, decode_set, load, out_folder
from mooer_jax.run.process import prepare_process

_GIVEN = (".scores.json", ".judgements.json")
_OURS = ("suite.json",)
_WIDTH = 160


def run_suite(
  annotations: str | Path,
  out: str | Path,
  decode: Callable[[Path], Mapping[str, str]],
  *,
  check: Callable[[Path], object] = lambda file: None,
  identity: str = "",
) -> dict[str, Scored | str]:
  """Decode and score every task that has an annotation file, and print the table.

  docs/salmonn.md describes the annotation files. Their names are those in `tasks.ROWS`. Tasks that
  have hypotheses from an earlier run are only scored.

  Files in `out`: suite.json and suite.txt, written after each task; hypotheses/NAME.text; the forms
  to_judge/NAME.json; and, read if they exist, NAME.scores.json and NAME.judgements.json
  (`external_scores`).

  Args:
    annotations: folder of the annotation files; other .json files in it are named in the output.
    out: output folder.
    decode: function that returns the answers to an annotation file by key (`entry_key`), without
      clips that cannot be read.
    check: function that raises if `decode` would not accept an annotation file.
    identity: description of the checkpoint and the decoding options. Answers with another identity
      are an error.

  Returns:
    The scores, or the reason why a task was not run, by name of the annotation file without .json.

  Raises:
    FileNotFoundError: if the folder of annotation files does not exist.
    ValueError: if it contains none of the files; if a file is invalid; if `out` contains answers
      with another identity or annotation, or scores without their answers.
  """
  annotations, out = Path(annotations), Path(out)
  if not annotations.is_dir():
    raise FileNotFoundError(f"{annotations}: no such folder of annotation files")
  there = [row for row in ROWS if (annotations / row.file).is_file()]
  if not there:
    names = ", ".join(row.file for row in ROWS)
    raise ValueError(f"{annotations}: contains none of the suite's annotation files: {names}")
  unknown = _unknown(annotations, out)
  # All files are checked before hours of decoding.
  for row in there:
    check(annotations / row.file)
  entries = {row.stem: _checked_entries(annotations / row.file, row) for row in there}
  sources = {row.stem: _source(annotations / row.file, identity) for row in there}
  for row in there:
    _hypotheses(out, row, sources[row.stem])
    _extras(out, row)

  results: dict[str, Scored | str] = {
    row.stem: "not run yet" if row in there else f"no {row.file}" for row in ROWS
  }
  for row in there:
    decoded = _hypotheses(out, row, sources[row.stem])
    if decoded is None:
      answers = decode(annotations / row.file)
      _check_keys(answers, entries[row.stem], row)
      decoded = _keep(out, row, sources[row.stem], answers)
    if row.judged:
      sheet = judgement_sheet(entries[row.stem], decoded, row.judged)
      _write_json(out / "to_judge" / row.file, sheet)
    results[row.stem] = score_task(row, entries[row.stem], decoded, _extras(out, row))
    _report(out, results, unknown, identity)
  print((out / "suite.txt").read_text("utf-8"), end="")
  return results


def _checked_entries(path: Path, row: Row) -> dict[str, dict[str, Any]]:
  """Entries by key; to check the references, they are scored as their own hypotheses."""
  listed = read_annotation(str(path))
  entries = {entry_key(number, entry): entry for number, entry in enumerate(listed)}
  score_task(row, entries, {key: entry["text"] for key, entry in entries.items()})
  return entries


def _source(path: Path, identity: str) -> dict[str, str]:
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return {"annotation_sha256": digest, "identity": identity}


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
  for ending in _GIVEN:
    if (given := out / f"{row.stem}{ending}").is_file():
      raise ValueError(f"{given}: belongs to answers that no longer exist; remove the file")
  return None


def _keep(out, row, source, answers) -> dict[str, str]:
  record = out / "hypotheses" / row.file
  text = record.with_suffix(".text")
  record.unlink(missing_ok=True)  # marks complete answers, so it is written last
  write_text(text, answers)
  _write_json(record, source)
  return read_text(text)


def _check_keys(hypotheses, entries, row) -> None:
  if foreign := [key for key in hypotheses if key not in entries]:
    raise ValueError(
      f"{row.file}: {len(foreign)} answers belong to no entry, first {foreign[0]!r}; entries have"
      f" keys such as {next(iter(entries))!r}"
    )


def _extras(out: Path, row: Row) -> Extras:
  scores, judgements = (out / f"{row.stem}{ending}" for ending in _GIVEN)
  return Extras(
    read_scores(scores, row.metrics) if row.external and scores.is_file() else None,
    read_judgements(judgements) if row.judged and judgements.is_file() else None,
  )


def _unknown(annotations: Path, out: Path) -> list[str]:
  """Names of .json files that are not read, with a hint for misplaced ones."""
  known = {row.file for row in ROWS}
  given = {f"{row.stem}.scores.json" for row in ROWS if row.external}
  given |= {f"{row.stem}.judgements.json" for row in ROWS if row.judged}
  found = []
  for path in sorted(annotations.glob("*.json")):
    if path.name not in known and annotations.resolve() != out.resolve():
      found.append(f"{path}" + (f" (belongs in {out})" if path.name in given else ""))
  for path in sorted(out.glob("*.json")):
    ours = {*_OURS, *given, *(known if annotations.resolve() == out.resolve() else ())}
    if path.name not in ours:
      found.append(str(path))
  return found


def _report(out: Path, results: dict[str, Scored | str], unknown: list[str], identity: str):
  content = {
    "identity": identity,
    "unknown_files": unknown,
    "tasks": tasks.as_dict(ROWS, results),
  }
  _write_json(out / "suite.json", content)
  text = io.StringIO()
  Console(file=text, width=_WIDTH).print(tasks.table(ROWS, results))
  lines = tasks.notes(ROWS, results) + [f"not read: {name}" for name in unknown]
  with replace_file(out / "suite.txt") as beside:
    notes = "".join(f"{line}\n" for line in lines)
    beside.write_text(text.getvalue() + notes, encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
  text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
  with replace_file(path) as beside:
    beside.write_text(text + "\n", encoding="utf-8")


def evaluate_suite(
  run: Run, path: str, annotations: str, *, base: str | None = None
) -> dict[str, Any]:
  """Run `eval.py --suite=salmonn`; see `run_suite` for the files and results.

  Args:
    run: the config; its `generation` overrides the options of the checkpoint.
    path: checkpoint folder, or training workdir.
    annotations: folder of the annotation files.
    base: base checkpoint of a fine-tune, if it has moved.

  Raises:
    FileNotFoundError, ValueError: for a bad config, checkpoint or annotation file.
  """
  prepare_process()
  folder = checkpoint.find(path)
  options = run.eval
  out = out_folder(options, folder, "salmonn")
  loaded = load(run, folder, base)

  def of_file(file: Path) -> EvalConfig:
    return dataclasses.replace(options, shards=str(file), task="")

  def check(file: Path):
    lacking = [n for n, e in enumerate(read_annotation(str(file))) if not e.get("task")]
    if lacking:
      raise ValueError(
        f"{file}: annotation[{lacking[0]}] and {len(lacking) - 1} others have no task; add the"
        ' field "task" to each'
      )
    batches_of(run, of_file(file), loaded)

  def decode(file: Path) -> dict[str, str]:
    decoded = decode_set(run, of_file(file), loaded)
    for s in decoded.skipped:
      print(f"{file.name}: not decoded: {s.key}: {s.cause} {s.detail}")
    return decoded.hypotheses

  model_json = json.dumps(to_json(loaded.model), sort_keys=True, ensure_ascii=False)
  of = [checkpoint.describe(folder, base=base).hash, loaded.generation, model_json]
  of += [loaded.model.compute.dtype, options.lora_scale, options.max_s, options.truncate]
  return run_suite(annotations, out, decode, check=check, identity=" ".join(map(str, of)))
