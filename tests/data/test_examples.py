from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import eval_batches
from mooer_jax.data.examples import Preprocessor, PromptSampler
from mooer_jax.data.readers.entries import RawUtterance
from mooer_jax.text.tokenizer import Tokenizer


def test_models_learn_a_blank_where_the_transcript_has_a_mark(clips):
  tokenizer = Tokenizer.from_characters("HI YOU", ("<|end|>",), eos="<|end|>")
  config = DataConfig("", min_s=0, max_s=9, answer_buckets=(9,))
  model = SpeechLLMConfig(chat_template="bare", prompts=(("asr", "YOU"),))
  sampler = PromptSampler(config, tokenizer, model)
  read = Preprocessor(config, tokenizer, model, sampler, needs_labels=True)
  audio = clips[0].path.read_bytes()
  example = read(RawUtterance("key", "a.tar", "wav", audio, "HI▁YOU".encode()))
  assert tokenizer.decode(example.labels_S) == "HI YOU"
  assert example.text == "HI▁YOU"  # references stay as they are


def test_what_is_just_as_long_as_the_limit_is_not_cut(shards, model_side, wav):
  lengths = {"short": 0.5, "just": 1.0, "long": 1.5}
  shards.add_members([
    member
    for key, seconds in lengths.items()
    for member in ((f"{key}.wav", wav(seconds)), (f"{key}.txt", b"A"))
  ])  # fmt: skip
  for truncate in (False, True):
    (host,) = eval_batches(shards.config(max_s=1.0, truncate=truncate), *model_side)
    heard = {"short": 0.5, "just": 1.0} | ({"long": 1.0} if truncate else {})
    assert dict(zip(host.keys, host.seconds, strict=True)) == heard
    assert host.num_truncated == truncate
    assert [skip.cause for skip in host.skipped] == ["too long"] * (not truncate)
