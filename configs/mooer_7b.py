"""MooER-MTL's speech recogniser at full size: Paraformer-large, adapter, Qwen2-7B with LoRA.

Command:   python train.py --config=configs/mooer_7b.py --config.init_from=CKPT
           --config.data.shards=.../data.list
Hardware:  16 TPU v5e (4x4) or more, or 8 GPUs of 80 GB; memory for a mesh without hardware:
           python -m benchmarks.aot --config=configs/mooer_7b.py --topology=v5e:4x4
Time:      not measured yet
Expected:  the published figures of MooER-5K (aishell1 CER 1.93 %), not reproduced yet: that needs
           the 5,000 hours
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0
  config.workdir = "out/mooer_7b"
  config.init_from = ""  # a converted release: encoder, adapter, Qwen2-7B
  config.tokenizer = ""  # empty = the one of init_from
  config.trainable = ("connector/.*", "decoder/.*/lora_[ab]")

  config.model = ConfigDict()
  config.model.encoders = ("sanm_large",)
  config.model.connector = "linear"
  config.model.decoder = "qwen2_7b"
  config.model.template = "mooer"
  config.model.max_audio_s = 30.0
  config.model.llm = dict(lora_rank=64, lora_alpha=16.0, lora_dropout=0.05)

  config.compute = dict(dtype="bfloat16", remat="full", attention="auto")

  config.data = ConfigDict()
  config.data.shards = ""
  config.data.task = "asr"
  config.data.batch_size = 256  # MooER: 8 a GPU and 2 micro-batches on 16 GPUs
  config.data.buckets = (50, 100, 167, 250, 334)  # LFR steps of 60 ms, up to 20 s
  config.data.answer_buckets = (16, 32, 64, 128, 256)
  config.data.min_s = 0.2
  config.data.max_s = 20.0
  config.data.window = 2048
  config.data.workers = 8

  config.optimizer = ConfigDict()
  config.optimizer.peak_lr = 1e-4
  config.optimizer.warmup = "log"
  config.optimizer.warmup_steps = 1000
  config.optimizer.decay = "linear"
  config.optimizer.total_steps = 1_000_000

  config.train = ConfigDict()
  config.train.steps = 200_000
  config.train.accumulation = 2
  config.train.log_every = 20
  config.train.save_every = 20_000
  config.train.keep = 3
  config.train.cmvn = ""

  config.mesh = dict(data=1, fsdp=-1, tensor=1)
  config.generation = dict(max_new_tokens=200)
  config.eval = ConfigDict()
  config.eval.shards = ""
  config.eval.references = ""
  config.eval.task = "asr"
  config.eval.batch_size = 16
  config.eval.out = ""
  config.eval.metric = "mixed"
  config.eval.skip_missing = False  # True as MooER's own script
  config.eval.max_s = 0.0  # longest clip; 0 = data.max_s
  config.eval.bleu_tokenize = "13a"  # of translations into English; "zh" into Chinese
  return config
