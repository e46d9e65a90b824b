from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.asking import Asker
from mooer_jax.data.config import DataConfig
from mooer_jax.data.examples import Reader
from mooer_jax.data.shards import RawUtterance
from mooer_jax.text.tokenizer import Tokenizer


def test_models_learn_a_blank_where_the_transcript_has_a_mark(clips):
  tokenizer = Tokenizer.from_characters("HI YOU", ("<|end|>",), eos="<|end|>")
  config = DataConfig("", min_s=0, max_s=9, answer_buckets=(9,))
  model = SpeechLLMConfig(template="bare", prompts=(("asr", "YOU"),))
  read = Reader(config, tokenizer, model, Asker(config, tokenizer, model), needs_answer=True)
  audio = clips[0].path.read_bytes()
  example = read(RawUtterance("key", "a.tar", "wav", audio, "HI▁YOU".encode()))
  assert tokenizer.decode(example.answer_S) == "HI YOU"
  assert example.text == "HI▁YOU"  # references stay as they are
