"""Numeric bounds that hold on every processor, each derived from dtype, size and magnitude.

Two correct programs differ by rounding: processors add in another order, fuse a product with a sum
or round exp otherwise. A bound is therefore never what one machine happened to show. It is either
`rounding(...)`, computed from the number of rounded terms and their magnitude, or the error of a
reference implementation against the same computation in float64 (`assert_as_accurate`).
"""

import contextlib
import copy
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# In units of eps * sqrt(terms) * scale: adding one term after the other errs by 0.2 (a rounding has
# a standard deviation of 0.3 eps, and partial sums grow to the scale), two evaluations differ by
# 0.3, and the largest of a million differences is 5 times that, 1.4.
ROOM = 8


class BoundExceeded(AssertionError):
  """Two results differ by more than rounding explains."""


def rounding(terms, scale=1.0, dtype=np.float32):
  """Bound on the difference between two evaluations of the same formula in `dtype`.

  A sum of n terms, added in any order, is off by a random walk of n steps, each at most eps / 2 of
  the partial sum. The bound is `ROOM` * eps * sqrt(n) * scale.

  Args:
    terms: roundings in a row: the terms of the longest sum, times the layers if the scale does not
      account for depth as that of `condition` does.
    scale: magnitude of the values that are rounded, which is not that of the result where terms
      cancel; a number, an array or a tree of them, for example from `condition`.
    dtype: floating dtype that the values are rounded to.

  Returns:
    the bound, in the structure of `scale`.
  """
  unit = ROOM * float(jnp.finfo(dtype).eps) * terms**0.5
  return jax.tree.map(lambda x: unit * np.asarray(x, np.float64), scale)


def log_energy_rounding(exact_TF, *, terms, peak_T1=None, per_neper=1.0, share=1.0):
  """Bound on the rounding of log energies in float32, for each element.

  The energy and its logarithm are rounded. Before that, a DFT of `terms` samples errs by the
  rounding of the frame's peak amplitude, and the energy of a bin that is weaker by a factor of
  exp(depth) changes by 2 exp(depth / 2) of it.

  Args:
    exact_TF: float [T, F], log energies, one frame a row.
    terms: samples in a frame.
    peak_T1: float [T, 1], the largest log energy of each frame before any pre-emphasis; by default
      that of `exact_TF`.
    per_neper: the factor of the natural logarithm of an energy.
    share: magnitude of the float32 products of the DFT relative to the frame's peak; 0 for a DFT in
      float64.
  """
  exact_TF = np.asarray(exact_TF, np.float64)
  peak_T1 = exact_TF.max(axis=1, keepdims=True) if peak_T1 is None else peak_T1
  depth_TF = np.maximum(peak_T1 - exact_TF, 0) / per_neper
  result = rounding(2, np.abs(exact_TF).max(initial=0))
  return result + 2 * per_neper * share * rounding(terms, np.exp(depth_TF / 2))


def condition(function, *arguments, draws=3, of_rows=False):
  """Change of each output per relative change of all inputs: the `scale` to give to `rounding`.

  A program that rounds returns what exact arithmetic returns for inputs that are off by a few
  roundings (backward stability). So all floating leaves of `arguments` (weights too) are moved by
  one unit in the last place at random. This accounts for depth, cancellation and nonlinearities,
  and costs no compilation where `function` is jitted. The root mean square of an output's changes
  estimates its standard deviation, and that of the most sensitive output counts. From three draws,
  the largest of a million estimates is 3 times too high, so bounds are rather wide than narrow.

  Args:
    function: returns an array or a tree of arrays.
    arguments: arrays or trees of arrays. Only floating leaves are moved.
    draws: number of random moves.
    of_rows: if True, one result for each row along the last axis, for outputs some of whose rows
      (frames, slots) are far more sensitive than others; otherwise one for the whole array.

  Returns:
    a tree like that of the outputs, of arrays that broadcast with them: the largest deviation over
    eps of the inputs' dtype, and at least the largest magnitude of the output.
  """
  rng = np.random.default_rng(0)
  eps = [
    float(jnp.finfo(x.dtype).eps)
    for x in map(np.asarray, jax.tree.leaves(arguments))
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]

  def moved(x):
    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    up = rng.random(x.shape) < 0.5
    return np.nextafter(x, np.where(up, np.inf, -np.inf).astype(x.dtype))

  def largest(x):
    return np.abs(x).max(axis=-1 if of_rows else None, keepdims=of_rows, initial=0)

  def scale(output, *again):
    output = _float64(output)
    squares = sum((_float64(x) - output) ** 2 for x in again)
    return np.maximum(largest(output), largest(np.sqrt(squares / draws)) / max(eps))

  again = [function(*jax.tree.map(moved, arguments)) for _ in range(draws)]
  return jax.tree.map(scale, function(*arguments), *again)


def score_rounding(transcriber, clips, *, same_features=False, **options):
  """Bound on the difference between two evaluations of the sum of the scores of clips in float32.

  The longest sum on the way to a score is the DFT of 512 samples, or the product with 560 features
  if these are the same, bit for bit.
  """

  def score(params, clips=clips):
    moved = copy.copy(transcriber)
    moved.params = params
    return np.float64(sum(result.score for result in moved.transcribe(clips, **options)))

  inputs = [transcriber.params] if same_features else [transcriber.params, clips]
  return float(rounding(560, condition(score, *inputs)))


def assert_within(actual, expected, bound):
  """Asserts that every element of `actual` is within `bound` of `expected`.

  Args:
    actual, expected: arrays of the same shape, or trees of them. One number may be expected of all.
    bound: a number or an array that broadcasts, or a tree of them like that of `actual`.

  Raises:
    BoundExceeded: naming the largest difference, its place and the bound. NaN exceeds any bound.
    AssertionError: if the shapes differ.
  """
  structure = jax.tree.structure(actual)
  assert structure == jax.tree.structure(expected), "the trees differ in structure"
  if jax.tree.structure(bound) != structure:
    bound = jax.tree.map(lambda _: bound, actual)
  leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), jax.tree.leaves(bound))
  for (path, _), leaf in zip(jax.tree_util.tree_leaves_with_path(actual), leaves, strict=True):
    _assert_leaf_within(*leaf, jax.tree_util.keystr(path))


def assert_as_accurate(ours, theirs, truth, *, floor):
  """Asserts that our error against `truth` is at most twice that of a reference plus a floor.

  Args:
    ours, theirs: results in the same dtype, of the same shape.
    truth: the same computation in float64.
    floor: what two correct implementations may differ by on a processor on which the reference
      rounds luckily: `rounding(...)` at the magnitude of the values.

  Raises:
    BoundExceeded: naming our largest error and the bound.
  """
  theirs = np.abs(_float64(theirs) - _float64(truth)).max(initial=0)
  assert np.isfinite(theirs), "the reference is not finite"
  assert_within(ours, truth, 2 * theirs + floor)


@contextlib.contextmanager
def exceeds_the_bound():
  """Passes if the block raises `BoundExceeded`: for tests that a deliberate fault is noticed."""
  with pytest.raises(BoundExceeded):
    yield


def rounded_to(dtype, values):
  """A deliberate fault: the floating leaves of a tree, rounded to a smaller dtype."""

  def rounded(x):
    x = np.asarray(x)
    return x.astype(dtype).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(rounded, values)


def _float64(x):
  return np.asarray(x).astype(np.float64)


def _assert_leaf_within(actual, expected, bound, name):
  actual, expected = _float64(actual), _float64(expected)
  assert expected.shape in (actual.shape, ()), f"{name}: shapes {actual.shape}, {expected.shape}"
  bound, expected = (np.broadcast_to(x, actual.shape) for x in (bound, expected))
  if not actual.size:
    return
  with np.errstate(invalid="ignore"):  # equal infinities do not differ
    error = np.where(actual == expected, 0, np.abs(actual - expected))
  share = np.where(error == 0, 0, error / np.maximum(bound, np.finfo(np.float64).tiny))
  share = np.where(np.isnan(share), np.inf, share)
  at = np.unravel_index(share.argmax(), share.shape)
  if log := os.environ.get("MOOER_TEST_BOUNDS_LOG"):
    with open(log, "a", encoding="utf-8") as file:
      test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
      print(f"{share[at]:.2e}\t{error[at]:.2e}\t{bound[at]:.2e}\t{test}{name}", file=file)
  if share[at] > 1:
    place = ", ".join(map(str, at))
    raise BoundExceeded(
      f"{name or 'result'}[{place}] is {actual[at]:.9g}, expected {expected[at]:.9g}: the"
      f" difference {error[at]:.3g} exceeds {bound[at]:.3g}; {(share > 1).sum()} of {share.size}"
      " elements do"
    )
