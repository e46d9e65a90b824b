"""Activation tuning, stage 3 of SALMONN: 12 answers that it generates at a reduced LoRA scale.

Command:   python train.py --config=configs/salmonn_activation.py:7b
           --config.init_from=out/salmonn_7b_2/step_00090000 --config.activation.shards=stories.json
           --config.perplexity.shards=probe.json
Hardware:  all devices of a host hold a part of the model (mesh.tensor), for decoding the answers
           and for training. The train step of 13B has been compiled for 16 TPU v5e (4x4), see
           benchmarks/README.md; it has not run yet
Time:      not measured
Expected:  the published change of the 15 tasks (`eval.py --suite=salmonn`); not reproduced yet
"""

from configs import salmonn


def get_config(size: str = "7b"):
  config = salmonn.get_config(f"{size},2")
  config.workdir = f"out/salmonn_{size}_3"
  config.activation.task = "audio_story_telling"
  config.activation.lora_scale = 2.0  # half of the trained scale
  config.activation.clips = 12
  config.perplexity.instructions = ("audio_story_telling", "speech_audio_coreasoning")
  config.perplexity.batch_size = 1

  config.data.prompts = ""
  config.data.batch_size, config.data.shuffle_buffer_size = 1, 1
  config.data.workers = 0
  config.optimizer.warmup_steps = 0
  config.optimizer.decay = "constant"
  config.optimizer.peak_lr = 3e-5
  config.train.steps = 12
  config.train.log_every, config.train.save_every = 1, 12
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 1, -1
  return config
