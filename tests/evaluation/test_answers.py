"""What an answer says: words, classes, keywords, transcripts."""

import jiwer
import pytest

from mooer_jax.evaluation import answers


def test_words_are_what_remains_without_case_and_punctuation():
  text = "Well-known: “Don’t,” she said <COMMA> it's 3 o'clock … 'twas <PERIOD>"
  said = ["well", "known", "don't", "she", "said", "it's", "3", "o'clock", "twas"]
  assert answers.words(text) == said
  assert answers.words("▁HELLO▁World_x") == ["hello", "world", "x"]
  assert answers.words(" ?! ") == []
  assert answers.words("cafe\u0301") == ["café"]


@pytest.mark.parametrize(
  "answer, named",
  [
    ("Angry.", "angry"),
    ("The speaker sounds sad, I think", "sad"),
    ("Happy rather than sad", "happy"),  # it begins with its class
    ("neither happy nor sad", None),
    ("", None),
    ("unhappy", None),
  ],
)
def test_a_class_is_read_only_where_one_is_named(answer, named):
  forms = {"angry": ("angry", "anger"), "sad": ("sad",), "happy": ("happy",)}
  assert answers.named_class(answer, forms) == named


def test_keywords_are_read_from_lists_of_all_kinds():
  assert answers.keywords("Keywords: Neural nets, LoRA; and audio.") == [
    "neural nets",
    "lora",
    "audio",
  ]
  assert answers.keywords("1. speech\n2) sound\n- sound") == ["speech", "sound"]
  assert answers.keywords("The three key words are: a, b") == ["a", "b"]
  assert answers.keywords("3d audio, 16 bit") == ["3d audio", "16 bit"]
  assert answers.keywords(" , ") == []


@pytest.mark.parametrize(
  "answer, accuracy",
  [
    ("Speech, sound, noise", 2 / 3),
    ("speech", 1 / 3),  # two of the three are lacking
    ("noise, noise, noise, speech, sound, voice", 3 / 3 - 1 / 3),  # repeated ones count once
    ("a, b, c, speech", 0.0),  # only three are asked for
    ("speech sound voice", 0.0),
    ("", 0.0),
  ],
)
def test_keyword_accuracy_by_hand(answer, accuracy):
  assert answers.keyword_accuracy(answer, "speech, sound, voice, ear") == pytest.approx(accuracy)


def test_a_short_reference_asks_for_less_and_an_empty_one_is_refused():
  assert answers.keyword_accuracy("speech, x, y", "speech") == 1.0
  with pytest.raises(ValueError, match="' ,' has no keywords"):
    answers.keyword_accuracy("speech", " ,")


def test_a_phrase_is_contained_as_whole_words_in_order():
  assert answers.contains("It is at Five P.M. sharp", "five p m")
  assert not answers.contains("fifty five", "five fifty")
  assert not answers.contains("tomorrows", "tomorrow")
  assert not answers.contains("anything", " . ")


@pytest.mark.parametrize(
  "answer, transcript",
  [
    ("Who wrote Hamlet?", "who wrote hamlet"),
    ("who wrote the hamlet", "who wrote hamlet"),
    ("Shakespeare wrote it in about 1600", "who wrote hamlet"),
    ("", "who wrote hamlet"),
  ],
)
def test_a_transcript_has_a_low_word_error_rate(answer, transcript):
  expected = jiwer.wer(transcript, answer.lower().strip("?")) <= 0.5
  assert answers.is_transcript(answer, transcript) == expected


def test_diversity_counts_different_words():
  assert answers.distinct_words("A dog barks. The dog barks at a cat!") == 6
  assert answers.distinct_words("") == 0
