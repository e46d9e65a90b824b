"""What an answer says: words, classes, keywords, transcripts."""

import json

import jiwer
import pytest
import sacrebleu

from mooer_jax.evaluation import answer_matching
from mooer_jax.evaluation.answer_matching import score_by_task, table, write


def test_words_are_what_remains_without_case_and_punctuation():
  text = "Well-known: “Don’t,” she said <COMMA> it's 3 o'clock … 'twas <PERIOD>"
  said = ["well", "known", "don't", "she", "said", "it's", "3", "o'clock", "twas"]
  assert answer_matching.words(text) == said
  assert answer_matching.words("▁HELLO▁World_x") == ["hello", "world", "x"]
  assert answer_matching.words(" ?! ") == []
  assert answer_matching.words("cafe\u0301") == ["café"]


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
  assert answer_matching.named_class(answer, forms) == named


def test_keywords_are_read_from_lists_of_all_kinds():
  assert answer_matching.keywords("Keywords: Neural nets, LoRA; and audio.") == [
    "neural nets",
    "lora",
    "audio",
  ]
  assert answer_matching.keywords("1. speech\n2) sound\n- sound") == ["speech", "sound"]
  assert answer_matching.keywords("The three key words are: a, b") == ["a", "b"]
  assert answer_matching.keywords("3d audio, 16 bit") == ["3d audio", "16 bit"]
  assert answer_matching.keywords(" , ") == []


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
  assert answer_matching.keyword_accuracy(answer, "speech, sound, voice, ear") == pytest.approx(
    accuracy
  )


def test_a_short_reference_asks_for_less_and_an_empty_one_is_refused():
  assert answer_matching.keyword_accuracy("speech, x, y", "speech") == 1.0
  with pytest.raises(ValueError, match="' ,' has no keywords"):
    answer_matching.keyword_accuracy("speech", " ,")


def test_a_phrase_is_contained_as_whole_words_in_order():
  assert answer_matching.contains("It is at Five P.M. sharp", "five p m")
  assert not answer_matching.contains("fifty five", "five fifty")
  assert not answer_matching.contains("tomorrows", "tomorrow")
  assert not answer_matching.contains("anything", " . ")


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
  assert answer_matching.is_transcript(answer, transcript) == expected


def test_each_task_is_scored_by_itself():
  tasks = dict(a="asr", b="asr", c="sex", d="sex", e="sex", f="sex")
  references = dict(a="one two", b="three four", c="male", d="female", e="male", f="female")
  hypotheses = dict(a="One two.", b="three five", c="male", d="male", e="one two", f="Female")
  scores = score_by_task(tasks, references, hypotheses)
  assert list(scores) == ["asr", "sex"]
  assert (scores["asr"].num_examples, scores["asr"].wer, scores["asr"].accuracy) == (2, 25.0, 0.5)
  assert scores["asr"].following is None  # two texts for two clips are no choice
  assert scores["sex"].accuracy == 1 / 2 and scores["sex"].following == 3 / 4


def test_an_answer_that_is_missing_is_wrong_and_all_its_words_are_lost():
  tasks = dict.fromkeys("abcdef", "asr")
  references = dict(a="one two", b="three", c="!", d="one two", e="three", f="!")
  score = score_by_task(tasks, references, {"b": "three"})["asr"]
  assert (score.num_examples, score.not_decoded) == (6, 5)
  assert score.wer == pytest.approx(500 / 6)
  assert score.accuracy == score.following == pytest.approx(1 / 6)  # nothing is not "!"
  none = score_by_task({"a": "asr"}, {"a": "one two"}, {})["asr"]
  assert (none.wer, none.accuracy, none.not_decoded) == (100, 0, 1)


def test_references_without_words_have_no_word_error_rate(tmp_path):
  scores = score_by_task({"a": "asr"}, {"a": "!"}, {"a": "one"})
  assert scores["asr"].wer is None
  write(tmp_path / "tasks.json", scores)
  assert json.loads((tmp_path / "tasks.json").read_text())["asr"]["wer"] is None
  assert table(scores).row_count == 1


def test_tasks_that_translate_have_bleu():
  tasks = dict(a="translation_ec", b="translation_ec", c="asr")
  references = dict(a="今天天气很好", b="我们去公园", c="one")
  scores = score_by_task(tasks, references, dict(a="今天天气很好", c="one"))
  assert scores["asr"].bleu is None
  wanted = [references["a"], references["b"]]
  expected = sacrebleu.corpus_bleu([wanted[0], ""], [wanted], tokenize="zh")
  assert 0 < scores["translation_ec"].bleu == expected.score < 100
  assert score_by_task(tasks, references, {})["translation_ec"].bleu == 0


def test_open_answers_have_no_choices_to_follow():
  keys = [f"k{n}" for n in range(30)]
  tasks, texts = dict.fromkeys(keys, "asr"), {key: f"text {key}" for key in keys}
  assert score_by_task(tasks, texts, texts)["asr"].following is None
