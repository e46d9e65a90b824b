"""Speech recognition of MooER-MTL at full size: Paraformer-large, adapter, Qwen2-7B with LoRA.

Command:   python train.py --config=configs/mooer_7b.py --config.init_from=CKPT
           --config.data.shards=.../data.list
Hardware:  16 TPU v5e (4x4) or more, or 8 GPUs of 80 GB. To compute the memory that a mesh needs:
           python -m benchmarks.aot --config=configs/mooer_7b.py --topology=v5e:4x4
           Evaluation uses the same mesh; to split the layers instead, for faster decoding:
           --config.mesh.fsdp=1 --config.mesh.tensor=4
Time:      not measured yet
Expected:  the published CER of MooER-5K (aishell1 1.93 %), which needs its 5,000 hours of training
           data; not reproduced yet
"""

from mooer_jax.run.config import default_config


def get_config():
  config = default_config()
  config.workdir = "out/mooer_7b"
  config.trainable = ("connector/.*", "decoder/.*/lora_[ab]")

  config.model.encoders = ("sanm_large",)
  config.model.connector = "linear"
  config.model.decoder = "qwen2_7b"
  config.model.chat_template = "mooer"
  config.model.prompts = {"asr": "Transcribe speech to text. "}
  config.model.max_audio_s = 30.0
  config.model.llm = dict(lora_rank=64, lora_alpha=16.0, lora_dropout=0.05)

  config.compute.dtype = "bfloat16"
  config.compute.remat = "full"

  config.data.shards = ""
  config.data.batch_size = 256  # MooER: 8 per GPU, 16 GPUs, 2 micro-batches
  config.data.buckets = (50, 100, 167, 250, 334)  # LFR steps of 60 ms, up to 20 s
  config.data.answer_buckets = (32, 96, 256)  # x 5 buckets: 15 compiled programs
  config.data.workers = 8

  config.optimizer.peak_lr = 1e-4
  config.optimizer.warmup = "log"
  config.optimizer.warmup_steps = 1000
  config.optimizer.decay = "linear"
  config.optimizer.total_steps = 1_000_000

  config.train.steps = 200_000
  config.train.gradient_accumulation_steps = 2
  config.train.save_every = 20_000

  config.mesh.data, config.mesh.fsdp = 1, -1
  config.generation.max_new_tokens = 256
  return config
