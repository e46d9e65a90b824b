import pytest
import sacrebleu

from mooer_jax.evaluation import translation
from mooer_jax.evaluation.translation import TOKENIZERS, bleu, bleu_of_task, check_tokenizer
from mooer_jax.prompts import SALMONN_PROMPTS, TASKS, read_prompts

REFERENCES = {"a": "the cat sat on the mat today", "b": "hello world , my dear friend"}
HYPOTHESES = {"b": "hello world, my friend", "a": "the cat sat on a mat today", "c": "extra"}


def test_it_is_sacrebleu_on_pairs_of_keys():
  expected = sacrebleu.corpus_bleu(
    [HYPOTHESES["a"], HYPOTHESES["b"]], [[REFERENCES["a"], REFERENCES["b"]]]
  )
  result = bleu(REFERENCES, HYPOTHESES)
  assert result.score == expected.score
  assert "tok:13a" in result.signature
  assert (result.utterances, result.missing) == (2, ())


def test_a_missing_hypothesis_counts_as_an_empty_one_and_is_named():
  result = bleu(REFERENCES, {"a": HYPOTHESES["a"]})
  assert result.missing == ("b",)
  assert result.score < bleu({"a": REFERENCES["a"]}, HYPOTHESES).score


def test_chinese_needs_its_tokenizer():
  reference, hypothesis = {"a": "今天天气很好我们去公园"}, {"a": "今天天气很好我们去学校"}
  assert bleu(reference, hypothesis).score < bleu(reference, hypothesis, tokenize="zh").score
  with pytest.raises(ValueError, match="tokenize='cn': choose one of .*'zh'"):
    bleu(reference, hypothesis, tokenize="cn")


def test_sets_that_do_not_meet_are_refused():
  with pytest.raises(ValueError, match="same set"):
    bleu(REFERENCES, {"x": "y"})


def test_each_task_is_compared_in_its_language():
  assert bleu_of_task("asr", REFERENCES, HYPOTHESES, tokenize="char") is None
  assert bleu_of_task("my_translation", REFERENCES, HYPOTHESES) is None
  for task, tokenize, used in (
    ("ast", "", "13a"),
    ("ast", "intl", "intl"),
    ("s2s_trans", "", "13a"),
    ("translation_ec", "", "zh"),
    ("translation_en2de", "", "13a"),
    ("my_translation", "char", "char"),
  ):
    result = bleu_of_task(task, REFERENCES, HYPOTHESES, tokenize=tokenize)
    assert f"tok:{used}" in result.signature and result.notes == ()


def test_tasks_with_a_tokenizer_are_ours():
  salmonn = read_prompts(SALMONN_PROMPTS)
  assert set(TOKENIZERS) <= {*TASKS, *salmonn}
  assert {task for task in salmonn if task.startswith("translation")} <= set(TOKENIZERS)


def test_of_two_lines_only_the_translation_counts():
  references = {"a": "zwei\nthe cat sat on the mat"}
  hypotheses = {"a": "drei\nthe cat sat on a mat"}
  expected = sacrebleu.corpus_bleu(["the cat sat on a mat"], [["the cat sat on the mat"]])
  assert bleu_of_task("asr_ast_mtl", references, hypotheses).score == expected.score
  with pytest.raises(ValueError, match="a and 0 other references have no translation"):
    bleu_of_task("asr_ast_mtl", {"a": "zwei"}, hypotheses)


def test_a_tokenizer_that_cannot_run_is_refused_by_name(monkeypatch):
  monkeypatch.setattr(translation, "has_mecab", lambda: False)
  with pytest.raises(ValueError, match=r"ja-mecab.*sacrebleu\[ja\]"):
    check_tokenizer("ja-mecab")
