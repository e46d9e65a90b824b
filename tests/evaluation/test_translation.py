import pytest
import sacrebleu

from mooer_jax.evaluation.translation import bleu

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
