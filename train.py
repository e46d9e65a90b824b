"""Trains a speech LLM: python train.py --config=configs/tiny.py [--config.key=value ...]"""

from absl import app, flags, logging
from ml_collections import config_flags

from mooer_jax.run.process import one_line_errors, parse_flags
from mooer_jax.run.train import train

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)


def main(argv):
  del argv
  one_line_errors(lambda: train(_CONFIG.value))


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)  # Orbax tells of every file; --verbosity=0 brings it back
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=parse_flags)
