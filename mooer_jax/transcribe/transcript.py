"""What was heard in a clip, and in the pieces of a long one."""

import dataclasses
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Transcript:
  """What was heard in one clip.

  Attributes:
    text: the answer, special tokens removed.
    tokens: generated ids, eos included if one came; of a clip in pieces, those of each in a row.
    seconds: length of the audio.
    task: what the model was asked.
    path: of the file, None for an array.
    score: log-probability of the answer / length ** length_penalty, as beams are ranked; of a clip
      in pieces, the sum of theirs.
    finished: False if max_new_tokens cut the answer off, or that of a piece.
    transcript: what was said, where the task asks for it.
    translation: of it, where the task asks for it.
    pieces: of a clip in pieces, what was heard in each; in time they follow one another.
  """

  text: str
  tokens: list[int]
  seconds: float
  task: str
  path: str | None = None
  score: float = dataclasses.field(default=0.0, compare=False)  # rounding depends on the batch
  finished: bool = True
  transcript: str | None = None
  translation: str | None = None
  pieces: tuple["Transcript", ...] = ()

  def to_json(self) -> dict[str, Any]:
    row = {**dataclasses.asdict(self), "seconds": round(self.seconds, 4)}
    return {**row, "pieces": [piece.to_json() for piece in self.pieces]}

  def complaints(self) -> list[str]:
    """What is amiss with the answer: nothing said, or cut off at max_new_tokens; by piece."""
    told = [] if self.text.strip() else ["the answer is empty"]
    start_s = 0.0
    for piece in self.pieces or [self]:
      end_s = start_s + piece.seconds
      if not piece.finished:
        where = f"from {start_s:.1f} to {end_s:.1f} s " if self.pieces else ""
        told.append(f"{where}the answer was cut at max_new_tokens={len(piece.tokens)}")
      start_s = end_s
    return told


def join_transcripts(pieces: Sequence[Transcript]) -> Transcript:
  """The transcript of a clip from those of its pieces, in order.

  Transcripts and translations are joined apart from each other; where there are both, the text is
  one above the other, as in the answer for a piece.
  """
  if len(pieces) == 1:
    return pieces[0]
  transcript = _joined(piece.transcript for piece in pieces)
  translation = _joined(piece.translation for piece in pieces)
  if transcript is None or translation is None:
    text = join_texts(piece.text for piece in pieces)
  else:
    text = f"{transcript}\n{translation}"
  return dataclasses.replace(
    pieces[0],
    text=text,
    tokens=[token for piece in pieces for token in piece.tokens],
    seconds=sum(piece.seconds for piece in pieces),
    score=sum(piece.score for piece in pieces),
    finished=all(piece.finished for piece in pieces),
    transcript=transcript,
    translation=translation,
    pieces=tuple(pieces),
  )


def _joined(parts) -> str | None:
  given = [part for part in parts if part is not None]
  return join_texts(given) if given else None


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
