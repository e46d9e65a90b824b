import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooer_jax.evaluation.alignment import Counts
from mooer_jax.evaluation.error_rate import (
  ScoreConfig,
  character_tokens,
  mixed_tokens,
  score,
  word_tokens,
)

words = st.lists(st.sampled_from(["one", "Two", "three", "四", "五六"]), min_size=1, max_size=8)
sentences = st.lists(
  st.tuples(words, words).map(lambda p: tuple(" ".join(w) for w in p)), min_size=1, max_size=5
)


def _as_sets(pairs):
  references = {str(i): r for i, (r, _) in enumerate(pairs)}
  hypotheses = {str(i): h for i, (_, h) in enumerate(pairs)}
  return references, hypotheses


@given(sentences)
@settings(max_examples=60)
def test_word_error_rate_is_that_of_jiwer(pairs):
  result = score(*_as_sets(pairs), ScoreConfig(metric="word", case_sensitive=True))
  expected = jiwer.wer([r for r, _ in pairs], [h for _, h in pairs])
  assert result.rate == pytest.approx(expected, rel=1e-12)


@given(sentences)
@settings(max_examples=60)
def test_character_error_rate_is_that_of_jiwer(pairs):
  result = score(*_as_sets(pairs), ScoreConfig(metric="character", case_sensitive=True))
  expected = jiwer.cer([r for r, _ in pairs], [h for _, h in pairs])
  assert result.rate == pytest.approx(expected, rel=1e-12)


@given(sentences)
@settings(max_examples=60)
def test_mixed_rate_is_jiwer_on_words_once_each_han_character_stands_alone(pairs):
  apart = [tuple(_han_apart(text) for text in pair) for pair in pairs]
  expected = jiwer.wer([r.upper() for r, _ in apart], [h.upper() for _, h in apart])
  assert score(*_as_sets(pairs)).rate == pytest.approx(expected, rel=1e-12)


def _han_apart(text):
  return "".join(f" {c} " if c >= "一" else c for c in text)


def test_mixed_corpus_by_hand():
  references = {
    "a": "今天是Monday，开会。",  # 今 天 是 MONDAY 开 会
    "b": "<noise>hello▁world",  # HELLO ▁WORLD
    "c": "好的",  # 好 的
  }
  hypotheses = {
    "a": "今天monday 开回会",  # 是 deleted, 回 inserted
    "b": "HELLO▁WORD",  # ▁WORLD substituted
    "c": "好，的！",  # correct
  }
  result = score(references, hypotheses)
  assert result.counts == Counts(correct=8, substitutions=1, deletions=1, insertions=1)
  assert result.rate == 3 / 10
  assert [u.counts.errors for u in result.utterances] == [2, 1, 0]
  assert result.wrong_utterances == 2
  assert result.notes == ()


def test_missing_hypotheses_count_as_deleted_and_are_named():
  references = {"a": "one two", "b": "three four five"}
  result = score(references, {"a": "one two"})
  assert result.missing == ("b",)
  assert result.counts == Counts(correct=2, deletions=3)
  assert [u.missing for u in result.utterances] == [False, True]


def test_missing_hypotheses_may_be_skipped_and_are_still_named():
  references = {"a": "one two", "b": "three four five"}
  result = score(references, {"a": "one two"}, ScoreConfig(missing="skip"))
  assert result.missing == ("b",)
  assert result.counts == Counts(correct=2)
  assert [u.key for u in result.utterances] == ["a"]


def test_an_empty_hypothesis_is_not_a_missing_one():
  result = score({"a": "one two"}, {"a": ""}, ScoreConfig(missing="skip"))
  assert result.missing == ()
  assert result.counts == Counts(deletions=2)


def test_hypotheses_without_reference_are_named_and_not_scored():
  result = score({"a": "one"}, {"z": "nine", "a": "one"})
  assert result.without_reference == ("z",)
  assert result.counts == Counts(correct=1)


def test_references_without_tokens_are_noted():
  result = score({"a": "，", "b": "one"}, {"a": "oh", "b": "one"})
  assert result.counts == Counts(correct=1, insertions=1)
  assert "1 of 2 references" in result.notes[0]


def test_space_mark_on_one_side_is_noted_and_can_be_read_as_a_blank():
  references, hypotheses = {"a": "HELLO WORLD"}, {"a": "HELLO▁WORLD"}
  kept = score(references, hypotheses)
  assert kept.counts.errors == 1
  assert "hypotheses only" in kept.notes[0] and "space" in kept.notes[0]
  blank = score(references, hypotheses, ScoreConfig(space_mark="space"))
  assert blank.counts == Counts(correct=2)
  assert blank.notes == ()
  assert score(references, hypotheses, ScoreConfig(metric="word")).counts.errors == 0


def test_order_of_hypotheses_changes_nothing():
  references = {"a": "one two", "b": "three"}
  hypotheses = {"a": "one", "b": "three x"}
  backwards = dict(reversed(hypotheses.items()))
  assert score(references, hypotheses) == score(references, backwards)


def test_worst_come_first_and_right_ones_never():
  references = dict.fromkeys("pqrst", "a b c d") | {"u": "a b"}
  hypotheses = {"p": "a b c d", "q": "a b", "r": "x b c d", "s": "", "t": "a b", "u": ""}
  result = score(references, hypotheses)
  # u has as many errors as q and t in fewer tokens; q and t tie, so the key decides.
  assert [u.key for u in result.worst(10)] == ["s", "u", "q", "t", "r"]
  assert [u.key for u in result.worst(2)] == ["s", "u"]


@pytest.mark.parametrize(
  "references, hypotheses, message",
  [
    ({}, {"a": "x"}, "no references"),
    ({"a": "x"}, {"b": "x"}, "first key 'b'.*first key 'a'"),
    ({"a": "x"}, {}, "none of 0 hypotheses"),
  ],
)
def test_sets_that_do_not_belong_together(references, hypotheses, message):
  with pytest.raises(ValueError, match=message):
    score(references, hypotheses)


@pytest.mark.parametrize(
  "wrong", [{"metric": "cer"}, {"space_mark": "drop"}, {"missing": "ignore"}]
)
def test_config_names_the_allowed_values(wrong):
  ((name, value),) = wrong.items()
  with pytest.raises(ValueError, match=f"{name}='{value}': must be one of"):
    ScoreConfig(**wrong)


# Worked by hand from the rules in the docstring of `mixed_tokens`.
MIXED = [
  ("", []),
  (" \t\r\n\u3000\u00a0", []),
  ("你好世界", ["你", "好", "世", "界"]),
  ("hello world", ["hello", "world"]),
  ("今天monday开会", ["今", "天", "monday", "开", "会"]),
  ("iphone15手机", ["iphone15", "手", "机"]),
  # Marks go where a token would start, and stay within a run.
  ("你好，世界。", ["你", "好", "世", "界"]),
  ("hello, world!", ["hello,", "world!"]),
  (", hello ,world ?!", ["hello", "world"]),
  ("《红楼梦》「好」『不』：，；？！、︰", ["红", "楼", "梦", "好", "不"]),
  ("don't stop.", ["don't", "stop."]),
  ("3.5% - 10", ["3.5%", "-", "10"]),
  (". ; :", [".", ";", ":"]),
  # A mark beyond ASCII ends a run and is then dropped.
  ("hello，world", ["hello", "world"]),
  # A character beyond ASCII that is no Lo letter opens a run, ASCII after it belongs to it.
  ("café", ["caf", "é"]),
  ("élan vital", ["élan", "vital"]),
  ("ＡＢc", ["Ａ", "Ｂc"]),
  ("２０２４年", ["２", "０", "２", "４", "年"]),
  ("HELLO▁WORLD", ["HELLO", "▁WORLD"]),
  ("“你好”", ["“", "你", "好", "”"]),
  ("😀ok", ["😀ok"]),
  # Other Lo letters: kana, Thai (its vowel signs are Mn), Hangul; the kana length mark is Lm.
  ("ひらがな", ["ひ", "ら", "が", "な"]),
  ("コーヒー", ["コ", "ー", "ヒ", "ー"]),
  ("ーa", ["ーa"]),
  ("한국", ["한", "국"]),
  ("กี่", ["ก", "ี", "่"]),
  # Tags are dropped, and with them what they enclose.
  ("<noise>你好<unk>", ["你", "好"]),
  ("<unk><noise>ok", ["ok"]),
  ("<unk>,ok", ["ok"]),
  ("ok<unk>ay <noise", ["okay"]),
  ("<a b>", ["b>"]),
  ("<你>", ["你", ">"]),
  ("a > b", ["a", ">", "b"]),
  ("<>x", ["x"]),
  ("<<a>b", ["b"]),
  # Unassigned code points go at a start, and end a run like all beyond ASCII.
  ("\u0378ab\u0378cd", ["ab", "cd"]),
  # Only blank, tab and line ends end a run within ASCII.
  ("a\x0bb \x0bc", ["a\x0bb", "\x0bc"]),
]


@pytest.mark.parametrize("text, tokens", MIXED)
def test_mixed_tokens(text, tokens):
  assert mixed_tokens(text) == tokens


def test_word_tokens():
  assert word_tokens(" it's  a\tword,\nand\u3000one ") == ["it's", "a", "word,", "and", "one"]
  assert word_tokens("cafe\u0301") == word_tokens("café")


def test_character_tokens():
  assert character_tokens("  ab  c好\n") == ["a", "b", " ", "c", "好"]
  assert character_tokens("e\u0301") == ["é"]


def test_case_and_space_mark_follow_the_config():
  text = "Hello▁World 你好"
  assert ScoreConfig().tokens(text) == ("HELLO", "▁WORLD", "你", "好")
  assert ScoreConfig(space_mark="space").tokens(text) == ("HELLO", "WORLD", "你", "好")
  assert ScoreConfig(metric="word").tokens(text) == ("HELLO", "WORLD", "你好")
  assert ScoreConfig(metric="word", space_mark="keep").tokens(text) == ("HELLO▁WORLD", "你好")
  assert ScoreConfig(metric="character").tokens("a▁B") == ("A", " ", "B")
  assert ScoreConfig(case_sensitive=True).tokens("Hello") == ("Hello",)


def test_mixed_tokens_are_cut_before_they_are_upper_cased():
  assert ScoreConfig().tokens("groß") == ("GRO", "SS")
