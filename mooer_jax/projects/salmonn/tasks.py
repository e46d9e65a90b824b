"""SALMONN's 15 evaluation tasks: test sets, metrics and published scores.

Where the paper does not define a metric, the functions in `evaluation.answer_matching` and the
notes of a result do.
Following rates and correctness of free text come from `external_scores`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mooer_jax.projects.salmonn import scorers
from mooer_jax.projects.salmonn.scorers import Case, Entries, Row, Scored


def score_task(
  row: Row,
  entries: Entries,
  hypotheses: Mapping[str, str],
  *,
  scores: Mapping[str, float] | None = None,
  judgements: Entries | None = None,
) -> Scored:
  """Score one task.

  Args:
    row: one of ROWS.
    entries: annotation entries by key: `text` is the reference, `Q` the question or slot name.
      `transcript`, if every entry has one, identifies answers that only transcribe.
    hypotheses: answers by key. A missing one counts as an empty answer.
    scores, judgements: `external_scores`, by metric and by key; None if there is no file.

  Raises:
    ValueError: if there are no entries, or an entry has another task or an impossible reference.
  """
  if not entries:
    raise ValueError(f"{row.file}: no entries to score")
  for key, entry in entries.items():
    if entry.get("task", row.task) != row.task:
      raise ValueError(
        f"{row.file}: {key} has task={entry['task']!r}; it must be {row.task!r}, because another"
        " prompt is another test"
      )
  missing = [key for key in entries if key not in hypotheses]
  if len(missing) == len(entries):
    nothing: tuple[None, ...] = (None,) * len(row.metrics)
    return Scored(nothing, count=len(entries), notes=("no entry has an answer",))
  notes = []
  if missing:
    notes.append(f"{len(missing)} of {len(entries)} entries have no answer, first {missing[0]}")
  scored = row.scorer(Case(row, entries, hypotheses, scores, judgements))
  notes = [note for note in dict.fromkeys((*notes, *scored.notes)) if note]
  return dataclasses.replace(scored, count=len(entries), notes=tuple(notes))


_JUDGED = ("follows", "correct")

# Figures: SALMONN (arXiv 2310.13289), table 3.
# fmt: off
ROWS = (
  Row(1, "ASR, LibriSpeech test-clean", "asr", "librispeech_test_clean", scorers.error_rate,
      (("WER", 2.1, 2.1),)),
  Row(1, "ASR, LibriSpeech test-other", "asr", "librispeech_test_other", scorers.error_rate,
      (("WER", 4.9, 4.9),)),
  Row(1, "ASR, GigaSpeech test", "asr", "gigaspeech_test", scorers.error_rate,
      (("WER", 9.1, 10.0),)),
  Row(1, "En→Zh, CoVoST2", "translation_ec", "covost2_en_zh", scorers.translation,
      (("BLEU4", 34.4, 33.1),)),
  Row(1, "audio captioning, AudioCaps", "audiocaption", "audiocaps", scorers.from_tool,
      (("METEOR", 25.6, 24.0), ("SPIDEr", 47.6, 40.3)), external=True),
  Row(1, "phone recognition, LibriSpeech", "phone_recognition", "librispeech_phones",
      scorers.phone_error_rate, (("PER", 4.2, 4.2),)),
  Row(1, "emotion recognition, IEMOCAP", "emotion_recognition", "iemocap",
      scorers.emotion_accuracy, (("accuracy", 0.63, 0.69),)),
  Row(1, "music captioning, MusicCaps", "music_description", "musiccaps",
      scorers.music_description, (("BLEU4", 3.5, 5.5), ("ROUGE-L", 22.1, 21.8))),
  Row(1, "overlapped speech, LibriMix", "speech_separation", "librimix", scorers.error_rate,
      (("WER", 20.7, 23.0),)),
  Row(1, "speaker verification, VoxCeleb1", "speaker_verification", "voxceleb1",
      scorers.yes_no_accuracy, (("accuracy", 0.93, 0.94),)),
  Row(2, "En→De, CoVoST2", "translation_en2de", "covost2_en_de", scorers.translation,
      (("BLEU4", 19.7, 18.6),)),
  Row(2, "En→Ja, CoVoST2", "translation_en2ja", "covost2_en_ja", scorers.translation,
      (("BLEU4", 22.0, 22.7),)),
  Row(2, "keyword extraction, Inspec", "keywords", "inspec", scorers.keyword_accuracy,
      (("accuracy", 0.30, 0.32),)),
  Row(2, "spoken question answering, WikiQA", "speech_query", "wikiqa", scorers.judged_accuracy,
      (("accuracy", 0.19, 0.41),), following=(0.29, 0.98), judged=_JUDGED),
  Row(2, "slot filling, SLURP", "slot_filling", "slurp", scorers.slot_accuracy,
      (("accuracy", 0.33, 0.41),), following=(0.77, 0.99), judged=_JUDGED),
  Row(3, "storytelling, AudioCaps", "audio_story_telling", "audiocaps_story", scorers.diversity,
      (("diversity", 7.77, 82.57),), following=(0.00, 1.00), judged=("follows",)),
  Row(3, "speech-audio co-reasoning", "speech_audio_coreasoning", "sac", scorers.judged_accuracy,
      (("accuracy", 0.02, 0.50),), following=(0.04, 0.73), judged=_JUDGED),
)
# fmt: on

# Scores of a task, or the reason why it was not run; by `Row.stem`.
Results = Mapping[str, Scored | str]


def table(rows: Sequence[Row], results: Results) -> Table:
  """Return a table with a line for each metric of each row.

  Following rates are in brackets. A dash marks a missing value, with the reason beside it if the
  task was not run, else in `notes`.
  """
  result = Table()
  for column in ("level", "task", "metric", "clips", "measured", "published", "activation-tuned"):
    result.add_column(column, justify="left" if column in ("task", "metric") else "right")
  for row in rows:
    for cells in _lines(row, results[row.stem]):
      result.add_row(*(Text(cell) for cell in cells))
  return result


def notes(rows: Sequence[Row], results: Results) -> list[str]:
  """Return the notes below the table, one line each, after the name of the task."""
  return [
    f"{row.name}: {note}"
    for row in rows
    if isinstance(scored := results[row.stem], Scored)
    for note in scored.notes
  ]


def as_dict(row: Row, result: Scored | str) -> dict[str, Any]:
  """Return a row of the table as JSON values; missing values are null."""
  scored = result if isinstance(result, Scored) else None
  values = scored.values if scored else (None,) * len(row.metrics)

  def beside(measured, before, after):
    return {"measured": measured, "published": before, "activation_tuned": after}

  figures = zip(row.figures, values, strict=True)
  followed = scored.following_rate if scored else None
  return {
    "name": row.name,
    "level": row.level,
    "task": row.task,
    "file": row.file,
    "not_run": None if scored else result,
    "count": scored.count if scored else None,
    "higher_is_better": row.higher_is_better,
    "metrics": {metric: beside(value, *published) for (metric, *published), value in figures},
    "following_rate": beside(followed, *row.following) if row.following else None,
    "notes": list(scored.notes) if scored else [],
  }


def _lines(row: Row, result: Scored | str) -> Iterator[tuple[str, ...]]:
  following = row.following or (None, None)
  for i, (metric, *published) in enumerate(row.figures):

    def shown(value: float | None, rate: float | None, metric=metric) -> str:
      decimals = 2 if metric in ("accuracy", "diversity") else 1
      text = "–" if value is None else f"{value:.{decimals}f}"
      return f"{text} ({'–' if rate is None else f'{rate:.2f}'})" if row.following else text

    count, measured = "–", f"– {result}"
    if isinstance(result, Scored):
      count, measured = f"{result.count:,}", shown(result.values[i], result.following_rate)
    first = (str(row.level), row.name) if i == 0 else ("", "")
    about = f"{metric} {'↑' if row.higher_is_better else '↓'}{' (following)' * bool(row.following)}"
    yield *first, about, count, measured, *map(shown, published, following)
