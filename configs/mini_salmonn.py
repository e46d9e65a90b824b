"""A small SALMONN: Whisper tiny.en and SmolLM2-135M as released, a Q-Former between them.

Command:   make mini-salmonn    (or, with the pieces that it makes, python train.py
           --config=configs/mini_salmonn.py:digits, and then :tasks)
Stages:    digits, transcription of strings of digits, from the joined parts. tasks, from there:
           seven tasks, sentences with an open vocabulary. real, from digits as well: strings of
           real speakers among the synthetic ones.
Hardware:  2 CPU cores
Time:      digits 25 min and tasks 25 min at the 0.4 and 0.33 updates/s that a busy machine gave,
           and 5 to 10 min for speech, weights and the encoder's frames
Expected:  docs/salmonn.md
"""

from mooer_jax.prompts import read_prompts
from mooer_jax.run.defaults import default_config

PROMPTS = "configs/prompts/mini_salmonn.json"
STAGES = ("digits", "tasks", "real")


def get_config(stage: str = "tasks"):
  if stage not in STAGES:
    raise ValueError(f"configs/mini_salmonn.py:{stage}: the stages are {', '.join(STAGES)}")
  config = default_config()
  config.workdir = f"out/mini/{stage}"
  config.init_from = "out/mini/base" if stage == "digits" else "out/mini/digits/step_00000600"
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

  config.data.prompts = PROMPTS
  config.data.prompt_tokens = 12  # of a prompt with a question
  config.data.batch_size = 16
  config.data.window = 1024
  config.data.buckets = (150, 250, 400, 612)  # log-mel frames of 10 ms
  config.data.answer_buckets = (13,) if stage == "tasks" else (10,)
  config.data.min_s = 0.1
  config.data.max_s = 6.1
  config.data.cache_features = "out/mini/cache"
  if stage == "tasks":
    config.data.shards = "out/mini/data/train.json"
    config.data.task = ""  # each utterance's own
    config.data.task_weights = dict(
      asr=1.0, count=0.3, translate=0.6, keyword=0.4, sex=0.3, speakers=1.5, arithmetic=1.5
    )
  else:
    folder = dict(digits="data", real="recordings")[stage]
    config.data.shards = f"out/mini/{folder}/train_{stage}.json"

  # On the CPU a step's time is that of its tokens: 16 clips are about 600.
  steps = dict(digits=600, tasks=500, real=250)[stage]
  config.optimizer.peak_lr = 1e-3 if stage == "digits" else 5e-4
  config.optimizer.warmup = "linear"
  config.optimizer.warmup_steps = 100 if stage == "digits" else 20
  config.optimizer.decay = "cosine"
  config.optimizer.total_steps = steps
  config.optimizer.grad_clip = 1.0

  config.train.steps = steps
  config.train.log_every = 20
  config.train.save_every = 200
  config.train.keep = 2

  config.generation.max_new_tokens = 32
  config.eval.shards = "out/mini/data/test_voices.json"
  config.eval.task = ""
  config.eval.batch_size = 50
  return config
