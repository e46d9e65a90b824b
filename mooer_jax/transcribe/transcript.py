"""Transcription results for a clip and its chunks."""

import dataclasses
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Transcript:
  """Transcription result for one clip.

  Attributes:
    text: generated text without special tokens.
    tokens: generated ids, eos included; for a chunked clip, those of all chunks.
    seconds: length of the audio.
    task: task that the model was prompted with.
    path: path of the file, None for an array or bytes.
    score: log-probability / length ** length_penalty, by which beams are ranked; for a chunked
      clip, the sum over chunks.
    finished: False if generation stopped at max_new_tokens, in any chunk.
    transcript, translation: those in the text, for tasks that ask for them.
    pieces: results of the chunks of a chunked clip, in order of time.
    error: why the clip could not be transcribed; None if it was.
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
  error: str | None = None

  def to_json(self) -> dict[str, Any]:
    row = {**dataclasses.asdict(self), "seconds": round(self.seconds, 4)}
    return {**row, "pieces": [piece.to_json() for piece in self.pieces]}

  def warnings(self) -> list[str]:
    """Warnings about the text: it is empty, or stopped at max_new_tokens (and in which chunk)."""
    told = [] if self.text.strip() else ["the text is empty"]
    start_s = 0.0
    for piece in self.pieces or [self]:
      end_s = start_s + piece.seconds
      if not piece.finished:
        where = f"from {start_s:.1f} to {end_s:.1f} s " if self.pieces else ""
        told.append(f"{where}the text was truncated at max_new_tokens={len(piece.tokens)}")
      start_s = end_s
    return told


def join_transcripts(pieces: Sequence[Transcript]) -> Transcript:
  """Joins the results of the chunks of a clip, in order.

  Transcripts and translations are joined separately. If a task has both, the text has them on two
  lines, as in the result for a chunk.
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


def _joined(parts: Iterable[str | None]) -> str | None:
  given = [part for part in parts if part is not None]
  return join_texts(given) if given else None


def join_texts(texts: Iterable[str]) -> str:
  """Joins texts with a space, or without one between two Chinese or Japanese characters.

  Empty texts are skipped; no space is added where there already is a space or line break.
  """
  joined = ""
  for text in filter(None, texts):
    ends = joined[-1:], text[0]
    if joined and not any(map(str.isspace, ends)) and not all(map(_is_cjk, ends)):
      joined += " "
    joined += text
  return joined


def _is_cjk(character: str) -> bool:
  """Whether it is written without blanks: ideographs, kana, their marks; not Korean's Hangul."""
  if unicodedata.category(character) == "So":  # emoji are wide, too
    return False
  wide = unicodedata.east_asian_width(character) in "WFH"
  return wide and not unicodedata.name(character, "").startswith(("HANGUL", "HALFWIDTH HANGUL"))
