"""A small SALMONN: released Whisper tiny.en and SmolLM2-135M, connected by a Q-Former.

Command:   make mini-salmonn
           (or, with the parts and data that it makes: python train.py
           --config=configs/mini_salmonn.py:digits, then :tasks)
Stages:    digits      transcription of digit strings; starts from the joined parts
           tasks       also translation into Spanish, counting, word detection; starts from digits
           real        digit strings of real speakers; starts from tasks
           sentences   an open vocabulary; starts from tasks
Hardware:  2 CPU cores
Time:      digits 34, tasks 18, real 48 minutes, beside other work
Expected:  after tasks, WER 4.92 % on 300 strings of held-out synthetic voices; after real, 0.59 %
           on 150 strings of a held-out real speaker; all scores: docs/salmonn.md
"""

from mooer_jax.prompts import read_prompts
from mooer_jax.run.config import default_config

PROMPTS = "configs/prompts/mini_salmonn.json"
# Trained on transcription alone, 3 of 4 words are correct after 120 steps; with the other tasks,
# after 250.
STEPS = dict(digits=600, tasks=400, real=800, sentences=400)
INIT_FROM = dict(digits="base", tasks="digits", real="tasks", sentences="tasks")


def get_config(stage: str = "tasks"):
  if stage not in STEPS:
    raise ValueError(f"configs/mini_salmonn.py:{stage}: must be one of {', '.join(STEPS)}")
  config = default_config()
  config.workdir = f"out/mini/{stage}"
  before = INIT_FROM[stage]
  config.init_from = f"out/mini/{before}"
  if before in STEPS:
    config.init_from += f"/step_{STEPS[before]:08d}"
  config.trainable = ("encoder_norms/.*", "connector/.*", "decoder/.*/lora_[ab]")

  config.model.encoders = ("whisper_tiny",)
  config.model.encoder_norm = True
  config.model.connector = "qformer"
  config.model.decoder = "smollm2_135m"
  config.model.chat_template = "chatml"
  config.model.prompts = {task: texts[0] for task, texts in read_prompts(PROMPTS).items()}
  config.model.max_audio_s = 10.0
  # A context of 10 s instead of Whisper's 30 s, without the silence after a clip: 7 times as fast.
  config.model.whisper = dict(context=500, trim=True)
  config.model.qformer = dict(
    queries=2, hidden_size=384, heads=6, intermediate_size=1536, edge="pad", dropout=0.1
  )
  config.model.llm = dict(lora_rank=8, lora_alpha=32.0, lora_dropout=0.1, lora_targets=("q", "v"))

  config.data.prompts = PROMPTS
  config.data.prompt_tokens = 12  # longest prompt with a question
  config.data.batch_size = 16
  config.data.shuffle_buffer_size = 1024
  config.data.min_s = 0.1
  # Log-mel frames of 10 ms. On a CPU, a step's time grows with its tokens: 16 clips have about 600.
  if stage == "sentences":
    config.data.max_s, config.data.buckets = 6.1, (200, 300, 400, 612)
    config.data.answer_buckets = (12,)
  else:
    config.data.max_s, config.data.buckets = 5.0, (100, 150, 200, 250, 300, 400, 502)
    config.data.answer_buckets = (10,)
  config.data.cache_features = "out/mini/cache"
  folder = "recordings" if stage == "real" else "data"
  config.data.shards = f"out/mini/{folder}/train_{stage}.json"
  if stage == "tasks":
    config.data.task = ""  # the task of each utterance
    config.data.task_weights = dict(asr=1.0, translate=0.4, count=0.4, keyword=0.4)

  config.optimizer.peak_lr = 1e-3 if stage in ("digits", "tasks") else 5e-4
  config.optimizer.warmup = "linear"
  config.optimizer.warmup_steps = 100 if stage == "digits" else 50
  config.optimizer.decay = "cosine"
  config.optimizer.total_steps = config.train.steps = STEPS[stage]
  config.optimizer.max_grad_norm = 1.0

  config.train.log_every = 20
  config.train.save_every = 200
  config.train.max_to_keep = 2

  config.generation.max_new_tokens = 32
  config.generation.num_beams = 1  # SALMONN: 4
  config.eval.shards = "out/mini/data/test_tasks.json"
  config.eval.task = ""
  config.eval.batch_size = 50
  return config
