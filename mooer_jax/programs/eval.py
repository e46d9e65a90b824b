"""Decodes and scores a test set: eval.py --config=configs/tiny.py --checkpoint=FOLDER

--mode=perplexity and --mode=lora-sweep measure how strongly a model is bound to its training tasks;
--suite=salmonn runs SALMONN's 15 tasks on the annotation files of a folder; --mode=speech scores a
folder of spoken answers, without a checkpoint.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from mooer_jax.projects.salmonn.lora_sweep import lora_sweep
from mooer_jax.projects.salmonn.suite import evaluate_suite
from mooer_jax.run.config import Run
from mooer_jax.run.evaluate import evaluate
from mooer_jax.run.perplexity import perplexity
from mooer_jax.run.process import profile, run_program
from mooer_jax.run.speech_scoring import evaluate_speech


def main(argv: Sequence[str] | None = None) -> None:
  """Parses flags, evaluates, and exits; errors of the user are one line and status 2."""
  config = config_flags.DEFINE_config_file("config", lock_config=True)
  flags.DEFINE_multi_string(
    "checkpoint", None, "folder or URL of a checkpoint or a run; several with --mode=perplexity"
  )
  flags.DEFINE_string("base_checkpoint", None, "base of a fine-tune, if it has moved")
  flags.DEFINE_alias("base", "base_checkpoint")  # its name in version 0.1
  flags.DEFINE_enum(
    "mode", "score", ["score", "perplexity", "lora-sweep", "speech"], "what to measure"
  )
  flags.DEFINE_list("scales", [], "LoRA scales for --mode=perplexity and lora-sweep")
  flags.DEFINE_list(
    "instructions", [], "tasks whose prompts --mode=perplexity also measures, besides no prompt"
  )
  flags.DEFINE_enum("suite", None, ["salmonn"], "benchmark suite to run")
  flags.DEFINE_string("annotations", None, "folder of the suite's annotation files")
  flags.DEFINE_string("trace", None, "folder for a profile of the program, for XProf or Perfetto")
  run_program(
    lambda: _evaluate(config.value, flags.FLAGS),
    argv,
    needs=["config"],
    doc=__doc__,
    remedy="lower eval.batch_size (perplexity.batch_size), generation.num_beams or"
    " generation.max_new_tokens, or use more devices (mesh)",
  )


def _evaluate(config, given) -> None:
  _check_flags(given)
  try:
    scales = [float(scale) for scale in given.scales]
  except ValueError as error:
    raise ValueError(f"--scales={','.join(given.scales)}: numbers are needed") from error
  run, base = Run.read(config), given.base_checkpoint
  path = given.checkpoint[0] if given.checkpoint else ""
  with profile(given.trace):
    if given.suite:
      evaluate_suite(run, path, given.annotations, base=base)
    elif given.mode == "perplexity":
      perplexity(run, given.checkpoint, instructions=given.instructions, scales=scales, base=base)
    elif given.mode == "speech":
      evaluate_speech(run)
    elif given.mode == "lora-sweep":
      lora_sweep(run, path, scales=scales, base=base)
    else:
      evaluate(run, path, base=base)


def _check_flags(given) -> None:
  """Raises ValueError for a flag that would have no effect, or one that is missing."""
  if given.suite and given.mode != "score":
    raise ValueError(f"--suite={given.suite} takes no --mode={given.mode}")
  mode = "suite" if given.suite else given.mode
  effective = {
    "scales": ("perplexity", "lora-sweep"),
    "instructions": ("perplexity",),
    "annotations": ("suite",),
  }
  for name, modes in effective.items():
    if getattr(given, name) and mode not in modes:
      flag = " or ".join("--suite" if m == "suite" else f"--mode={m}" for m in modes)
      raise ValueError(f"--{name} has no effect without {flag}")
  if mode == "speech":
    for name in ("checkpoint", "base_checkpoint"):
      if getattr(given, name):
        raise ValueError(f"--{name} has no effect with --mode=speech, which scores speech.folder")
  elif not given.checkpoint:
    raise ValueError("--checkpoint is missing")
  elif len(given.checkpoint) > 1 and mode != "perplexity":
    raise ValueError("several --checkpoint need --mode=perplexity")
  if given.suite and not given.annotations:
    raise ValueError("--suite needs --annotations=FOLDER")
