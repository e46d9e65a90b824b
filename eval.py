"""Decodes and scores a test set: python eval.py --config=configs/tiny.py --checkpoint=FOLDER

--mode=perplexity and --mode=lora-sweep measure how strongly a model is bound to its training tasks;
--suite=salmonn runs SALMONN's 15 tasks on the annotation files of a folder.
"""

from absl import app, flags, logging
from ml_collections import config_flags

from mooer_jax.projects.salmonn.lora_sweep import lora_sweep
from mooer_jax.projects.salmonn.suite import evaluate_suite
from mooer_jax.run.evaluate import evaluate
from mooer_jax.run.perplexity import perplexity
from mooer_jax.run.process import one_line_errors, parse_flags

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_CHECKPOINT = flags.DEFINE_multi_string(
  "checkpoint", None, "checkpoint folder, or training workdir; perplexity takes several"
)
_BASE = flags.DEFINE_string("base", None, "where the base of a fine-tune lies, if it moved")
_MODE = flags.DEFINE_enum("mode", "score", ["score", "perplexity", "lora-sweep"], "what to do")
_SCALES = flags.DEFINE_list("scales", [], "LoRA scales of perplexity and lora-sweep")
_INSTRUCTIONS = flags.DEFINE_list(
  "instructions", [], "perplexity: tasks whose prompts are given, besides none"
)
_SUITE = flags.DEFINE_enum("suite", None, ["salmonn"], "run a suite of tasks")
_ANNOTATIONS = flags.DEFINE_string("annotations", None, "suite: folder of its annotation files")


def main(argv):
  del argv
  config, paths, base = _CONFIG.value, _CHECKPOINT.value, _BASE.value
  path = paths[0]
  if len(paths) > 1 and (_SUITE.value or _MODE.value != "perplexity"):
    raise app.UsageError("several --checkpoint are for --mode=perplexity")
  if _SUITE.value:
    if not _ANNOTATIONS.value:
      raise app.UsageError("--suite needs --annotations=FOLDER")
    one_line_errors(lambda: evaluate_suite(config, path, _ANNOTATIONS.value, base=base))
    return
  try:
    scales = [float(scale) for scale in _SCALES.value]
  except ValueError as error:
    raise app.UsageError(f"--scales={','.join(_SCALES.value)}: numbers are needed") from error
  if _MODE.value == "perplexity":
    one_line_errors(
      lambda: perplexity(config, paths, instructions=_INSTRUCTIONS.value, scales=scales, base=base)
    )
  elif _MODE.value == "lora-sweep":
    one_line_errors(lambda: lora_sweep(config, path, scales=scales, base=base))
  else:
    one_line_errors(lambda: evaluate(config, path, base=base))


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  flags.mark_flags_as_required(["config", "checkpoint"])
  app.run(main, flags_parser=parse_flags)
