"""SentencePiece models: the same ids as the package sentencepiece, and as transformers."""

import json
import pickle

import pytest
import sentencepiece

from mooer_jax.text import sentencepiece as ours
from mooer_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory, spm_training):
  """A folder as LLaMA's and Vicuna's first releases: tokenizer.model, no tokenizer.json."""
  return spm_training.train(tmp_path_factory.mktemp("llama"), "bpe").parent


def _processor(folder):
  return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"normalization_rule_name": "nmt_nfkc"},
    {"add_dummy_prefix": False},
    {"byte_fallback": False, "vocab_size": 500},
  ],
  ids=["llama", "nfkc", "no prefix", "no bytes"],
)
def test_ids_and_text_are_sentencepieces(tmp_path, spm_training, kind, options):
  folder = spm_training.train(tmp_path, kind, **options).parent
  processor, tokenizer = _processor(folder), Tokenizer.from_folder(folder)
  assert tokenizer.vocab_size == processor.vocab_size()
  differing = []
  texts = spm_training.texts()
  for text in texts:
    if text.startswith("<0x41>") and kind == "unigram":
      continue  # here a byte's name written out is that byte, as in transformers
    ids = processor.encode(text)
    if tokenizer.encode(text) != ids:
      differing.append(text)
    if processor.unk_id() not in ids:
      assert tokenizer.decode(ids) == processor.decode(ids)
  # Unigram breaks ties between equal sums of scores by rounding, which differs.
  assert len(differing) <= (0 if kind == "bpe" else 0.01 * len(texts)), differing


def test_the_same_ids_as_transformers(llama_folder, tmp_path, spm_training):
  from transformers import LlamaTokenizer

  (tmp_path / "tokenizer.model").write_bytes((llama_folder / "tokenizer.model").read_bytes())
  config = {"legacy": False, "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  reference, tokenizer = LlamaTokenizer.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
  for text in [*spm_training.texts(), "a</s>b", "<s> x</s> y"]:
    if "<0x" in text:
      continue  # transformers joins the letters of a byte's name to that byte
    ids = reference(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text) == ids, text
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_every_stretch_between_special_tokens_is_cut_by_itself(llama_folder):
  tokenizer, processor = Tokenizer.from_folder(llama_folder), _processor(llama_folder)
  found = tokenizer.encode("<s>the License</s>the  License")
  assert found == [1, *processor.encode("the License"), 2, *processor.encode("the  License")]
  assert tokenizer.eos_id == 2
  assert tokenizer.encode("<unk>") == [0]


def test_saved_and_pickled_it_stays_the_same(llama_folder, tmp_path, spm_training):
  tokenizer = Tokenizer.from_folder(llama_folder)
  tokenizer.save(tmp_path)
  assert (tmp_path / "tokenizer.json").is_file()
  for other in (Tokenizer.from_folder(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
    assert other.eos_id == tokenizer.eos_id
    for text in spm_training.TEXTS:
      assert other.encode(text) == tokenizer.encode(text)


def test_tokens_added_later_keep_their_ids(llama_folder, tmp_path):
  (tmp_path / "tokenizer.model").write_bytes((llama_folder / "tokenizer.model").read_bytes())
  (tmp_path / "added_tokens.json").write_text('{"<pad>": 701, "<Speech>": 700}')
  config = {
    "added_tokens_decoder": {
      "2": {"content": "</s>", "special": True},
      "701": {"content": "<pad>", "special": True},
    }
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  tokenizer = Tokenizer.from_folder(tmp_path)
  assert tokenizer.vocab_size == 702
  assert tokenizer.encode("<Speech><pad></s>") == [700, 701, 2]
  assert tokenizer.decode([700, 701]) == "<Speech>"  # not special, and special
  (tmp_path / "tokenizer_config.json").unlink()
  (tmp_path / "added_tokens.json").write_text('{"<Speech>": 705}')
  with pytest.raises(ValueError, match="'<Speech>' must have the id 705, but gets 700"):
    Tokenizer.from_folder(tmp_path)


def test_user_defined_pieces_are_found_whole_and_kept(tmp_path, spm_training):
  options = {**spm_training.LLAMA, "user_defined_symbols": ["<A_0>"]}
  folder = spm_training.train(tmp_path, "bpe", **options).parent
  tokenizer, processor = Tokenizer.from_folder(folder), _processor(folder)
  index = processor.piece_to_id("<A_0>")
  assert tokenizer.encode("the <A_0>") == processor.encode("the <A_0>")
  assert tokenizer.decode([index]) == "<A_0>"


def test_a_byte_spelt_out_is_not_that_byte():
  kinds = {"<unk>": ours.UNKNOWN, "<0x41>": ours.BYTE}
  texts = ["<unk>", "<0x41>", "<0x", "41>", *"<0x41>a", "0x", "41", "<0x41>a"]
  pieces = tuple(
    ours.Piece(text, -float(i), kinds.get(text, ours.NORMAL)) for i, text in enumerate(texts)
  )
  model = ours.build_tokenizer(ours.SentencePieceModel(pieces, add_dummy_prefix=False))
  assert model.encode("A").ids == [1]
  assert 1 not in model.encode("<0x41>").ids
  assert model.encode("Aa").ids == [1, texts.index("a")]


def test_settings_are_read(llama_folder, tmp_path, spm_training):
  model = ours.read_model(llama_folder / "tokenizer.model")
  assert model.algorithm == ours.BPE
  assert (model.add_dummy_prefix, model.remove_extra_whitespaces) == (True, False)
  assert (model.bos, model.eos, model.precompiled_charsmap) == ("<s>", "</s>", b"")
  processor = _processor(llama_folder)
  for i, piece in enumerate(model.pieces):
    assert piece.text == processor.id_to_piece(i)
    assert piece.score == processor.get_score(i)
    assert (piece.kind == ours.CONTROL) == processor.is_control(i)
    assert (piece.kind == ours.BYTE) == processor.is_byte(i)
  other = ours.read_model(
    spm_training.train(
      tmp_path, "unigram", bos_id=-1, eos_id=1, unk_id=0, normalization_rule_name="nmt_nfkc"
    )
  )
  assert (other.algorithm, other.remove_extra_whitespaces) == (ours.UNIGRAM, True)
  assert (other.bos, other.eos) == (None, "</s>") and other.precompiled_charsmap


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "0 pieces"),
    (b"not a model", "not a SentencePiece model"),
    (b"\x0a\xff\xff\xff\xff\x0f", "truncated"),
    (b"\x0a" + b"\xff" * 12, "more than 10 bytes"),
    (b"\x0a\x03\x0a\x01\xff", "not a SentencePiece model"),
    (b"\x0a\x03\x0a\x01a", "0 unknown pieces"),
  ],
)
def test_broken_models_are_named(tmp_path, content, message):
  (tmp_path / "tokenizer.model").write_bytes(content)
  with pytest.raises(ValueError, match=rf"tokenizer\.model: .*{message}"):
    Tokenizer.from_folder(tmp_path)


def test_kinds_that_are_not_supported_are_named(tmp_path, spm_training):
  options = {"treat_whitespace_as_suffix": True, **spm_training.LLAMA}
  with pytest.raises(ValueError, match="treat_whitespace_as_suffix"):
    ours.read_model(spm_training.train(tmp_path, "unigram", **options))
  with pytest.raises(ValueError, match="type 4"):
    ours.read_model(spm_training.train(tmp_path, "char", vocab_size=400, **spm_training.LLAMA))


def test_a_cut_model_raises_a_value_error_or_reads_fewer_pieces(llama_folder, tmp_path):
  whole = (llama_folder / "tokenizer.model").read_bytes()
  for length in range(1, 400):
    (tmp_path / "tokenizer.model").write_bytes(whole[:length])
    try:
      Tokenizer.from_folder(tmp_path)
    except ValueError:
      pass
