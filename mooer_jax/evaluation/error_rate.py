"""Scores a set of hypotheses against their references."""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import NamedTuple

from mooer_jax.evaluation.alignment import Counts, Pair, align, count

# MooER writes this for the blank between two English words of a transcript.
SPACE_MARK = "▁"


_DROPPED = frozenset("!,?、。！，；？：「」︰『』《》")


_BLANKS = frozenset(" \t\r\n")


_SKIPPED_CATEGORIES = ("Zs", "Cn")


_TAG_RUN = re.compile(r"<[^ \t\r\n>\x80-\U0010FFFF]*>?")


_RUN = re.compile(r"(?s:.)[^ \t\r\n\x80-\U0010FFFF]*")


_TAG = re.compile(r"<[^>]*>?")


def mixed_tokens(text: str) -> list[str]:
  """Cuts a text the way MooER's published error rates do.

  A letter without case (Unicode category Lo: Chinese, kana, Thai, ...) is a token of its own. Any
  other character opens a run that ends before the next blank, tab, line end or character beyond
  ASCII; a run opened by `<` also ends with its `>`. Where a token would start, blanks of any kind,
  unassigned characters and these marks are dropped:
  `! , ? 、 。 ！ ， ； ？ ： 「 」 ︰ 『 』 《 》`.
  Within a run they stay, so `hello,` is one token with its comma. Tags `<...>` are cut out of each
  run.

  What follows from that, and is kept for comparability: `don't` is one token, `café` two
  (`caf`, `é`), each full-width Latin letter one, `HELLO▁WORLD` two (`HELLO`, `▁WORLD`).

  Case is kept; `score.ScoreConfig` upper-cases the tokens afterwards, again as the original does.

  Source: MooER's scoring script `compute-wer.py` with `--char=1`.
  """
  tokens = []
  start = 0
  while start < len(text):
    character = text[start]
    category = unicodedata.category(character)
    if character in _DROPPED or character in _BLANKS or category in _SKIPPED_CATEGORIES:
      start += 1
      continue
    if category == "Lo":
      tokens.append(character)
      start += 1
      continue
    run = (_TAG_RUN if character == "<" else _RUN).match(text, start)
    assert run, "both patterns take at least the first character"
    if token := _TAG.sub("", run.group()):
      tokens.append(token)
    start = run.end()
  return tokens


def word_tokens(text: str) -> list[str]:
  """Cuts a text at blanks. Punctuation stays, so `hello,` and `hello` differ.

  Composed and decomposed accents (Unicode NFC) count as the same letter.
  """
  return unicodedata.normalize("NFC", text).split()


def character_tokens(text: str) -> list[str]:
  """Cuts a text into its characters; a run of blanks within it is one blank, at its ends none.

  Composed and decomposed accents (Unicode NFC) count as the same letter.
  """
  return list(" ".join(word_tokens(text)))


class Metric(NamedTuple):
  """An error rate: its title in reports, its tokens, and how it takes `▁` unless told."""

  title: str
  tokens: Callable[[str], list[str]]
  space_mark: str


METRICS = {
  "mixed": Metric("error rate, MooER's tokens", mixed_tokens, "keep"),
  "word": Metric("word error rate", word_tokens, "blank"),
  "character": Metric("character error rate", character_tokens, "blank"),
}


_CHOICES = {
  "metric": tuple(METRICS),
  "space_mark": ("auto", "keep", "blank"),
  "missing": ("count", "skip"),
}


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  """How transcripts are compared.

  Attributes:
    metric: "mixed" (MooER's), "word" or "character"; see `tokens.METRICS`.
    case_sensitive: whether `a` and `A` differ. By default both sides are upper-cased.
    space_mark: what `▁` is, on both sides: "keep" a character like others, "blank" a blank, or
      "auto": kept by "mixed", as MooER's script does, and a blank for "word" and "character".
      Take "blank" where one side has `▁` and the other blanks.
    missing: "count" a reference without hypothesis as all deleted, or "skip" it, as MooER's script
      does. Either way it is reported.
  """

  metric: str = "mixed"
  case_sensitive: bool = False
  space_mark: str = "auto"
  missing: str = "count"

  def __post_init__(self):
    for name, allowed in _CHOICES.items():
      if (value := getattr(self, name)) not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")

  @property
  def keeps_space_mark(self) -> bool:
    choice = METRICS[self.metric].space_mark if self.space_mark == "auto" else self.space_mark
    return choice == "keep"

  def tokens(self, text: str) -> tuple[str, ...]:
    """Returns the tokens that are compared."""
    if not self.keeps_space_mark:
      text = text.replace(SPACE_MARK, " ")
    tokens = METRICS[self.metric].tokens(text)
    # Upper-casing first would join `gro` and `ß`, two of MooER's tokens, to `GROSS`.
    return tuple(tokens if self.case_sensitive else (token.upper() for token in tokens))


@dataclasses.dataclass(frozen=True)
class Utterance:
  """One scored utterance. `missing`: it had no hypothesis, and counts as all deleted."""

  key: str
  reference: tuple[str, ...]
  hypothesis: tuple[str, ...]
  missing: bool = False

  @functools.cached_property
  def counts(self) -> Counts:
    return count(self.alignment())

  def alignment(self) -> list[Pair]:
    return align(self.reference, self.hypothesis)


@dataclasses.dataclass(frozen=True)
class Score:
  """What came of a comparison.

  Attributes:
    config: how it was compared.
    counts: totals over `utterances`; `counts.rate` is the error rate of the corpus.
    utterances: the scored ones, in the order of the references.
    missing: keys of references without a hypothesis; scored or not as `config.missing` says.
    without_reference: keys of hypotheses without a reference; they are not scored.
    notes: what a reader should know before trusting the figure.
  """

  config: ScoreConfig
  counts: Counts
  utterances: tuple[Utterance, ...]
  missing: tuple[str, ...]
  without_reference: tuple[str, ...]
  notes: tuple[str, ...]

  @property
  def rate(self) -> float:
    """Errors per reference token over the corpus (1.0 = 100 %)."""
    return self.counts.rate

  @property
  def wrong_utterances(self) -> int:
    """Utterances with at least one error."""
    return sum(u.counts.errors > 0 for u in self.utterances)

  def worst(self, number: int) -> list[Utterance]:
    """The utterances with the most errors; among equals the higher rate, then the key decides."""
    wrong = [u for u in self.utterances if u.counts.errors]
    return sorted(wrong, key=lambda u: (-u.counts.errors, -u.counts.rate, u.key))[:number]


def score(
  references: Mapping[str, str],
  hypotheses: Mapping[str, str],
  config: ScoreConfig = ScoreConfig(),
) -> Score:
  """Compares hypotheses with references and totals the errors over the corpus.

  Args:
    references: transcript by key, what was said.
    hypotheses: transcript by key, what was recognised; may be empty strings.
    config: metric and rules.

  Raises:
    ValueError: if there are no references, or no hypothesis belongs to any of them.
  """
  if not references:
    raise ValueError("there are no references to score against")
  if not references.keys() & hypotheses.keys():
    raise ValueError(
      f"none of {len(hypotheses)} hypotheses ({_first(hypotheses)}) has a reference; "
      f"{len(references)} references ({_first(references)}): are they of the same set?"
    )

  missing = tuple(key for key in references if key not in hypotheses)
  utterances = tuple(
    Utterance(
      key,
      config.tokens(text),
      config.tokens(hypotheses.get(key, "")),
      missing=key not in hypotheses,
    )
    for key, text in references.items()
    if key in hypotheses or config.missing == "count"
  )
  return Score(
    config=config,
    counts=sum((u.counts for u in utterances), Counts()),
    utterances=utterances,
    missing=missing,
    without_reference=tuple(key for key in hypotheses if key not in references),
    notes=_notes(references, hypotheses, utterances, config),
  )


def _notes(references, hypotheses, utterances, config):
  notes = []
  if config.keeps_space_mark:
    in_references = any(SPACE_MARK in text for text in references.values())
    in_hypotheses = any(SPACE_MARK in text for text in hypotheses.values())
    if in_references != in_hypotheses:
      side = "references" if in_references else "hypotheses"
      notes.append(
        f"{SPACE_MARK} stands in the {side} only, and counts as a character; with "
        'space_mark="blank" it is a blank'
      )
  if empty := sum(not u.reference for u in utterances):
    notes.append(f"{empty} of {len(utterances)} references have no tokens")
  return tuple(notes)


def _first(texts: Mapping[str, str]) -> str:
  return "none" if not texts else "first key " + repr(next(iter(texts)))
