"""What train.py and eval.py do, from a ConfigDict."""

from collections.abc import Callable

from mooer_jax.generation.loading import Loaded
from mooer_jax.programs.train import train_from_config
from mooer_jax.projects.salmonn import lora_sweep as sweep
from mooer_jax.projects.salmonn import suite
from mooer_jax.run import decoding
from mooer_jax.run import evaluate as evaluation
from mooer_jax.run import perplexity as perplexities
from mooer_jax.run.config import Run

train = train_from_config


def _of_config(function: Callable) -> Callable:
  return lambda config, *args, **options: function(Run.read(config), *args, **options)


evaluate = _of_config(evaluation.evaluate)
evaluate_suite = _of_config(suite.evaluate_suite)
lora_sweep = _of_config(sweep.lora_sweep)
perplexity = _of_config(perplexities.perplexity)
load: Callable[..., Loaded] = _of_config(decoding.load)
