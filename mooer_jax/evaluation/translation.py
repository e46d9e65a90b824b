"""BLEU of translations, by sacrebleu."""

import dataclasses
import importlib.util
from collections.abc import Mapping

from mooer_jax.prompts import TASKS, split_answer

# Tasks that translate, and sacrebleu's tokenizer for the target language.
TOKENIZERS = {
  "ast": "13a",
  "asr_ast_mtl": "13a",
  "s2s_trans": "13a",
  "translation_ec": "zh",
  "translation_en2de": "13a",
  "translation_en2ja": "ja-mecab",
}


@dataclasses.dataclass(frozen=True)
class Bleu:
  """BLEU of a corpus.

  Attributes:
    score: 0 to 100.
    signature: sacrebleu's description of the computation; quote it beside the score.
    missing: keys without a hypothesis, which counts as empty.
    details: sacrebleu's line with the n-gram precisions and the brevity penalty.
    notes: warnings about comparability.
  """

  score: float
  signature: str
  utterances: int
  missing: tuple[str, ...]
  details: str
  notes: tuple[str, ...] = ()


def bleu_of_task(
  task: str, references: Mapping[str, str], hypotheses: Mapping[str, str], *, tokenize: str = ""
) -> Bleu | None:
  """BLEU of the translations of a task, by key; None if it does not translate.

  Args:
    task: one of TOKENIZERS, or another task, which translates if `tokenize` is given.
    references, hypotheses: texts; of a multitask text only the translation counts.
    tokenize: sacrebleu's tokenizer; "": that of the task. Without MeCab, "char" replaces the
      Japanese one, with a note in the result.

  Raises:
    ValueError: if a reference lacks the translation; and as `bleu`.
  """
  if task not in TOKENIZERS and (task in TASKS or not tokenize):
    return None
  wanted = {key: _translation(task, text) for key, text in references.items()}
  if lacking := [key for key, text in wanted.items() if text is None]:
    raise ValueError(
      f"{lacking[0]} and {len(lacking) - 1} other references have no translation: for task"
      f" {task!r} a line of `text` is KEY<TAB>transcript\\ntranslation"
    )
  given = {key: _translation(task, text) or "" for key, text in hypotheses.items()}
  texts = {key: text or "" for key, text in wanted.items()}
  chosen = tokenize or TOKENIZERS[task]
  if tokenize or chosen != "ja-mecab" or has_mecab():
    return bleu(texts, given, tokenize=chosen)
  note = "BLEU of characters, not of MeCab's words: pip install 'sacrebleu[ja]'"
  return dataclasses.replace(bleu(texts, given, tokenize="char"), notes=(note,))


def _translation(task: str, text: str) -> str | None:
  return split_answer(task, text).translation if task in TASKS else text


def has_mecab() -> bool:
  """Whether sacrebleu's Japanese tokenizer can run."""
  return all(importlib.util.find_spec(name) for name in ("MeCab", "ipadic"))


def bleu(
  references: Mapping[str, str], hypotheses: Mapping[str, str], *, tokenize: str = "13a"
) -> Bleu:
  """BLEU of translations by key, with one reference each; a missing hypothesis counts as empty.

  Args:
    references, hypotheses: translations.
    tokenize: sacrebleu's tokenizer: "13a" (its default, for European languages), "zh", "char",
      "intl", "none".

  Raises:
    ValueError: if there are no references, none has a hypothesis, or for an unknown tokenizer.
  """
  from sacrebleu.metrics import BLEU

  if not references.keys() & hypotheses.keys():
    counts = f"{len(hypotheses)} hypotheses has one of {len(references)} references"
    raise ValueError(f"none of {counts}: are they of the same set?")
  check_tokenizer(tokenize)
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


def check_tokenizer(name: str) -> None:
  """Raises ValueError if sacrebleu has no such tokenizer, or cannot run it here."""
  from sacrebleu.metrics import BLEU

  if name not in BLEU.TOKENIZERS:
    raise ValueError(f"tokenize={name!r}: choose one of {sorted(BLEU.TOKENIZERS)}")
  if name == "ja-mecab" and not has_mecab():
    raise ValueError(f"tokenize={name!r} needs MeCab: pip install 'sacrebleu[ja]'")
