"""Scores of spoken answers: error rate and BLEU of their transcripts, similarity of the voice."""

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from mooer_jax.evaluation.answer_matching import words
from mooer_jax.evaluation.error_rate import Score, ScoreConfig, score
from mooer_jax.evaluation.report import as_dict as score_as_dict
from mooer_jax.evaluation.translation import Bleu, bleu, check_tokenizer

_BELOW_20 = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
  " sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_POWERS = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}\b)")


@dataclasses.dataclass(frozen=True)
class SpeechConfig:
  """Scores of spoken answers, for `eval.py --mode=speech`.

  Attributes:
    folder: the answers, KEY.wav and, for the error rate of the text, KEY.txt, as `mooer-jax speak`
      writes them.
    recogniser: model of faster-whisper: a size, which it downloads, or a folder.
    recogniser_prompt: text in the style of the references, such as "forty two, seven", which the
      recogniser imitates; "": none.
    language: code of the language of the answers; "": detected in each of them.
    bleu_tokenize: sacrebleu's tokenizer for that language.
    voice: recording of the voice that the answers should have; "": it is not scored.
  """

  folder: str = ""
  recogniser: str = "small"
  recogniser_prompt: str = ""
  language: str = "en"
  bleu_tokenize: str = "13a"
  voice: str = ""

  def __post_init__(self):
    check_tokenizer(self.bleu_tokenize)


def spell(number: int) -> str:
  """Spell a number of at least 0 in English words: 342 is "three hundred forty two"."""
  if number < 20:
    return _BELOW_20[number]
  if number < 100:
    tens, ones = _TENS[number // 10 - 2], number % 10
    return f"{tens} {_BELOW_20[ones]}" if ones else tens
  power, name = next((power, name) for power, name in _POWERS if number >= power)
  rest = f" {spell(number % power)}" if number % power else ""
  return f"{spell(number // power)} {name}{rest}"


def normalise(text: str, language: str = "en") -> str:
  """Normalise a text that is compared with a transcript of speech.

  Lower case, without punctuation; in English, numerals are spelled, since one recogniser writes
  "7" and another "seven". Commas within a number are removed; the parts of a decimal number are
  words of their own, as are the numbers of a range.

  Args:
    text: a reference, or the transcript of a recogniser.
    language: code of the language of the text.
  """
  if language != "en":
    return " ".join(words(text))
  joined = _THOUSANDS_COMMA.sub("", text)
  return " ".join(spell(int(w)) if w.isascii() and w.isdigit() else w for w in words(joined))


@dataclasses.dataclass(frozen=True)
class SpeechScores:
  """Scores of the spoken answers of a test set.

  Attributes:
    spoken: error rate of the transcripts of the speech.
    text: error rate of the texts that were generated with it; None if there are none.
    bleu: BLEU of the transcripts of the speech (ASR-BLEU).
    similarities: cosine of the speaker vectors of each answer and of the voice it should have; None
      if no voice was given.
  """

  spoken: Score
  text: Score | None
  bleu: Bleu
  similarities: Mapping[str, float] | None

  @property
  def similarity(self) -> float | None:
    """Mean of the similarities."""
    return statistics.fmean(self.similarities.values()) if self.similarities else None


def score_speech(
  references: Mapping[str, str],
  spoken: Mapping[str, str],
  *,
  texts: Mapping[str, str] | None = None,
  similarities: Mapping[str, float] | None = None,
  language: str = "en",
  tokenize: str = "13a",
  config: ScoreConfig = ScoreConfig(),
) -> SpeechScores:
  """Score spoken answers, all texts by key.

  Args:
    references: texts of the right answers.
    spoken: transcripts of the speech; an answer without one counts as empty.
    texts: texts that the model generated beside the speech.
    similarities: as in `SpeechScores`.
    language: code of the language of the answers, see `normalise`.
    tokenize: sacrebleu's tokenizer for it.
    config: metric of the error rates.

  Raises:
    ValueError: if there are no references, or no answer belongs to any of them.
  """
  wanted, heard = (_normalised(t, language) for t in (references, spoken))
  return SpeechScores(
    spoken=score(wanted, heard, config),
    text=score(wanted, _normalised(texts, language), config) if texts else None,
    bleu=bleu(wanted, heard, tokenize=tokenize),
    similarities=similarities,
  )


def _normalised(texts: Mapping[str, str], language: str) -> dict[str, str]:
  return {key: normalise(text, language) for key, text in texts.items()}


def as_dict(scores: SpeechScores, *, name: str, details: Mapping[str, Any]) -> dict[str, Any]:
  """Return the report as JSON values, with the aligned worst answers of each error rate."""
  return {
    "name": name,
    "error_rate": _finite(scores.spoken.rate),
    "text_error_rate": _finite(scores.text.rate) if scores.text else None,
    "asr_bleu": scores.bleu.score,
    "speaker_similarity": scores.similarity,
    "bleu": dataclasses.asdict(scores.bleu),
    "similarities": dict(scores.similarities) if scores.similarities else None,
    "details": dict(details),
    "spoken": score_as_dict(scores.spoken, name=name),
    "text": score_as_dict(scores.text, name=name) if scores.text else None,
  }


def table(scores: Mapping[str, SpeechScores]) -> Table:
  """Return a table with a row for each named test."""
  made = Table(
    "", "answers", "no speech", "error rate %", "of the text %", "ASR-BLEU", "similarity"
  )
  for name, s in scores.items():
    rates = ("" if x is None else f"{100 * x.rate:.2f}" for x in (s.spoken, s.text))
    voice = "" if s.similarity is None else f"{s.similarity:.3f}"
    counts = (str(len(s.spoken.utterances)), str(len(s.spoken.missing)))
    made.add_row(name, *counts, *rates, f"{s.bleu.score:.2f}", voice)
  return made


def _finite(rate: float) -> float | None:
  return rate if math.isfinite(rate) else None
