"""Records and checkpoints of runs, and how equal those of two runs must be."""

import json
import math
from pathlib import Path

import jax
import numpy as np

from mooer_jax import checkpoint, tree
from tests.numerics import assert_within

BETAS = 0.9, 0.98  # of configs/tiny.py
EPS = float(np.finfo(np.float32).eps)


def rows(workdir):
  return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
  return [(row["step"], row["loss"]) for row in rows(workdir)]


def content(folder):
  """(Arrays of a checkpoint by path: parameters and state; the positions in the data)."""
  saved = json.loads((folder / "checkpoint.json").read_text())["train_state"]
  wanted = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in saved.items()}
  state, positions = checkpoint.load_train_state(folder, tree.unflatten(wanted))
  return {**tree.flatten(checkpoint.load(folder).params), **tree.flatten(state)}, positions


def newest(workdir):
  return content(checkpoint.latest(workdir))[0]


def assert_same_run(a, b):
  """For runs of equal numbers of processes: equal bit for bit."""
  assert losses(a) == losses(b)
  ours, theirs = newest(a), newest(b)
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def assert_close_run(a, b):
  """For runs of other numbers of processes on four devices, whose sums have other orders.

  The devices compute the same. Only their four losses and gradients g are added otherwise, which
  errs by at most e = 2 * 3 * 2^-24 = 4e-7 of the sum of the |g|. In first order:

  - Moments are linear in the gradients. Those of few rows cancel each other in part, so the sum of
    the |g| is a multiple of the norm of the whole. 1e-4 of the norm is left to moments.
  - Adam normalises also a gradient that is 0 but for rounding. So a weight differs by at most the
    updates of both runs: of each step, lr times the bound of the first moment over the root of the
    second (Cauchy-Schwarz), which is 2.4 at step 1 and falls.
  - A loss changes with a weight by 2 lr e of the sum of its |g|: the smaller the gradient, the
    larger the share of the error in the update. The sum is at most sqrt(8e4 weights) times a norm
    of about 3, so with the lr of 5e-3, a step changes the loss by 3e-6. 1e-5 of it is its bound.
  - BLAS may sum the products of a feature in another order, so an estimated CMVN may be rounded
    to a neighbouring float32; 4 units in the last place are left to it.

  Raises:
    BoundExceeded: if they differ more.
  """
  ours, theirs = rows(a), rows(b)
  assert [row["step"] for row in ours] == [row["step"] for row in theirs]
  b1, b2 = BETAS
  of_weights = 2 / math.sqrt(1 - b1**2 / b2) * sum(row["lr"] for row in theirs)
  ours, theirs = ([row["loss"] for row in of] for of in (ours, theirs))
  assert_within(np.array(ours), np.array(theirs), 1e-5 * np.array(theirs))
  ours, theirs = newest(a), newest(b)
  moments = [[path for path in theirs if f"/{name}/" in path] for name in ("mu", "nu")]
  of_trained = {path.partition("/mu/")[2]: theirs[path] for path in moments[0]}
  trained = tree.flatten(tree.unstack_layers(tree.unflatten(of_trained)))
  assert trained and trained.keys() < theirs.keys()
  bounds = dict.fromkeys(theirs, 0.0) | dict.fromkeys(trained, of_weights)
  bounds |= {
    path: 4 * EPS * np.abs(x) for path, x in theirs.items() if path.startswith("frontend/")
  }
  bounds["bad/mean_loss"] = 1e-5 * float(theirs["bad/mean_loss"])
  for paths in moments:
    norm = math.sqrt(sum(np.square(theirs[path], dtype=np.float64).sum() for path in paths))
    bounds |= dict.fromkeys(paths, 1e-4 * norm)
  assert_within(ours, theirs, bounds)
