"""A small SALMONN: Whisper tiny.en and SmolLM2-135M as released, a Q-Former between them.

Command:   make mini-salmonn    (or, with the pieces that it makes, python train.py
           --config=configs/mini_salmonn.py)
Hardware:  2 CPU cores
Time:      not measured yet
Expected:  not measured yet
"""

from mooer_jax.prompts import read_prompts
from mooer_jax.run.defaults import default_config

PROMPTS = "configs/prompts/mini_salmonn.json"


def get_config():
  config = default_config()
  config.workdir = "out/mini/train"
  config.init_from = "out/mini/base"
  config.trainable = ("encoder_norms/.*", "connector/.*", "decoder/.*/lora_[ab]")

  config.model.encoders = ("whisper_tiny",)
  config.model.encoder_norm = True
  config.model.connector = "qformer"
  config.model.decoder = "smollm2_135m"
  config.model.template = "chatml"
  config.model.prompts = {task: texts[0] for task, texts in read_prompts(PROMPTS).items()}
  config.model.max_audio_s = 10.0
  # 10 s in place of Whisper's 30, and nothing of the silence after a clip: 7 times as fast.
  config.model.whisper = dict(context=500, trim=True)
  config.model.qformer = dict(
    window=17, stride=17, queries=2, width=384, heads=6, mlp_width=1536, edge="pad", dropout=0.1
  )
  config.model.llm = dict(lora_rank=8, lora_alpha=32.0, lora_dropout=0.1, lora_targets=("q", "v"))

  config.data.shards = "out/mini/data/train.json"
  config.data.task = ""  # each utterance's own
  config.data.prompts = PROMPTS
  config.data.prompt_tokens = 24
  config.data.batch_size = 16
  config.data.window = 1024
  config.data.task_weights = dict(
    asr=2.0, count=0.3, translate=0.4, keyword=0.3, sex=0.3, speakers=1.0, arithmetic=1.0
  )
  config.data.buckets = (250, 500, 1000)  # log-mel frames of 10 ms
  config.data.answer_buckets = (24,)
  config.data.min_s = 0.1
  config.data.max_s = 10.0
  config.data.cache_features = "out/mini/cache"

  config.optimizer.peak_lr = 1e-3
  config.optimizer.warmup = "linear"
  config.optimizer.warmup_steps = 100
  config.optimizer.decay = "cosine"
  config.optimizer.total_steps = 1200
  config.optimizer.grad_clip = 1.0

  config.train.steps = 1200
  config.train.log_every = 20
  config.train.save_every = 200
  config.train.keep = 2

  config.generation.max_new_tokens = 32
  config.eval.shards = "out/mini/data/test_voices.json"
  config.eval.task = ""
  config.eval.batch_size = 50
  return config
