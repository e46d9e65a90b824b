"""Trains a speech LLM: train.py --config=configs/tiny.py [--config.key=value ...]"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from mooer_jax import hosts
from mooer_jax.projects.salmonn import activation
from mooer_jax.run.config import Run
from mooer_jax.run.perplexity import PerplexityEvaluator
from mooer_jax.run.process import run_program
from mooer_jax.run.train import train


def main(argv: Sequence[str] | None = None) -> None:
  """Parses flags, trains, and exits; errors of the user are one line on stderr and status 2."""
  config = config_flags.DEFINE_config_file("config", lock_config=True)
  flags.DEFINE_string("trace", None, "folder for a profile of three steps, for XProf or Perfetto")
  run_program(
    lambda: train_from_config(config.value, trace=flags.FLAGS.trace),
    argv,
    needs=["config"],
    doc=__doc__,
    remedy="lower data.batch_size or data.buckets, raise train.gradient_accumulation_steps, or use"
    " more devices (mesh)",
  )


def train_from_config(config: Mapping[str, Any], *, trace: str | None = None) -> Path:
  """Trains as a config says; `trace` and errors as in `run.train.train`.

  Returns:
    The folder of the last checkpoint; with activation.review, the workdir with the answers.
  """
  run = Run.read(config)
  run.check_training()
  run = activation.prepare(run)
  if run.activation.shards and run.activation.review:
    answers = activation.answers_file(run)
    hosts.say(f"edit {answers}, then run the same command with --config.activation.review=False")
    return run.workdir
  return train(run, [PerplexityEvaluator] if run.perplexity.shards else [], trace=trace)
