"""Bounds of `convert verify`: the differences that rounding in float32 explains.

Two correct programs add in different orders. A sum of n terms is then off by a random walk of n
steps, so values differ by up to ROOM * eps * sqrt(n) * scale. The scale of a row of a stage is its
sensitivity: the change of its most sensitive value (root mean square over some draws), over eps,
when all weights and samples are moved by one unit in the last place, at random. It accounts for
depth, cancellation and nonlinearities.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mooer_jax import tree

ROOM = 8  # the largest of a million differences of two evaluations is at 1.4
DRAWS = 3
EPS = float(np.finfo(np.float32).eps)
FRAME = 512  # samples in a DFT

Stages = Callable[[Any, Sequence[np.ndarray]], Mapping[str, np.ndarray]]


def with_bounds(
  stages: Stages, params: Any, clips: Sequence[np.ndarray]
) -> tuple[Mapping[str, np.ndarray], dict[str, np.ndarray]]:
  """Runs a model on waveforms (float32 [N]), and derives the bound of every stage.

  Args:
    stages: (params, clips) to the values of each stage, float32 [..., D].

  Returns:
    The stages, and bounds [..., 1] on their differences from another implementation.
  """
  values = stages(params, clips)
  squares = {name: np.zeros(x.shape) for name, x in values.items()}
  rng = np.random.default_rng(0)
  for _ in range(DRAWS):
    for name, x in stages(moved(params, rng), moved(clips, rng)).items():
      squares[name] += (np.asarray(x, np.float64) - values[name]) ** 2
  # The longest sum: over the inputs of the widest kernel, or over the samples of a frame.
  kernels = [x for path, x in tree.flatten(params).items() if path.endswith("/kernel")]
  terms = max([FRAME if clips else 1, *(math.prod(x.shape[:-1]) for x in kernels)])
  unit = ROOM * EPS * math.sqrt(terms)
  deviations = {name: np.sqrt(x / DRAWS) / EPS for name, x in squares.items()}
  return values, {
    name: unit * np.maximum(_largest(x), _largest(deviations[name])) for name, x in values.items()
  }


def moved(values: Any, rng: np.random.Generator) -> Any:
  """Moves every float32 of a tree by one unit in the last place, up or down at random."""

  def move(x):
    up = rng.integers(0, 2, np.shape(x), np.int8)
    return np.nextafter(np.asarray(x), np.where(up, np.float32(np.inf), np.float32(-np.inf)))

  return jax.tree.map(move, values)


def _largest(x: np.ndarray) -> np.ndarray:
  return np.abs(np.asarray(x, np.float64)).max(axis=-1, keepdims=True, initial=0)
