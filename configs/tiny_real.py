"""The demo's model, trained on three real speakers in addition to the synthetic voices.

Command:   make demo; then the recordings and the shard list of docs/real-speech.md; then
           python train.py --config=configs/tiny_real.py
Hardware:  2 CPU cores
Time:      53 minutes of training, beside other work
Expected:  CER 5.6 % on a fourth speaker (docs/real-speech.md)
"""

from configs import tiny


def get_config():
  config = tiny.get_config()
  config.workdir = "out/real/train"
  config.data.shards = "out/real/shards/data.list"
  config.train.steps = 5000
  config.train.save_every = 1000
  config.optimizer.total_steps = 5000
  config.eval.shards = "out/real/shards/test/data.list"
  return config
