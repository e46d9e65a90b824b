"""Tokenizers of model folders: found and converted when the model is imported."""

import json

import pytest

from convert.core.errors import ConversionError
from convert.importing import import_checkpoint
from convert.parts.tokenizer_files import open_tokenizer, read_tokenizer
from mooer_jax.text.tokenizer import Tokenizer
from tests.convert.folders_of import saved_llm

TEXTS = ("low lower newest", "  two  spaces\n", "été 12345", "<|im_end|>low<|endoftext|>", "")
SLOW = ("vocab.json", "merges.txt")


def slow_folder(folder, *, tokenizer_class="Qwen2Tokenizer", added=None):
  """A byte-level BPE as transformers' slow tokenizers are saved: vocab.json and merges.txt."""
  from tokenizers import pre_tokenizers

  folder.mkdir(exist_ok=True)
  merges = [("l", "o"), ("lo", "w"), ("e", "r"), ("Ġ", "low")]
  tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
  (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
  names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
  entries = {
    str(len(tokens) + n): {"content": name, "special": True, "normalized": False}
    for n, name in enumerate(names)
  }
  config = {
    "tokenizer_class": tokenizer_class,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "added_tokens_decoder": entries if added is None else added,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def opened(folder, model_type="qwen2"):
  write = open_tokenizer(folder, model_type=model_type)
  return write


def test_a_slow_tokenizer_is_the_one_of_transformers(tmp_path):
  transformers = pytest.importorskip("transformers")
  folder = slow_folder(tmp_path / "slow")
  ours = read_tokenizer(opened(folder))
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  for text in TEXTS:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False)


def test_a_slow_tokenizer_is_written_beside_its_own_files(tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  folder = slow_folder(tmp_path / "slow")
  opened(folder)(out)
  assert Tokenizer.from_folder(out).encode("low") == [257]
  for name in SLOW:
    assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_added_tokens_of_older_files_keep_their_ids(tmp_path):
  folder = slow_folder(tmp_path / "slow")
  file = folder / "tokenizer_config.json"
  config = json.loads(file.read_text())
  del config["added_tokens_decoder"]
  file.write_text(json.dumps(config))
  (folder / "added_tokens.json").write_text(
    json.dumps({"<|endoftext|>": 260, "<|im_start|>": 261, "<|im_end|>": 262})
  )
  ours = read_tokenizer(opened(folder))
  assert ours.encode("low<|im_end|>") == [257, 262] and ours.eos_id == 262


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda f: (f / "merges.txt").unlink(), "no tokenizer; download tokenizer.json"),
    (lambda f: (f / "merges.txt").write_text("a b c\n"), "Merges text file invalid at line 1"),
    (lambda f: (f / "merges.txt").write_bytes(b"\xff\n"), "not a slow tokenizer"),
    (lambda f: (f / "vocab.json").write_text("[]"), "not a slow tokenizer"),
    (lambda f: (f / "vocab.json").write_text('{"a": "b"}'), "not a slow tokenizer"),
    (lambda f: slow_folder(f, tokenizer_class="BertTokenizer"), "slow tokenizer BertTokenizer"),
    (
      lambda f: slow_folder(f, added={"900": {"content": "<|im_end|>", "special": True}}),
      "'<|im_end|>' has id 900",
    ),
    (lambda f: slow_folder(f, added={"260": "x"}), "not a slow tokenizer"),
  ],
)
def test_a_slow_tokenizer_that_cannot_be_converted_is_refused(tmp_path, change, message):
  folder = slow_folder(tmp_path / "slow")
  change(folder)
  with pytest.raises(ConversionError) as error:
    opened(folder)
  assert message in str(error.value)


def test_a_model_without_a_usable_tokenizer_is_not_imported(tmp_path):
  _, folder = saved_llm(tmp_path / "hf", "qwen2")
  file = folder / "tokenizer.json"
  content = file.read_bytes()
  file.unlink()
  with pytest.raises(ConversionError, match="no tokenizer; download"):
    import_checkpoint("qwen2", folder, tmp_path / "ours")
  file.write_bytes(content[:50])
  with pytest.raises(ConversionError, match="not a tokenizer.json that can be read"):
    import_checkpoint("qwen2", folder, tmp_path / "ours")
  file.write_bytes(content)
  (folder / "tokenizer_config.json").write_text("{}")
  with pytest.raises(ConversionError, match="eos_token"):
    import_checkpoint("qwen2", folder, tmp_path / "ours")
  Tokenizer.from_characters(map(chr, range(0x4E00, 0x4E00 + 61))).save(folder)
  with pytest.raises(ConversionError, match="64 tokens, its embedding 61 rows"):
    import_checkpoint("qwen2", folder, tmp_path / "ours")
  assert not (tmp_path / "ours").exists()
