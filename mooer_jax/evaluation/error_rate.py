"""Error rates of hypotheses against references."""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import NamedTuple

from mooer_jax.evaluation.alignment import Counts, Pair, align, count

# MooER's mark of the space between two English words of a transcript.
SPACE_MARK = "▁"

_DROPPED = frozenset("!,?、。！，；？：「」︰『』《》 \t\r\n")
_SKIPPED_CATEGORIES = ("Zs", "Cn")
_TAG_RUN = re.compile(r"<[^ \t\r\n>\x80-\U0010FFFF]*>?")
_RUN = re.compile(r"(?s:.)[^ \t\r\n\x80-\U0010FFFF]*")
_TAG = re.compile(r"<[^>]*>?")


def mixed_tokens(text: str) -> list[str]:
  """Tokenizes a text as MooER's published error rates do.

  A letter without case (Unicode category Lo: Chinese, kana, Thai, ...) is a token. Any other
  character opens a run that ends before the next space, tab, line end or non-ASCII character; a run
  opened by `<` also ends with its `>`. At the start of a token, spaces of any kind, unassigned
  characters and `_DROPPED` marks are dropped; within a run they are kept, so `hello,` is one token.
  Tags `<...>` are removed from each run.

  Consequences, kept for comparability: `don't` is one token, `café` two (`caf`, `é`), each
  full-width Latin letter one, `HELLO▁WORLD` two (`HELLO`, `▁WORLD`). Case is kept.

  Source: MooER's scoring script `compute-wer.py` with `--char=1`.
  """
  tokens = []
  start = 0
  while start < len(text):
    character = text[start]
    category = unicodedata.category(character)
    end = start + 1
    if category == "Lo":
      tokens.append(character)
    elif character not in _DROPPED and category not in _SKIPPED_CATEGORIES:
      run = (_TAG_RUN if character == "<" else _RUN).match(text, start)
      assert run, "both patterns take at least the first character"
      tokens.append(_TAG.sub("", run.group()))
      end = run.end()
    start = end
  return [token for token in tokens if token]


def word_tokens(text: str) -> list[str]:
  """Splits a text at white space. Punctuation is kept, so `hello,` and `hello` differ.

  Composed and decomposed accents (Unicode NFC) count as the same letter.
  """
  return unicodedata.normalize("NFC", text).split()


def character_tokens(text: str) -> list[str]:
  """Splits the words of `word_tokens`, joined by one space each, into characters."""
  return list(" ".join(word_tokens(text)))


class Metric(NamedTuple):
  """An error rate: title in reports, tokenizer, and default treatment of `▁`."""

  title: str
  tokens: Callable[[str], list[str]]
  space_mark: str


METRICS = {
  "mixed": Metric("error rate, MooER's tokens", mixed_tokens, "keep"),
  "word": Metric("word error rate", word_tokens, "space"),
  "character": Metric("character error rate", character_tokens, "space"),
}
_CHOICES = {
  "metric": METRICS.keys(),
  "space_mark": ("auto", "keep", "space"),
  "missing": ("count", "skip"),
}


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  """Comparison of transcripts.

  Attributes:
    metric: "mixed" (MooER's), "word" or "character"; see `METRICS`.
    case_sensitive: whether `a` and `A` differ. By default both sides are upper-cased.
    space_mark: meaning of `▁` on both sides: "keep" (a character), "space", or "auto" ("keep" for
      "mixed", as in MooER's script, else "space").
    missing: "count" a reference without hypothesis as all deleted, or "skip" it, as MooER's script
      does. It is reported in both cases.
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
  """Error rates of a corpus.

  Attributes:
    config: rules of the comparison.
    counts: totals over `utterances`.
    utterances: the scored utterances, in the order of the references.
    missing: keys of references without a hypothesis; scored unless config.missing is "skip".
    without_reference: keys of hypotheses without a reference, which are not scored.
    notes: warnings about the data.
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
  references: Mapping[str, str], hypotheses: Mapping[str, str], config: ScoreConfig = ScoreConfig()
) -> Score:
  """Compares transcripts by key and totals the errors over the corpus.

  Raises:
    ValueError: if there are no references, or no hypothesis belongs to any of them.
  """
  if not references:
    raise ValueError("there are no references to score against")
  if not references.keys() & hypotheses.keys():
    first = f"first key {next(iter(hypotheses))!r}" if hypotheses else "none"
    raise ValueError(
      f"none of {len(hypotheses)} hypotheses ({first}) has a reference; {len(references)}"
      f" references (first key {next(iter(references))!r}): are they of the same set?"
    )
  missing = tuple(key for key in references if key not in hypotheses)
  tokens = config.tokens
  utterances = tuple(
    Utterance(key, tokens(text), tokens(hypotheses.get(key, "")), key not in hypotheses)
    for key, text in references.items()
    if key in hypotheses or config.missing == "count"
  )
  notes = []
  marked = [
    side
    for side, texts in (("references", references), ("hypotheses", hypotheses))
    if any(SPACE_MARK in text for text in texts.values())
  ]
  if config.keeps_space_mark and len(marked) == 1:
    notes.append(
      f"{SPACE_MARK} is in the {marked[0]} only, and counts as a character; with "
      'space_mark="space" it is a space'
    )
  if empty := sum(not u.reference for u in utterances):
    notes.append(f"{empty} of {len(utterances)} references have no tokens")
  return Score(
    config=config,
    counts=sum((u.counts for u in utterances), Counts()),
    utterances=utterances,
    missing=missing,
    without_reference=tuple(key for key in hypotheses if key not in references),
    notes=tuple(notes),
  )
