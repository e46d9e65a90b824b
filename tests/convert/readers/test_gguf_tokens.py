"""Tokenizers rebuilt from GGUF metadata: the ids of the models' own files."""

import json

import gguf
import numpy as np
import pytest

from convert.readers import ReadError, gguf_tokenizer
from mooer_jax.text import sentencepiece as ours
from mooer_jax.text.tokenizer import Tokenizer

TEXTS = [
  "",
  " ",
  "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
  "你好，世界",
  "it's 1999",
  "  two  blanks  ",
  "line\r\n\n\tbreak",
  "ＡＢＣ１２３",
  "e\u0301 decomposed",
  "😀👩‍👩‍👧",
  "a1b22c333 4444",
  "ไทย हिन्दी العربية",
  "HELLO▁WORLD",
  "<|im_end",
  "\x00\x1b",
  "DON'T don't",
  "x_y__z!!...\n\n\n",
]


def _write(path, kind, tokens, **fields):
  writer = gguf.GGUFWriter(path, "qwen2")
  writer.add_tokenizer_model(kind)
  writer.add_token_list(tokens)
  for name, value in fields.items():
    getattr(writer, f"add_{name}")(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_qwen2_from_gguf_gives_the_ids_of_its_own_files(tmp_path, qwen2_folder):
  files = json.loads((qwen2_folder / "tokenizer.json").read_text("utf-8"))
  vocabulary = dict(files["model"]["vocab"])
  vocabulary.update({token["content"]: token["id"] for token in files["added_tokens"]})
  n = 151936  # the embedding has more rows than the vocabulary, which the file fills up
  tokens = sorted(vocabulary, key=vocabulary.get)
  kinds = [1] * 151643 + [3] * 3 + [5] * (n - len(tokens))
  tokens += [f"[PAD{i}]" for i in range(len(tokens), n)]
  path = _write(
    tmp_path / "a.gguf",
    "gpt2",
    tokens,
    token_types=kinds,
    tokenizer_pre="qwen2",
    token_merges=[" ".join(pair) for pair in files["model"]["merges"]],
    eos_token_id=151645,
    pad_token_id=151643,
    add_bos_token=False,
  )
  model, config = gguf_tokenizer(path)
  assert config["eos_token"] == "<|im_end|>" and config["pad_token"] == "<|endoftext|>"
  assert config["add_bos_token"] is False
  found = Tokenizer(model, config, config["eos_token"])
  expected = Tokenizer.from_folder(qwen2_folder)
  assert found.vocab_size == expected.vocab_size and found.eos_id == expected.eos_id
  for text in TEXTS:
    ids = expected.encode(text)
    assert found.encode(text) == ids, text
    assert found.decode(ids, False) == expected.decode(ids, False)


@pytest.mark.parametrize(
  "pre, expected",
  [
    ("llama-bpe", ["123", "45", " ab"]),
    ("qwen2", ["1", "2", "3", "4", "5", " ab"]),
    ("smollm", ["1", "2", "3", "4", "5", " ab"]),
    ("gpt-2", ["12345", " ab"]),
  ],
)
def test_text_is_cut_as_the_model_was_trained(tmp_path, pre, expected):
  letters = [chr(c) for c in range(0x21, 0x7F)] + ["Ġ"]
  words = ["12", "123", "1234", "12345", "45", "ab", "Ġab"]
  merges = ["1 2", "12 3", "123 4", "1234 5", "4 5", "a b", "Ġ ab"]
  path = _write(
    tmp_path / "a.gguf", "gpt2", letters + words, tokenizer_pre=pre, token_merges=merges
  )
  tokenizer, _ = gguf_tokenizer(path)
  ids = tokenizer.encode("12345 ab").ids
  assert [tokenizer.decode([i]) for i in ids] == expected


def test_llama_3_takes_whole_words_that_no_merges_reach(tmp_path):
  tokens = ["a", "b", "c", "ab", "abc"]
  path = _write(
    tmp_path / "a.gguf", "gpt2", tokens, tokenizer_pre="llama-bpe", token_merges=["a b"]
  )
  assert gguf_tokenizer(path)[0].encode("abc").ids == [4]


def test_control_tokens_are_special_and_user_defined_ones_are_text(tmp_path):
  path = _write(
    tmp_path / "a.gguf",
    "gpt2",
    ["a", "b", "ab", "<s>", "<A_0>"],
    token_types=[1, 1, 1, 3, 4],
    tokenizer_pre="qwen2",
    token_merges=["a b"],
    bos_token_id=3,
  )
  tokenizer, config = gguf_tokenizer(path)
  assert config["bos_token"] == "<s>"
  assert tokenizer.encode("ab<s>a<A_0>").ids == [2, 3, 0, 4]
  assert tokenizer.decode([2, 3, 0, 4]) == "aba<A_0>"


def test_llama_pieces_cut_as_sentencepiece_does(tmp_path, spm_training):
  import sentencepiece

  model = spm_training.train(tmp_path, "bpe")
  processor = sentencepiece.SentencePieceProcessor(str(model))
  pieces = ours.read_model(model).pieces
  path = _write(
    tmp_path / "a.gguf",
    "llama",
    [p.text for p in pieces],
    token_scores=[p.score for p in pieces],
    token_types=[p.kind for p in pieces],
    bos_token_id=1,
    eos_token_id=2,
    add_bos_token=True,
  )
  tokenizer, config = gguf_tokenizer(path)
  assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
  for text in spm_training.texts():
    assert tokenizer.encode(text).ids == processor.encode(text), text


@pytest.mark.parametrize(
  "kind, fields, message",
  [
    ("bert", {}, "kind 'bert'"),
    ("gpt2", {}, "lack 'tokenizer.ggml.pre'"),
    ("gpt2", {"tokenizer_pre": "deepseek-coder"}, "pre-tokenizer 'deepseek-coder' is unknown"),
    ("gpt2", {"tokenizer_pre": "qwen2"}, "lack 'tokenizer.ggml.merges'"),
    ("gpt2", {"tokenizer_pre": "qwen2", "token_merges": ["a b c"]}, "'a b c' is not of two"),
    ("gpt2", {"tokenizer_pre": "qwen2", "token_merges": ["a x"]}, "is not a tokenizer"),
    ("gpt2", {"tokenizer_pre": "qwen2", "token_merges": ["a b"], "eos_token_id": 9}, "is 9, of 3"),
    ("gpt2", {"token_types": [1]}, "1 token types"),
    ("llama", {"token_scores": [0.0]}, "1 scores"),
    ("llama", {"token_scores": [0.0] * 3}, "0 unknown pieces"),
  ],
)
def test_vocabularies_that_do_not_fit(tmp_path, kind, fields, message):
  path = _write(tmp_path / "a.gguf", kind, ["a", "b", "ab"], **fields)
  with pytest.raises(ReadError, match=rf"a\.gguf: .*{message}"):
    gguf_tokenizer(path)


def test_a_file_without_a_tokenizer(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
  writer.add_tensor("token_embd.weight", np.ones((8, 64), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ReadError, match="lack 'tokenizer.ggml.model'"):
    gguf_tokenizer(tmp_path / "a.gguf")
