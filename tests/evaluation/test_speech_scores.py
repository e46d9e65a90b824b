"""Spoken answers are compared word by word, however a recogniser writes them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooer_jax.evaluation import speech_scores
from mooer_jax.evaluation.error_rate import ScoreConfig
from mooer_jax.evaluation.speech_scores import as_dict, normalise, score_speech, spell

WORD = ScoreConfig(metric="word")


@pytest.mark.parametrize(
  "number, words",
  [
    (0, "zero"),
    (13, "thirteen"),
    (40, "forty"),
    (99, "ninety nine"),
    (100, "one hundred"),
    (342, "three hundred forty two"),
    (1000, "one thousand"),
    (12_034, "twelve thousand thirty four"),
    (7_000_100, "seven million one hundred"),
  ],
)
def test_numbers_are_spelled(number, words):
  assert spell(number) == words


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_different_numbers_are_spelled_differently(a, b):
  assert (spell(a) == spell(b)) == (a == b)


@pytest.mark.parametrize(
  "text, normal",
  [
    ("Forty-two, seven.", "forty two seven"),
    ("42, 7", "forty two seven"),
    ("42.7", "forty two seven"),
    ("1,200 men", "one thousand two hundred men"),
    ("12,34", "twelve thirty four"),
    ("It's the 20th", "it's the 20th"),
    ("", ""),
  ],
)
def test_both_ways_of_writing_english_become_one(text, normal):
  assert normalise(text) == normal
  assert normalise(normal) == normal


def test_numerals_of_other_languages_stay():
  assert normalise("Nº 7, por favor.", "es") == "no 7 por favor"


def test_the_scores_are_those_of_the_words():
  references = {"a": "forty two, seven", "b": "five", "c": "ten"}
  spoken = {"a": "42 8.", "b": "Five!"}
  texts = {"a": "forty two, seven", "b": "five", "c": "ten"}
  scores = score_speech(
    references, spoken, texts=texts, similarities={"a": 0.5, "b": 0.75}, config=WORD
  )
  assert scores.spoken.rate == 2 / 5  # "eight" for "seven", and no "ten"
  assert scores.spoken.missing == ("c",)
  assert scores.text is not None and scores.text.rate == 0
  assert scores.similarity == 0.625
  report = json.loads(json.dumps(as_dict(scores, name="x", details={}), allow_nan=False))
  assert report["error_rate"] == 0.4 and report["text_error_rate"] == 0
  assert report["similarities"] == {"a": 0.5, "b": 0.75}
  assert report["asr_bleu"] == scores.bleu.score < 100


def test_a_perfect_answer_has_the_best_scores():
  references = {"a": "one two three four five", "b": "Six, seven, eight, nine!"}
  scores = score_speech(references, dict(references), config=WORD)
  assert scores.spoken.rate == 0 and scores.bleu.score == pytest.approx(100)
  assert scores.text is None and scores.similarity is None
  speech_scores.table({"x": scores})


def test_speech_of_another_set_is_refused():
  with pytest.raises(ValueError, match="are they of the same set"):
    score_speech({"a": "one"}, {"b": "one"})
