"""Trains a speech LLM: python train.py --config=configs/tiny.py [--config.key=value ...]"""

from mooer_jax.programs.train import main

if __name__ == "__main__":
  main()
