"""SALMONN's 15 evaluation tasks: what is measured on which set, and what was published.

Where the paper leaves a measure open, the functions in `answers` and the notes of a result say what
is done here. Following rates and what only a judge can decide come from `outside_scores`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mooer_jax.evaluation.task_scorers import (
  Entries,
  Extras,
  Row,
  Scored,
  class_accuracy,
  diversity,
  error_rate,
  from_tool,
  judged_accuracy,
  keyword_accuracy,
  music_description,
  phone_error_rate,
  slot_accuracy,
  translation,
)

# IEMOCAP's four classes, as usual with "excited" among the happy ones.
EMOTIONS = {
  "neutral": ("neutral", "neutrality", "calm"),
  "happy": ("happy", "happiness", "joy", "joyful", "excited", "excitement"),
  "sad": ("sad", "sadness"),
  "angry": ("angry", "anger"),
}
YES_NO = {"yes": ("yes",), "no": ("no",)}


def score_task(
  row: Row, entries: Entries, hypotheses: Mapping[str, str], extras: Extras = Extras()
) -> Scored:
  """Scores one task.

  Args:
    row: one of ROWS.
    entries: annotation entries by key: `text` is the reference, `Q` the question or slot name.
      `transcript`, where every entry has one, tells answers that merely transcribe.
    hypotheses: answers by key. An entry without one counts as answered with nothing.
    extras: scores and judgements from outside.

  Raises:
    ValueError: if there are no entries, if one is of another task, or a reference is none of its
      kind, by key.
  """
  if not entries:
    raise ValueError(f"{row.file}: no entries to score")
  for key, entry in entries.items():
    if entry.get("task", row.task) != row.task:
      raise ValueError(
        f"{row.file}: {key} has task={entry['task']!r}; the figure is of task {row.task!r}, whose"
        " prompt asks for what is scored"
      )
  missing = [key for key in entries if key not in hypotheses]
  if len(missing) == len(entries):
    return Scored((None,) * len(row.metrics), None, len(entries), ("no entry has an answer",))
  notes = []
  if missing:
    notes.append(f"{len(missing)} of {len(entries)} entries have no answer, first {missing[0]}")
  scored = row.scorer(row, entries, hypotheses, extras)
  return dataclasses.replace(scored, notes=(*notes, *scored.notes))


def _row(level, name, task, stem, scorer, *figures, **more) -> Row:
  """A row; a figure is (metric, published without, published with activation tuning)."""
  metrics, before, after = zip(*figures)
  return Row(level, name, task, f"{stem}.json", metrics, before, after, scorer, **more)


_LOWER: dict[str, Any] = dict(higher_is_better=False)
_JUDGED = ("follows", "correct")

# Figures: SALMONN (arXiv 2310.13289), table 3.
# fmt: off
ROWS = (
  _row(1, "ASR, LibriSpeech test-clean", "asr", "librispeech_test_clean", error_rate,
       ("WER", 2.1, 2.1), **_LOWER),
  _row(1, "ASR, LibriSpeech test-other", "asr", "librispeech_test_other", error_rate,
       ("WER", 4.9, 4.9), **_LOWER),
  _row(1, "ASR, GigaSpeech test", "asr", "gigaspeech_test", error_rate,
       ("WER", 9.1, 10.0), **_LOWER),
  _row(1, "En→Zh, CoVoST2", "translation_ec", "covost2_en_zh", translation,
       ("BLEU4", 34.4, 33.1)),
  _row(1, "audio captioning, AudioCaps", "audiocaption", "audiocaps", from_tool,
       ("METEOR", 25.6, 24.0), ("SPIDEr", 47.6, 40.3), outside=True),
  _row(1, "phone recognition, LibriSpeech", "phone_recognition", "librispeech_phones",
       phone_error_rate, ("PER", 4.2, 4.2), **_LOWER),
  _row(1, "emotion recognition, IEMOCAP", "emotion_recognition", "iemocap",
       class_accuracy(EMOTIONS), ("accuracy", 0.63, 0.69)),
  _row(1, "music captioning, MusicCaps", "music_description", "musiccaps", music_description,
       ("BLEU4", 3.5, 5.5), ("ROUGE-L", 22.1, 21.8)),
  _row(1, "overlapped speech, LibriMix", "speech_separation", "librimix", error_rate,
       ("WER", 20.7, 23.0), **_LOWER),
  _row(1, "speaker verification, VoxCeleb1", "speaker_verification", "voxceleb1",
       class_accuracy(YES_NO), ("accuracy", 0.93, 0.94)),
  _row(2, "En→De, CoVoST2", "translation_en2de", "covost2_en_de", translation,
       ("BLEU4", 19.7, 18.6)),
  _row(2, "En→Ja, CoVoST2", "translation_en2ja", "covost2_en_ja", translation,
       ("BLEU4", 22.0, 22.7)),
  _row(2, "keyword extraction, Inspec", "keywords", "inspec", keyword_accuracy,
       ("accuracy", 0.30, 0.32)),
  _row(2, "spoken question answering, WikiQA", "speech_query", "wikiqa", judged_accuracy,
       ("accuracy", 0.19, 0.41), following=(0.29, 0.98), judged=_JUDGED),
  _row(2, "slot filling, SLURP", "slot_filling", "slurp", slot_accuracy,
       ("accuracy", 0.33, 0.41), following=(0.77, 0.99), judged=_JUDGED),
  _row(3, "storytelling, AudioCaps", "audio_story_telling", "audiocaps_story", diversity,
       ("diversity", 7.77, 82.57), following=(0.00, 1.00), judged=("follows",)),
  _row(3, "speech-audio co-reasoning", "speech_audio_coreasoning", "sac", judged_accuracy,
       ("accuracy", 0.02, 0.50), following=(0.04, 0.73), judged=_JUDGED),
)
# fmt: on
