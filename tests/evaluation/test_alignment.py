import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooer_jax.evaluation.alignment import Counts, align, count

tokens = st.lists(st.sampled_from("abcd"), max_size=12)


def _errors(reference, hypothesis):
  return count(align(reference, hypothesis)).errors


@pytest.mark.parametrize(
  "reference, hypothesis, correct, substituted, deleted, inserted",
  [
    ("", "", 0, 0, 0, 0),
    ("abc", "abc", 3, 0, 0, 0),
    ("abc", "", 0, 0, 3, 0),
    ("", "ab", 0, 0, 0, 2),
    ("abc", "axc", 2, 1, 0, 0),
    ("abcd", "acd", 3, 0, 1, 0),
    ("acd", "abcd", 3, 0, 0, 1),
    ("kitten", "sitting", 4, 2, 0, 1),
    ("今天天气好", "今天气很好", 4, 0, 1, 1),
  ],
)
def test_hand_worked(reference, hypothesis, correct, substituted, deleted, inserted):
  assert count(align(reference, hypothesis)) == Counts(correct, substituted, deleted, inserted)


def test_tie_break_reads_from_the_end_and_prefers_deletion_then_insertion():
  assert align("aa", "a") == [("a", "a"), ("a", None)]
  assert align("a", "aa") == [("a", "a"), (None, "a")]
  assert align("ab", "ca") == [(None, "c"), ("a", "a"), ("b", None)]


@given(tokens, tokens)
def test_alignment_spells_both_sides(reference, hypothesis):
  pairs = align(reference, hypothesis)
  assert [r for r, _ in pairs if r is not None] == reference
  assert [h for _, h in pairs if h is not None] == hypothesis
  assert (None, None) not in pairs
  counts = count(pairs)
  assert counts.reference == len(reference)
  assert counts.hypothesis == len(hypothesis)


@given(tokens, tokens, tokens)
def test_errors_are_a_distance(a, b, c):
  assert _errors(a, b) == _errors(b, a)
  assert (_errors(a, b) == 0) == (a == b)
  assert _errors(a, c) <= _errors(a, b) + _errors(b, c)


@given(tokens.filter(bool), tokens)
def test_errors_are_those_of_jiwer(reference, hypothesis):
  expected = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
  counts = count(align(reference, hypothesis))
  # The split into kinds is not unique, their sum is.
  assert counts.errors == expected.substitutions + expected.deletions + expected.insertions
  assert counts.rate == pytest.approx(expected.wer, rel=1e-12)


def test_rate_is_defined_without_reference():
  assert Counts(3, 1, 2, 1).rate == 4 / 6
  assert Counts().rate == 0.0
  assert Counts(insertions=1).rate == float("inf")


def test_counts_add_up():
  assert Counts(1, 2, 3, 4) + Counts(5, 6, 7, 8) == Counts(6, 8, 10, 12)


def test_long_utterances_are_quick():
  # 2000 x 2000 cells; a loop over cells in Python would take seconds.
  reference = [str(i % 97) for i in range(2000)]
  assert _errors(reference, reference[1:]) == 1
