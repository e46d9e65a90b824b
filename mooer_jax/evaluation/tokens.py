"""What an error rate counts: how a transcript is cut into tokens.

Three ways, by name in `METRICS`:

- `mixed`: MooER's own, one token a Chinese character and one an English word. Use it to compare
  with MooER's published figures, English ones included.
- `word`: what blanks separate, the usual word error rate.
- `character`: each character, blanks between words included, the usual character error rate.

Case, `▁` and missing utterances are settled in `score.ScoreConfig`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

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
