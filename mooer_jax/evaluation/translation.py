"""BLEU of translations, by sacrebleu."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Bleu:
  """BLEU of a corpus.

  Attributes:
    score: 0 to 100.
    signature: sacrebleu's, which says how it was computed; quote it beside the score.
    utterances: how many were compared.
    missing: keys without a hypothesis; they count as empty ones.
    details: sacrebleu's line with the n-gram precisions and the brevity penalty.
  """

  score: float
  signature: str
  utterances: int
  missing: tuple[str, ...]
  details: str


def bleu(
  references: Mapping[str, str], hypotheses: Mapping[str, str], *, tokenize: str = "13a"
) -> Bleu:
  """Compares translations with one reference each.

  Args:
    references: translation by key.
    hypotheses: translation by key; one that is missing counts as empty.
    tokenize: sacrebleu's name: "13a" (its default, for English and its neighbours), "zh", "char",
      "intl", "none".

  Raises:
    ValueError: if there are no references, none has a hypothesis, or for an unknown tokenizer.
  """
  from sacrebleu.metrics import BLEU

  if not references.keys() & hypotheses.keys():
    raise ValueError(
      f"none of {len(hypotheses)} hypotheses has one of {len(references)} references: are they of"
      " the same set?"
    )
  if tokenize not in BLEU.TOKENIZERS:
    raise ValueError(f"tokenize={tokenize!r}: choose one of {sorted(BLEU.TOKENIZERS)}")
  metric = BLEU(tokenize=tokenize)
  given = [hypotheses.get(key, "") for key in references]
  result = metric.corpus_score(given, [list(references.values())])
  return Bleu(
    score=result.score,
    signature=str(metric.get_signature()),
    utterances=len(references),
    missing=tuple(key for key in references if key not in hypotheses),
    details=str(result),
  )
