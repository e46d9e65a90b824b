"""Matching of generated answers with references: words, classes, keywords; scores by task."""

import dataclasses
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from mooer_jax.evaluation.alignment import align, count
from mooer_jax.evaluation.error_rate import ScoreConfig, score
from mooer_jax.evaluation.translation import bleu_of_task
from mooer_jax.files import write_json

# Marks that GigaSpeech writes into its transcripts.
_TAGS = re.compile(r"<(?:COMMA|PERIOD|QUESTIONMARK|EXCLAMATIONPOINT|SIL|NOISE|MUSIC|OTHER)>")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SEPARATOR = re.compile(r"[,;\n•]")
_NUMBERING = re.compile(r"^\s*(?:\(?\d+[.)]|[-*])\s*")
_LABEL = re.compile(r"^[^:,;\n]*\bkey ?words?\b[^:,;\n]*:", re.IGNORECASE)
_AND = re.compile(r"^\s*and\s+", re.IGNORECASE)


def words(text: str) -> list[str]:
  """Splits an English text into words: lower case, no punctuation but apostrophes within words.

  Hyphens separate words; Unicode NFKC; GigaSpeech's tags (`<COMMA>`, `<SIL>`, …) are removed.

  Source: our choice; SALMONN's public code does not score, so its normalisation is not known.
  """
  plain = unicodedata.normalize("NFKC", _TAGS.sub(" ", text)).replace("’", "'")
  return _WORD.findall(plain.lower())


def named_class(answer: str, forms: Mapping[str, Sequence[str]]) -> str | None:
  """The class with which an answer begins, else the only one that it names, else None.

  `forms` has the words that name each class, in lower case.
  """
  class_of = {form: name for name, given in forms.items() for form in given}
  found = words(answer)
  if found and found[0] in class_of:
    return class_of[found[0]]
  named = {class_of[word] for word in found if word in class_of}
  return named.pop() if len(named) == 1 else None


def keywords(text: str) -> list[str]:
  """The keywords of a list, normalised by `words`, each once and in order.

  Commas, semicolons, bullets and line breaks separate; `Keywords:`, numbering, `and` are removed.
  """
  listed = (
    _AND.sub("", _NUMBERING.sub("", part)) for part in _SEPARATOR.split(_LABEL.sub("", text))
  )
  normal = (" ".join(words(part)) for part in listed)
  return list(dict.fromkeys(keyword for keyword in normal if keyword))


def keyword_accuracy(answer: str, reference: str, *, number: int = 3) -> float:
  """Share of the requested keywords that are in both the answer and the reference, 0 to 1.

  The first `number` keywords of the answer count, missing ones as wrong. If the reference has
  fewer keywords, only as many are requested.

  Raises:
    ValueError: if the reference has no keyword.

  Source: our choice; SALMONN's code asks for three keywords and does not score them.
  """
  wanted = keywords(reference)
  if not wanted:
    raise ValueError(f"the reference {reference!r} has no keywords; separate them with commas")
  given = keywords(answer)[:number]
  return len(set(given) & set(wanted)) / min(number, len(wanted))


def contains(answer: str, phrase: str) -> bool:
  """Whether an answer contains the words of a phrase, one after the other."""
  found, wanted = words(answer), words(phrase)
  starts = range(len(found) - len(wanted) + 1)
  return bool(wanted) and any(found[i : i + len(wanted)] == wanted for i in starts)


def is_transcript(answer: str, transcript: str) -> bool:
  """Whether an answer is merely a transcript: its word error rate is at most 0.5."""
  return count(align(words(transcript), words(answer))).rate <= 0.5


# A task is a choice among its references if they have at most this many different values, each of
# which occurs twice or more on average.
MAX_CHOICES = 25


@dataclasses.dataclass(frozen=True)
class TaskScore:
  """Scores of one task.

  Attributes:
    not_decoded: number of utterances without an answer, which counts as wrong and empty.
    wer: word error rate in percent of `words`; None if the references have no words.
    accuracy: share of the answers that equal the reference, word for word.
    following: share of the answers that equal any reference of the task; None if the references
      are too many to be a choice.
    bleu: BLEU of a task that translates, see `translation.TOKENIZERS`; else None.
    bleu_notes: sacrebleu's signature and notes on comparability.
  """

  num_examples: int
  not_decoded: int
  wer: float | None
  accuracy: float
  following: float | None
  bleu: float | None
  bleu_notes: str = ""


def score_by_task(
  tasks: Mapping[str, str], references: Mapping[str, str], hypotheses: Mapping[str, str]
) -> dict[str, TaskScore]:
  """Scores the answers of each task, given tasks, references and hypotheses by key.

  An utterance without an answer counts as wrong; one without a reference is left out.
  """
  keys_of: dict[str, list[str]] = {}
  for key, task in tasks.items():
    if key in references:
      keys_of.setdefault(task, []).append(key)
  scores = {}
  for task, keys in keys_of.items():
    wanted = {key: " ".join(words(references[key])) for key in keys}
    given = {key: " ".join(words(hypotheses[key])) for key in keys if key in hypotheses}
    all_given = dict.fromkeys(keys, "") | given
    rate = score(wanted, all_given, ScoreConfig(metric="word", space_mark="space")).rate
    choices = set(wanted.values())
    follow = sum(text in choices for text in given.values()) / len(wanted)
    answers = {key: hypotheses.get(key, "") for key in keys}
    translated = bleu_of_task(task, {key: references[key] for key in keys}, answers)
    scores[task] = TaskScore(
      num_examples=len(wanted),
      not_decoded=len(wanted) - len(given),
      wer=100 * rate if math.isfinite(rate) else None,
      accuracy=sum(given.get(key) == text for key, text in wanted.items()) / len(wanted),
      following=follow if len(choices) <= min(MAX_CHOICES, len(wanted) // 2) else None,
      bleu=translated.score if translated else None,
      bleu_notes="; ".join((translated.signature, *translated.notes)) if translated else "",
    )
  return scores


def table(scores: Mapping[str, TaskScore]) -> Table:
  """A row for each task."""
  made = Table("task", "utterances", "not decoded", "WER %", "accuracy %", "follows %", "BLEU")
  for task, s in scores.items():
    wer, bleu = ("" if value is None else f"{value:.2f}" for value in (s.wer, s.bleu))
    shares = ("" if v is None else f"{100 * v:.1f}" for v in (s.accuracy, s.following))
    made.add_row(task, str(s.num_examples), str(s.not_decoded), wer, *shares, bleu)
  return made


def write(path: Path, scores: Mapping[str, TaskScore]) -> None:
  """Writes them as JSON."""
  # "count" was the name of num_examples in version 0.1.
  rows = {task: {"count": s.num_examples, **dataclasses.asdict(s)} for task, s in scores.items()}
  write_json(path, rows)
