"""The transcript of a clip in pieces says what those of the pieces say, each part in its order."""

import pytest

from mooer_jax.prompts import split_answer
from mooer_jax.transcribe.transcript import Transcript, join_texts, join_transcripts


def pieces(task, *texts):
  return [
    Transcript(
      text, [i, 7], 1.5, task, "a.wav", -1.0 - i, **split_answer(task, text)._asdict()
    )
    for i, text in enumerate(texts)
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("task", "texts", "text", "transcript", "translation"),
  [
    ("asr", ["a b", "", "c"], "a b c", "a b c", None),
    ("ast", ["a", "b"], "a b", None, "a b"),
    ("s2s_chat", ["a", "b"], "a b", None, None),
    ("asr_ast_mtl", ["你好 \n hello", "", "世界\nworld"], "你好世界\nhello world",
     "你好世界", "hello world"),
    ("asr_ast_mtl", ["你好\nhello", "世界"], "你好世界\nhello", "你好世界", "hello"),
    ("asr_ast_mtl", ["你好", "世界"], "你好世界", "你好世界", None),
  ],
)  # fmt: skip
def test_every_part_is_joined_by_itself(task, texts, text, transcript, translation):
  joined = join_transcripts(pieces(task, *texts))
  assert (joined.text, joined.transcript, joined.translation) == (text, transcript, translation)
  assert split_answer(task, joined.text) == (transcript, translation)


def test_what_is_counted_adds_up_and_one_unfinished_piece_is_enough():
  parts = pieces("asr", "a", "b", "c")
  joined = join_transcripts(parts)
  assert joined.tokens == [0, 7, 1, 7, 2, 7] and joined.seconds == 4.5 and joined.score == -6.0
  assert joined.path == "a.wav" and joined.task == "asr" and joined.finished
  cut = Transcript("d", [1], 1.0, "asr", finished=False, transcript="d")
  joined = join_transcripts([*parts, cut, *parts])
  assert not joined.finished and joined.pieces == (*parts, cut, *parts)
  assert joined.warnings() == ["from 4.5 to 5.5 s the text was truncated at max_new_tokens=1"]
  assert cut.warnings() == ["the text was truncated at max_new_tokens=1"]
  assert join_transcripts(parts).warnings() == []
  assert join_transcripts(pieces("asr", "", " ")).warnings() == ["the text is empty"]


def test_a_clip_in_one_piece_is_left_as_it_is():
  [piece] = pieces("asr_ast_mtl", " 你好 \n hello ")
  assert join_transcripts([piece]) == piece


@pytest.mark.parametrize(
  ("texts", "joined"),
  [
    ([], ""),
    ([" as it was "], " as it was "),
    (["hello", "world"], "hello world"),
    (["hello ", "world", "\nagain"], "hello world\nagain"),
    (["", "hello", "", "", "world", ""], "hello world"),
    (["你好", "世界。", "再见"], "你好世界。再见"),
    (["こんに", "チハー", "「あ」"], "こんにチハー「あ」"),
    (["你好", "world", "再见"], "你好 world 再见"),
    (["안녕", "하세요"], "안녕 하세요"),
    (["2024", "年"], "2024 年"),
    (["good 👍", "👍 good"], "good 👍 👍 good"),
  ],
)
def test_texts_are_joined_as_they_are_written(texts, joined):
  assert join_texts(texts) == joined
