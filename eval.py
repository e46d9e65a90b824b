"""Decodes and scores a test set: python eval.py --config=configs/tiny.py --checkpoint=FOLDER"""

from absl import app, flags, logging
from ml_collections import config_flags

from mooer_jax.run.evaluate import evaluate
from mooer_jax.run.flags import one_line_errors, parse_flags

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "checkpoint folder, or training workdir")
_BASE = flags.DEFINE_string("base", None, "where the base of a fine-tune lies, if it moved")


def main(argv):
  del argv
  one_line_errors(lambda: evaluate(_CONFIG.value, _CHECKPOINT.value, base=_BASE.value))


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  flags.mark_flags_as_required(["config", "checkpoint"])
  app.run(main, flags_parser=parse_flags)
