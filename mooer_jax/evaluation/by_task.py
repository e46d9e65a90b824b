"""Answers to several tasks, scored each by itself: what is right, and what is an answer at all."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from mooer_jax.evaluation.answers import words
from mooer_jax.evaluation.score import ScoreConfig, score
from mooer_jax.evaluation.translation import bleu_of_task

# A task is taken for a choice among its references where there are so many different ones at most,
# and each comes twice on average.
FEW = 25


@dataclasses.dataclass(frozen=True)
class TaskScore:
  """How the answers to one task are.

  Attributes:
    count: utterances.
    not_decoded: those of them that have no answer; they count as wrong, all their words as lost.
    wer: errors in 100 words of the references, lower case and without punctuation; None where
      these have no words.
    accuracy: share of the answers that are the reference, word for word.
    following: share of the answers that are one of those that the task's references have, right
      or wrong; None where the references are too many to be a choice.
    bleu: of a task that translates, see `translation.TOKENIZERS`; None of others.
    bleu_notes: sacrebleu's signature, and what a reader should know before comparing it.
  """

  count: int
  not_decoded: int
  wer: float | None
  accuracy: float
  following: float | None
  bleu: float | None
  bleu_notes: str = ""


def score_by_task(
  tasks: Mapping[str, str], references: Mapping[str, str], hypotheses: Mapping[str, str]
) -> dict[str, TaskScore]:
  """Scores the answers of each task; an utterance without an answer counts as wrong, one without a
  reference is left out.

  Args:
    tasks: task by key.
    references: text by key.
    hypotheses: answer by key.
  """
  scores = {}
  for task in dict.fromkeys(tasks.values()):
    wanted = {
      key: " ".join(words(references[key]))
      for key, of in tasks.items()
      if of == task and key in references
    }
    if not wanted:
      continue
    given = {key: " ".join(words(hypotheses[key])) for key in wanted if key in hypotheses}
    all_given = {key: given.get(key, "") for key in wanted}
    rate = score(wanted, all_given, ScoreConfig(metric="word", space_mark="blank")).rate
    choices = set(wanted.values())
    follow = sum(text in choices for text in given.values()) / len(wanted)
    translated = bleu_of_task(
      task,
      {key: references[key] for key in wanted},
      {key: hypotheses.get(key, "") for key in wanted},
    )
    scores[task] = TaskScore(
      count=len(wanted),
      not_decoded=len(wanted) - len(given),
      wer=100 * rate if math.isfinite(rate) else None,
      accuracy=sum(given.get(key) == text for key, text in wanted.items()) / len(wanted),
      following=follow if len(choices) <= min(FEW, len(wanted) // 2) else None,
      bleu=translated.score if translated else None,
      bleu_notes="; ".join((translated.signature, *translated.notes)) if translated else "",
    )
  return scores


def table(scores: Mapping[str, TaskScore]) -> Table:
  """A row for each task."""
  made = Table("task", "utterances", "not decoded", "WER %", "accuracy %", "follows %", "BLEU")
  for task, s in scores.items():
    wer = "" if s.wer is None else f"{s.wer:.2f}"
    follows = "" if s.following is None else f"{100 * s.following:.1f}"
    bleu = "" if s.bleu is None else f"{s.bleu:.2f}"
    accuracy = f"{100 * s.accuracy:.1f}"
    made.add_row(task, str(s.count), str(s.not_decoded), wer, accuracy, follows, bleu)
  return made


def write(path: Path, scores: Mapping[str, TaskScore]) -> None:
  """Writes them as JSON."""
  rows = {task: dataclasses.asdict(s) for task, s in scores.items()}
  path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
