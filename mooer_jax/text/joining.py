"""Texts of consecutive stretches of speech as one text."""

import unicodedata
from collections.abc import Iterable


def join_texts(texts: Iterable[str]) -> str:
  """Joins texts with a blank between them, and none between two Chinese or Japanese characters.

  Empty texts leave nothing behind, and where a blank or line break is already there, none is added.
  """
  joined = ""
  for text in texts:
    if joined and text and not _run_on(joined[-1], text[0]):
      joined += " "
    joined += text
  return joined


def _run_on(left: str, right: str) -> bool:
  return left.isspace() or right.isspace() or (_is_cjk(left) and _is_cjk(right))


def _is_cjk(character: str) -> bool:
  """Whether it is written without blanks: ideographs, kana, their marks; not Korean's Hangul."""
  if unicodedata.category(character) == "So":  # emoji are wide, too
    return False
  wide = unicodedata.east_asian_width(character) in "WFH"
  return wide and not unicodedata.name(character, "").startswith(("HANGUL", "HALFWIDTH HANGUL"))
