import pytest

from mooer_jax.text.joining import join_texts


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
