"""Decodes and scores a test set: python eval.py --config=configs/tiny.py --checkpoint=FOLDER"""

from mooer_jax.programs.eval import main

if __name__ == "__main__":
  main()
