"""Training stages 1 and 2 of SALMONN, 7B and 13B; the config argument is SIZE,STAGE.

Command:   python -m convert join out/salmonn/base CKPT/whisper CKPT/beats CKPT/vicuna
           python train.py --config=configs/salmonn.py:7b,1 --config.init_from=out/salmonn/base
           --config.data.shards=stage1.json
           python train.py --config=configs/salmonn.py:7b,2
           --config.init_from=out/salmonn_7b_1/step_00090000 --config.data.shards=stage2.json
Stages:    1   pre-training: speech recognition and audio captioning
           2   instruction tuning: the 12 tasks, about 4,400 hours
           3   activation tuning: configs/salmonn_activation.py
           Stages 1 and 2 differ only in annotation files and initial checkpoint, because SALMONN
           publishes one schedule.
Hardware:  16 TPU v5e (4x4), with 64 clips of 30 s in an optimizer step; it has not run yet. The
           memory that it needs is in benchmarks/README.md; to compute it for another mesh:
           python -m benchmarks.aot --config=configs/salmonn.py:7b,1 --topology=v5e:4x4
Time:      not measured
Expected:  the published scores, which `eval.py --suite=salmonn` prints; not reproduced yet
"""

from mooer_jax.prompts import SALMONN_PROMPTS, read_prompts
from mooer_jax.run.config import default_config

SIZES = {"7b": "vicuna_7b", "13b": "vicuna_13b"}
ITERATIONS = 3000  # optimizer steps in an epoch, as SALMONN counts it


def get_config(chosen: str = "7b,1"):
  size, _, stage = chosen.partition(",")
  if size not in SIZES or stage not in ("1", "2"):
    raise ValueError(
      f"configs/salmonn.py:{chosen}: must be SIZE,STAGE with SIZE 7b or 13b and STAGE 1 or 2"
    )
  config = default_config()
  config.workdir = f"out/salmonn_{size}_{stage}"
  config.trainable = ("encoder_norms/.*", "connector/.*", "decoder/.*/lora_[ab]")

  config.model.encoders = ("whisper_large", "beats_iter3")
  config.model.encoder_norm = True
  config.model.connector = "qformer"
  config.model.decoder = SIZES[size]
  config.model.chat_template = "vicuna"
  config.model.prompts = {task: texts[0] for task, texts in read_prompts(SALMONN_PROMPTS).items()}
  config.model.max_audio_s = 30.0
  config.model.min_audio_s = 1.0
  config.model.channel = "first"
  config.model.qformer = dict(window=17, stride=17, queries=1, edge="drop", dropout=0.1)
  config.model.llm = dict(lora_rank=8, lora_alpha=32.0, lora_dropout=0.1, lora_targets=("q", "v"))

  config.compute.dtype = "bfloat16"
  config.compute.remat = "full"

  config.data.shards = ""
  config.data.task = ""  # the task of each utterance
  config.data.prompts = str(SALMONN_PROMPTS)
  config.data.prompt_tokens = 128
  config.data.batch_size = 64  # SALMONN: 8 per GPU
  config.data.shuffle_buffer_size = 2048
  config.data.buckets = (3000,)  # log-mel frames of 10 ms: Whisper always takes 30 s
  config.data.answer_buckets = (64, 300)
  config.data.min_s = 0.1
  config.data.max_s = 30.0
  config.data.truncate = True
  config.data.workers = 8

  config.optimizer.peak_lr = 3e-5
  config.optimizer.start_lr = 1e-6
  config.optimizer.end_lr = 1e-5
  config.optimizer.warmup = "linear"
  config.optimizer.warmup_steps = ITERATIONS
  config.optimizer.decay = "cosine_from_start"
  config.optimizer.total_steps = 30 * ITERATIONS
  config.optimizer.weight_decay = 0.05

  config.train.steps = 30 * ITERATIONS
  config.train.save_every = ITERATIONS

  config.mesh.data, config.mesh.fsdp = 1, -1
  config.generation.num_beams = 4
  config.generation.max_new_tokens = 300
  config.eval.truncate = True
  config.eval.task = ""
  return config
