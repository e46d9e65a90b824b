"""Scorers of SALMONN's evaluation tasks, one function for each kind of task.

A scorer takes a row of the suite, its annotation entries by key, the hypotheses by key (at least
one) and external scores. A missing hypothesis counts as an empty one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
  common = common_length(wanted, given)
  return 2 * common / (len(wanted) + len(given)) if common else 0.0


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
  """Length of the longest common subsequence, in O(len(first) * len(second)) time."""
  best = [0] * (len(second) + 1)
  for token in first:
    before = 0  # the entry to the left, one row up
    for j, other in enumerate(second, start=1):
      above = best[j]
      best[j] = before + 1 if token == other else max(above, best[j - 1])
      before = above
  return best[-1]


@dataclasses.dataclass(frozen=True)
class Extras:
  """External scores: a tool's by metric, judgements by key; None if there is no file."""

  scores: Mapping[str, float] | None = None
  judgements: Mapping[str, Mapping[str, Any]] | None = None


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
  following_rate: float | None
  count: int
  notes: tuple[str, ...]


Entries = Mapping[str, Mapping[str, Any]]
Scorer = Callable[["Row", Entries, Mapping[str, str], Extras], Scored]


@dataclasses.dataclass(frozen=True)
class Row:
  """One test set of the suite.

  Attributes:
    level: 1 trained, 2 untrained on speech, 3 untrained on audio.
    task: name of the prompt in SALMONN's prompt and annotation files.
    file: the annotation file.
    metrics: names; rates and scores are in %, accuracy is a fraction, diversity a number of words.
    before, after: published scores without and with activation tuning.
    following: published following rates, without and with, if there are any.
    judged: fields of a judgement: "follows", "correct".
    external: whether the metrics are read from the scores of a public tool.
  """

  level: int
  name: str
  task: str
  file: str
  metrics: tuple[str, ...]
  before: tuple[float, ...]
  after: tuple[float, ...]
  scorer: Scorer
  higher_is_better: bool = True
  following: tuple[float, float] | None = None
  judged: tuple[str, ...] = ()
  external: bool = False

  @property
  def stem(self) -> str:
    return self.file.removesuffix(".json")


def error_rate(row, entries, hypotheses, extras):
  del row, extras
  references = {key: _normal(entry["text"]) for key, entry in entries.items()}
  given = {key: _normal(text) for key, text in hypotheses.items()}
  note = "words in lower case without punctuation"
  return _rate(references, given, note)


def phone_error_rate(row, entries, hypotheses, extras):
  del row, extras
  references = {key: entry["text"] for key, entry in entries.items()}
  return _rate(references, hypotheses, "phones as written, case-insensitive")


def _rate(references, hypotheses, note):
  result = score(references, hypotheses, ScoreConfig(metric="word", space_mark="space"))
  if not math.isfinite(result.rate):
    return Scored((None,), None, len(references), ("the references have no tokens",))
  return Scored((100 * result.rate,), None, len(references), (note, *result.notes))


def translation(row, entries, hypotheses, extras):
  del extras
  references = {key: entry["text"] for key, entry in entries.items()}
  result = bleu_of_task(row.task, references, hypotheses)
  assert result is not None
  return Scored((result.score,), None, len(references), (*result.notes, result.signature))


def music_description(row, entries, hypotheses, extras):
  del row, extras
  translated = bleu({key: entry["text"] for key, entry in entries.items()}, hypotheses)
  rouge = sum(rouge_l(e["text"], hypotheses.get(key, "")) for key, e in entries.items())
  return Scored(
    (translated.score, 100 * rouge / len(entries)),
    None,
    len(entries),
    (translated.signature, "ROUGE-L: F-measure, mean over the clips"),
  )


def from_tool(row, entries, hypotheses, extras):
  del hypotheses
  if extras.scores is None:
    note = f"score the answers with aac-metrics and write {row.stem}.scores.json"
    return Scored((None,) * len(row.metrics), None, len(entries), (note,))
  values = tuple(100 * extras.scores[name] for name in row.metrics)
  return Scored(values, None, len(entries), (f"read from {row.stem}.scores.json",))


def class_accuracy(forms: Mapping[str, tuple[str, ...]]) -> Scorer:
  def scorer(row, entries, hypotheses, extras):
    del extras
    correct = unread = 0
    for key, entry in entries.items():
      wanted = answer_matching.named_class(entry["text"], forms)
      if wanted is None:
        raise ValueError(f"{row.file}: {key} has text={entry['text']!r}; allowed are {list(forms)}")
      given = answer_matching.named_class(hypotheses.get(key, ""), forms)
      correct += given == wanted
      unread += key in hypotheses and given is None
    note = (f"{unread} answers name none or several of {', '.join(forms)} and count as wrong",)
    return Scored((correct / len(entries),), None, len(entries), note if unread else ())

  return scorer


def keyword_accuracy(row, entries, hypotheses, extras):
  del extras
  total = 0.0
  for key, entry in entries.items():
    try:
      total += answer_matching.keyword_accuracy(hypotheses.get(key, ""), entry["text"])
    except ValueError as error:
      raise ValueError(f"{row.file}: {key}: {error}") from error
  note = "share of three keywords that occur in the reference, word for word"
  return Scored((total / len(entries),), None, len(entries), (note,))


def judged_accuracy(row, entries, hypotheses, extras):
  """Accuracy from judgements only, because answers are free text."""
  correct, why = _judged("correct", row, entries, hypotheses, extras)
  following, *notes = _following(row, entries, hypotheses, extras)
  return Scored((correct,), following, len(entries), _notes(why, *notes))


def slot_accuracy(row, entries, hypotheses, extras):
  """Accuracy from judgements, else by comparison with the value of the slot."""
  following, *notes = _following(row, entries, hypotheses, extras)
  if extras.judgements is not None:
    correct, why = _judged("correct", row, entries, hypotheses, extras)
    return Scored((correct,), following, len(entries), _notes(why, *notes))
  tell = _all_have_transcripts(entries)
  right = 0
  for key, entry in entries.items():
    if not answer_matching.words(entry["text"]):
      raise ValueError(
        f"{row.file}: {key} has text={entry['text']!r}; it must be the value of the slot"
      )
    answer = hypotheses.get(key, "")
    # The transcript holds the value too, so a sentence counts only where it is told from one.
    sentence = tell and not answer_matching.is_transcript(answer, entry["transcript"])
    right += (
      answer_matching.contains(answer, entry["text"])
      if sentence
      else answer_matching.words(answer) == answer_matching.words(entry["text"])
    )
  note = (
    "correct: contains the value and is not a transcript"
    if tell
    else "correct: exactly the value; longer answers need `transcript` or judgements"
  )
  return Scored((right / len(entries),), following, len(entries), _notes(note, *notes))


def diversity(row, entries, hypotheses, extras):
  following, why = _judged("follows", row, entries, hypotheses, extras)
  total = sum(answer_matching.distinct_words(hypotheses.get(key, "")) for key in entries)
  return Scored((total / len(entries),), following, len(entries), _notes(why))


def _following(row, entries, hypotheses, extras):
  """(following rate or None, notes …): judged, else the share that is not a transcript."""
  if extras.judgements is not None or not _all_have_transcripts(entries):
    return _judged("follows", row, entries, hypotheses, extras)
  followed = sum(
    bool(answer_matching.words(text))
    and not answer_matching.is_transcript(text, entry["transcript"])
    for key, entry in entries.items()
    if (text := hypotheses.get(key)) is not None
  )
  return followed / len(entries), "follows: not empty and not a transcript"


def _judged(field, row, entries, hypotheses, extras):
  if extras.judgements is None:
    return None, f"{field!r} needs {row.stem}.judgements.json; fill in the form in to_judge/"
  return judged_share(extras.judgements, field, list(entries), hypotheses)


def _all_have_transcripts(entries) -> bool:
  return all(entry.get("transcript") for entry in entries.values())


def _normal(text: str) -> str:
  return " ".join(answer_matching.words(text))


def _notes(*notes: str) -> tuple[str, ...]:
  return tuple(dict.fromkeys(note for note in notes if note))
