from mooer_jax.evaluation.by_task import score_by_task


def test_each_task_is_scored_by_itself():
  tasks = dict(a="asr", b="asr", c="sex", d="sex", e="sex")
  references = dict(a="one two", b="three four", c="male", d="female", e="male")
  hypotheses = dict(a="One two.", b="three five", c="male", d="male", e="one two")
  scores = score_by_task(tasks, references, hypotheses)
  assert list(scores) == ["asr", "sex"]
  assert (scores["asr"].count, scores["asr"].wer, scores["asr"].accuracy) == (2, 25.0, 0.5)
  assert scores["sex"].accuracy == 1 / 3 and scores["sex"].following == 2 / 3


def test_an_answer_that_is_missing_is_wrong():
  scores = score_by_task({"a": "asr"}, {"a": "one two"}, {})
  assert scores["asr"].wer == 100 and scores["asr"].accuracy == 0


def test_open_answers_have_no_choices_to_follow():
  keys = [f"k{n}" for n in range(30)]
  tasks, texts = dict.fromkeys(keys, "asr"), {key: f"text {key}" for key in keys}
  assert score_by_task(tasks, texts, texts)["asr"].following is None
