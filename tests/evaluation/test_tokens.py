import pytest

from mooer_jax.evaluation.score import ScoreConfig
from mooer_jax.evaluation.tokens import character_tokens, mixed_tokens, word_tokens

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
  assert ScoreConfig(space_mark="blank").tokens(text) == ("HELLO", "WORLD", "你", "好")
  assert ScoreConfig(metric="word").tokens(text) == ("HELLO", "WORLD", "你好")
  assert ScoreConfig(metric="word", space_mark="keep").tokens(text) == ("HELLO▁WORLD", "你好")
  assert ScoreConfig(metric="character").tokens("a▁B") == ("A", " ", "B")
  assert ScoreConfig(case_sensitive=True).tokens("Hello") == ("Hello",)


def test_mixed_tokens_are_cut_before_they_are_upper_cased():
  assert ScoreConfig().tokens("groß") == ("GRO", "SS")
