"""Activation tuning of the mini SALMONN, on stories that it generates at a reduced LoRA scale.

Command:   make mini-salmonn MINI_ARGS=--activation
           (or, after make mini-salmonn: python train.py --config=configs/mini_activation.py)
Hardware:  2 CPU cores
Time:      18 minutes, beside other work, with the answers and the perplexities at each step
Expected:  stories for 12 of 12 held-out clips instead of 0; WER 7.45 % instead of 4.92 %
           (docs/salmonn.md)
"""

from configs import mini_salmonn


def get_config():
  config = mini_salmonn.get_config("tasks")
  config.workdir = "out/mini/activation"
  config.init_from = f"out/mini/tasks/step_{mini_salmonn.STEPS['tasks']:08d}"
  config.activation.shards = "out/mini/data/train_digits.json"
  config.activation.task = "story"
  # A quarter of the trained scale: at half of it, some answers are still transcripts.
  config.activation.lora_scale = 1.0
  config.activation.clips = 20  # some answers reach max_new_tokens and are left out

  config.data.prompts = ""
  config.data.task_weights = {}
  config.data.cache_features = ""
  config.data.batch_size, config.data.shuffle_buffer_size = 1, 1
  config.data.buckets, config.data.answer_buckets = (502,), (48, 256)
  config.generation.max_new_tokens = 256  # stories that are cut off are not trained on
  config.optimizer.peak_lr = 3e-4  # 12 steps at 1e-4 change perplexities, but no answer
  config.optimizer.warmup_steps = 0
  config.optimizer.decay = "constant"
  config.train.steps = 12
  config.train.log_every, config.train.save_every = 1, 12
  config.perplexity.shards = "out/mini/data/probe.json"
  config.perplexity.instructions = ("story", "reply")
  config.perplexity.batch_size = 12
  config.eval.shards, config.eval.batch_size = config.perplexity.shards, 12
  return config
