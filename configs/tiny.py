"""A small MooER for spoken digits, trained from scratch: the same classes at tiny sizes.

Command:   make demo    (or: python train.py --config=configs/tiny.py)
Hardware:  2 CPU cores
Time:      6 to 9 minutes of training (563 s measured beside other work)
Expected:  CER 3 to 5 % on 300 test strings; their 15 voices are not in training
"""

from mooer_jax.run.config import default_config

DIGITS = "0123456789"


def get_config():
  config = default_config()
  config.workdir = "out/tiny"
  config.characters = DIGITS
  config.specials = ("<|transcribe|>", "<|end|>")
  config.eos = "<|end|>"
  config.trainable = ("encoders/.*", "connector/.*", "decoder/.*")

  config.model.encoders = ("sanm_large",)
  config.model.connector = "linear"
  config.model.decoder = "qwen2_0.5b"
  # A chat prompt of 150 characters is long beside 2 s of speech.
  config.model.chat_template = "bare"
  config.model.prompts = {"asr": "<|transcribe|>"}
  config.model.max_audio_s = 5.0
  config.model.sanm = dict(hidden_size=128, layers=5, heads=4, intermediate_size=512)
  config.model.linear = dict(hidden_size=256)
  config.model.llm = dict(vocab_size=16, hidden_size=128, intermediate_size=384)
  config.model.llm.update(layers=3, heads=4, kv_heads=2, head_dim=32)

  config.data.shards = "out/demo/shards/train/data.list"
  config.data.batch_size = 32
  config.data.buckets = (32, 48, 84)  # LFR steps of 60 ms; each is compiled once
  config.data.answer_buckets = (8,)
  config.data.min_s = 0.2
  config.data.max_s = 5.0
  config.data.shuffle_buffer_size = 1024

  config.optimizer.peak_lr = 2e-3
  config.optimizer.warmup = "linear"
  config.optimizer.warmup_steps = 100
  config.optimizer.decay = "cosine"
  config.optimizer.total_steps = 1600
  config.optimizer.betas = (0.9, 0.98)
  config.optimizer.max_grad_norm = 1.0

  config.train.steps = 1600
  config.train.log_every = 10
  config.train.save_every = 800
  config.train.max_to_keep = 2
  config.train.cmvn = "estimate"

  config.generation.max_new_tokens = 8
  config.eval.shards = "out/demo/shards/test/data.list"
  config.eval.batch_size = 50
  config.eval.metric = "character"
  return config
