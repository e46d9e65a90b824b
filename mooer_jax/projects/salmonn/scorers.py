"""Scorers of SALMONN's evaluation tasks, one function for each kind of task.

`tasks.score_task` adds the number of entries to the result of a scorer.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mooer_jax.evaluation import answer_matching
from mooer_jax.evaluation.error_rate import ScoreConfig, score
from mooer_jax.evaluation.translation import bleu, bleu_of_task
from mooer_jax.projects.salmonn.external_scores import judged_share

_TOKEN = re.compile(r"[a-z0-9]+")


# The package rouge-score would bring nltk, whose import takes two seconds, and is not faster.
def rouge_l(reference: str, hypothesis: str) -> float:
  """F-measure of the longest common subsequence of words, 0 to 1; 0 if either has no words.

  Words are runs of a-z and 0-9 in lower case, without stemming; precision and recall have the same
  weight. The values are those of Google's package rouge-score.

  Source: Lin (2004), "ROUGE: a package for automatic evaluation of summaries".
  """
  wanted, given = _TOKEN.findall(reference.lower()), _TOKEN.findall(hypothesis.lower())
  given_H = np.array(given, str)
  common = np.zeros(len(given) + 1, np.int32)  # longest common subsequence with every prefix
  for token in wanted:
    common[1:] = np.maximum(common[1:], common[:-1] + (given_H == token))
    common = np.maximum.accumulate(common)
  return 2 * float(common[-1]) / (len(wanted) + len(given)) if common[-1] else 0.0


@dataclasses.dataclass(frozen=True)
class Scored:
  """Scores of a task.

  Attributes:
    values: one for each metric of the row, in its unit; None if it is unknown.
    following_rate: share of the answers that follow the instruction; None if it is unknown or not
      part of the task.
    count: number of entries, those without an answer included.
    notes: reasons for None, and how the other values were computed.
  """

  values: tuple[float | None, ...]
  following_rate: float | None = None
  count: int = 0
  notes: tuple[str, ...] = ()


Entries = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
  """One test set of the suite.

  Attributes:
    level: 1 trained, 2 untrained on speech, 3 untrained on audio.
    task: name of the prompt in SALMONN's prompt and annotation files.
    stem: name of the annotation file without .json.
    figures: (metric, published score without, with activation tuning); rates and scores are in %,
      accuracy is a fraction, diversity a number of words.
    following: published following rates, without and with, if there are any.
    judged: fields of a judgement: "follows", "correct".
    external: whether the metrics are read from the scores of a public tool.
  """

  level: int
  name: str
  task: str
  stem: str
  scorer: Callable[["Case"], Scored]
  figures: tuple[tuple[str, float, float], ...]
  following: tuple[float, float] | None = None
  judged: tuple[str, ...] = ()
  external: bool = False

  @property
  def metrics(self) -> list[str]:
    return [metric for metric, *_ in self.figures]

  @property
  def file(self) -> str:
    return f"{self.stem}.json"

  @property
  def scores_file(self) -> str:
    return f"{self.stem}.scores.json"

  @property
  def judgements_file(self) -> str:
    return f"{self.stem}.judgements.json"

  @property
  def higher_is_better(self) -> bool:
    return self.metrics[0] not in ("WER", "PER")


@dataclasses.dataclass(frozen=True)
class Case:
  """The arguments of `tasks.score_task`, with at least one hypothesis."""

  row: Row
  entries: Entries
  hypotheses: Mapping[str, str]
  scores: Mapping[str, float] | None = None
  judgements: Entries | None = None

  @functools.cached_property
  def references(self) -> dict[str, str]:
    return {key: entry["text"] for key, entry in self.entries.items()}

  @functools.cached_property
  def answers(self) -> dict[str, str]:
    """The hypothesis of each entry; a missing one is empty."""
    return {key: self.hypotheses.get(key, "") for key in self.entries}

  @property
  def has_transcripts(self) -> bool:
    return all(entry.get("transcript") for entry in self.entries.values())

  def is_transcript(self, key: str) -> bool:
    """Whether the answer to an entry, which has a transcript, is merely that."""
    return answer_matching.is_transcript(self.answers[key], self.entries[key]["transcript"])

  def judged(self, field: str) -> tuple[float | None, str]:
    """(share of the entries that were judged true or None, reason for None)."""
    if self.judgements is None:
      return None, f"{field!r} needs {self.row.judgements_file}; fill in the form in to_judge/"
    return judged_share(self.judgements, field, [*self.entries], hypotheses=self.hypotheses)

  def following(self) -> tuple[float | None, str]:
    """(following rate or None, note): judged, else the share that is not a transcript."""
    if self.judgements is not None or not self.has_transcripts:
      return self.judged("follows")
    followed = sum(
      bool(answer_matching.words(answer)) and not self.is_transcript(key)
      for key, answer in self.answers.items()
    )
    return followed / len(self.entries), "follows: not empty and not a transcript"


def _normal(text: str) -> str:
  return " ".join(answer_matching.words(text))


def error_rate(
  case: Case,
  normal: Callable[[str], str] = _normal,
  note: str = "words in lower case without punctuation",
) -> Scored:
  references = {key: normal(text) for key, text in case.references.items()}
  answers = {key: normal(text) for key, text in case.answers.items()}
  result = score(references, answers, ScoreConfig(metric="word", space_mark="space"))
  if not math.isfinite(result.rate):
    return Scored((None,), notes=("the references have no tokens",))
  return Scored((100 * result.rate,), notes=(note, *result.notes))


phone_error_rate = functools.partial(
  error_rate, normal=str, note="phones as written, case-insensitive"
)


def translation(case: Case) -> Scored:
  result = bleu_of_task(case.row.task, case.references, case.answers)
  assert result is not None
  return Scored((result.score,), notes=(*result.notes, result.signature))


def music_description(case: Case) -> Scored:
  translated = bleu(case.references, case.answers)
  rouge = sum(rouge_l(text, case.answers[key]) for key, text in case.references.items())
  notes = (translated.signature, "ROUGE-L: F-measure, mean over the clips")
  return Scored((translated.score, 100 * rouge / len(case.entries)), notes=notes)


def from_tool(case: Case) -> Scored:
  if case.scores is None:
    note = f"score the answers with aac-metrics and write {case.row.scores_file}"
    return Scored((None,) * len(case.row.metrics), notes=(note,))
  values = tuple(100 * case.scores[name] for name in case.row.metrics)
  return Scored(values, notes=(f"read from {case.row.scores_file}",))


def class_accuracy(case: Case, forms: Mapping[str, Sequence[str]]) -> Scored:
  correct = unread = 0
  for key, text in case.references.items():
    wanted = answer_matching.named_class(text, forms)
    if wanted is None:
      raise ValueError(f"{case.row.file}: {key} has text={text!r}; allowed are {list(forms)}")
    given = answer_matching.named_class(case.answers[key], forms)
    correct += given == wanted
    unread += key in case.hypotheses and given is None
  note = f"{unread} answers name none or several of {', '.join(forms)} and count as wrong"
  return Scored((correct / len(case.entries),), notes=(note,) if unread else ())


# IEMOCAP's four classes, as usual with "excited" among the happy ones.
_EMOTIONS = {
  "neutral": ("neutral", "neutrality", "calm"),
  "happy": ("happy", "happiness", "joy", "joyful", "excited", "excitement"),
  "sad": ("sad", "sadness"),
  "angry": ("angry", "anger"),
}
emotion_accuracy = functools.partial(class_accuracy, forms=_EMOTIONS)
yes_no_accuracy = functools.partial(class_accuracy, forms={"yes": ("yes",), "no": ("no",)})


def keyword_accuracy(case: Case) -> Scored:
  total = 0.0
  for key, text in case.references.items():
    try:
      total += answer_matching.keyword_accuracy(case.answers[key], text)
    except ValueError as error:
      raise ValueError(f"{case.row.file}: {key}: {error}") from error
  note = "share of three keywords that occur in the reference, word for word"
  return Scored((total / len(case.entries),), notes=(note,))


def judged_accuracy(case: Case) -> Scored:
  """Accuracy from judgements only, because answers are free text."""
  correct, why = case.judged("correct")
  following, note = case.following()
  return Scored((correct,), following, notes=(why, note))


def slot_accuracy(case: Case) -> Scored:
  """Accuracy from judgements, else by comparison with the value of the slot."""
  if case.judgements is not None:
    return judged_accuracy(case)
  # The transcript holds the value too, so a sentence counts only where it is told from one.
  tell = case.has_transcripts
  right = 0
  for key, wanted in case.references.items():
    if not (value := answer_matching.words(wanted)):
      raise ValueError(
        f"{case.row.file}: {key} has text={wanted!r}; it must be the value of the slot"
      )
    if tell and not case.is_transcript(key):
      right += answer_matching.contains(case.answers[key], wanted)
    else:
      right += answer_matching.words(case.answers[key]) == value
  rule = (
    "correct: contains the value and is not a transcript"
    if tell
    else "correct: exactly the value; longer answers need `transcript` or judgements"
  )
  following, note = case.following()
  return Scored((right / len(case.entries),), following, notes=(rule, note))


def diversity(case: Case) -> Scored:
  """Mean number of different words in an answer, SALMONN's diversity of a story."""
  following, why = case.judged("follows")
  total = sum(len(set(answer_matching.words(answer))) for answer in case.answers.values())
  return Scored((total / len(case.entries),), following, notes=(why,))
