"""Runs SALMONN's 15 tasks: decodes what annotation files are there, scores, prints one table."""

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
from mooer_jax.evaluation.text_files import read_text, replace_file, write_text
from mooer_jax.projects.salmonn import tasks
from mooer_jax.projects.salmonn.outside_scores import judgement_sheet, read_judgements, read_scores
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
  """Decodes and scores every task whose annotation file is there, and prints the table.

  Annotation files, each `{"annotation": [{"path", "text", "task", "Q"}, …]}`, are sought by the
  names in `salmonn_suite.ROWS`; docs/salmonn.md says what `text` and `Q` hold in each.

  Leaves in `out`: suite.json and suite.txt, after each task; hypotheses/NAME.text; the forms
  to_judge/NAME.json. Reads from `out`, since they belong to one model's answers:
  NAME.scores.json and NAME.judgements.json (see `outside_scores.py`). A second run decodes
  only tasks that have no hypotheses yet, and scores all.

  Args:
    annotations: folder of the annotation files; other .json files in it are named in the output.
    out: folder to write to.
    decode: answers by key (`annotation.entry_key`) for an annotation file; clips that cannot be
      read are left out.
    check: raises for an annotation file that `decode` would not take.
    identity: what the answers depend on, such as the checkpoint and the decoding options; answers
      of another one are not mixed with these.

  Returns:
    By name of the annotation file without .json: the result, or why it was not run.

  Raises:
    FileNotFoundError: if there is no such folder.
    ValueError: if none of the files is there; if a file is not of its kind; if `out` holds answers
      of another identity or annotation, or scores without their answers.
  """
  annotations, out = Path(annotations), Path(out)
  if not annotations.is_dir():
    raise FileNotFoundError(f"{annotations}: no such folder of annotation files")
  there = [row for row in ROWS if (annotations / row.file).is_file()]
  if not there:
    names = ", ".join(row.file for row in ROWS)
    raise ValueError(f"{annotations}: holds none of the suite's annotation files: {names}")
  unknown = _unknown(annotations, out)
  # Everything is read and checked before hours of decoding.
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
  """Entries by key; scoring the references themselves shows whether they can be scored."""
  listed = read_annotation(str(path))
  entries = {entry_key(number, entry): entry for number, entry in enumerate(listed)}
  score_task(row, entries, {key: entry["text"] for key, entry in entries.items()})
  return entries


def _source(path: Path, identity: str) -> dict[str, str]:
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return {"annotation_sha256": digest, "identity": identity}


def _hypotheses(out: Path, row: Row, source: Mapping[str, str]) -> dict[str, str] | None:
  """The answers that an earlier run left, None if there are none; others' are refused."""
  record = out / "hypotheses" / row.file
  text = record.with_suffix(".text")
  if record.is_file() and text.is_file():
    if (left := json.loads(record.read_text("utf-8"))) != source:
      raise ValueError(
        f"{text}: these answers are of {left}, not {source}; remove the file, or choose another"
        " folder"
      )
    return read_text(text)
  for ending in _GIVEN:
    if (given := out / f"{row.stem}{ending}").is_file():
      raise ValueError(f"{given}: belongs to answers that are no longer there; remove the file")
  return None


def _keep(out, row, source, answers) -> dict[str, str]:
  record = out / "hypotheses" / row.file
  text = record.with_suffix(".text")
  record.unlink(missing_ok=True)  # it says that the answers are complete, so it comes last
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
    read_scores(scores, row.metrics) if row.outside and scores.is_file() else None,
    read_judgements(judgements) if row.judged and judgements.is_file() else None,
  )


def _unknown(annotations: Path, out: Path) -> list[str]:
  """Names of .json files that nothing here reads, a hint beside misplaced ones."""
  known = {row.file for row in ROWS}
  given = {f"{row.stem}.scores.json" for row in ROWS if row.outside}
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
  replace_file(out / "suite.txt", text.getvalue() + "".join(f"{line}\n" for line in lines))


def _write_json(path: Path, content: Any) -> None:
  text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
  replace_file(path, text + "\n")


def evaluate_suite(
  run: Run, path: str, annotations: str, *, base: str | None = None
) -> dict[str, Any]:
  """Runs `eval.py --suite=salmonn`: see `projects.salmonn.suite.run_suite` for files and results.

  Args:
    run: the config; its `generation` overrides the options of the checkpoint.
    path: checkpoint folder, or training workdir.
    annotations: folder of the annotation files.
    base: where the base of a fine-tune lies, if it moved.

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
        f"{file}: annotation[{lacking[0]}] and {len(lacking) - 1} others name no task; give each"
        ' its "task"'
      )
    batches_of(run, of_file(file), loaded)

  def decode(file: Path) -> dict[str, str]:
    decoded = decode_set(run, of_file(file), loaded)
    for s in decoded.skipped:
      print(f"{file.name}: not decoded: {s.key}: {s.cause} {s.detail}")
    return decoded.hypotheses

  asked = json.dumps(to_json(loaded.model), sort_keys=True, ensure_ascii=False)
  of = [checkpoint.describe(folder, base=base).hash, loaded.generation, asked]
  of += [loaded.model.compute.dtype, options.lora_scale, options.max_s, options.cut_longer]
  return run_suite(annotations, out, decode, check=check, identity=" ".join(map(str, of)))
