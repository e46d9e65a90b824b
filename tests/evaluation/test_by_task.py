import json

import pytest
import sacrebleu

from mooer_jax.evaluation.by_task import score_by_task, table, write


def test_each_task_is_scored_by_itself():
  tasks = dict(a="asr", b="asr", c="sex", d="sex", e="sex", f="sex")
  references = dict(a="one two", b="three four", c="male", d="female", e="male", f="female")
  hypotheses = dict(a="One two.", b="three five", c="male", d="male", e="one two", f="Female")
  scores = score_by_task(tasks, references, hypotheses)
  assert list(scores) == ["asr", "sex"]
  assert (scores["asr"].count, scores["asr"].wer, scores["asr"].accuracy) == (2, 25.0, 0.5)
  assert scores["asr"].following is None  # two texts for two clips are no choice
  assert scores["sex"].accuracy == 1 / 2 and scores["sex"].following == 3 / 4


def test_an_answer_that_is_missing_is_wrong_and_all_its_words_are_lost():
  tasks = dict.fromkeys("abcdef", "asr")
  references = dict(a="one two", b="three", c="!", d="one two", e="three", f="!")
  score = score_by_task(tasks, references, {"b": "three"})["asr"]
  assert (score.count, score.not_decoded) == (6, 5)
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
