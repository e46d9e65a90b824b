"""The bounds hold for any order of summation, notice what is not rounding, and say where it is."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics import (
  BoundExceeded,
  assert_as_accurate,
  assert_within,
  condition,
  exceeds_the_bound,
  rounding,
)


def serial_sum(terms_N):
  total = terms_N.dtype.type(0)
  for term in terms_N:
    total += term
  return total


@pytest.mark.parametrize("terms", [2, 48, 1000])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("signs", ["equal", "random"])
def test_any_order_of_a_sum_is_within_the_bound_and_a_missing_term_is_not(terms, dtype, signs):
  rng = np.random.default_rng(0)
  x_N = rng.uniform(0.5, 1.5, terms) * (1 if signs == "equal" else rng.choice([-1, 1], terms))
  x_N = x_N.astype(dtype)
  partial = np.abs(np.cumsum(x_N.astype(np.float64))).max()  # magnitude of what is rounded
  bound = rounding(terms, scale=partial, dtype=dtype)
  exact = x_N.astype(np.float64).sum()
  for order in (np.arange(terms), np.arange(terms)[::-1], rng.permutation(terms)):
    assert_within(serial_sum(x_N[order]), exact, rounding(terms, np.abs(x_N).sum(), dtype))
  assert_within(serial_sum(x_N), exact, bound)
  if dtype == np.float32:
    with exceeds_the_bound():
      assert_within(serial_sum(x_N[1:]), exact, bound)


def test_the_condition_of_a_sum_that_cancels_is_that_of_its_terms():
  x_N = np.array([1000.0, 1.0, -1000.0], np.float32)
  found = condition(lambda x: x.astype(np.float64).sum(), x_N)
  # Each term of 1000 moves by one unit in the last place, which is at most eps * 1000.
  assert 500 <= found <= 2001
  # Of a product it is the magnitude of the result, up to one eps for each factor.
  found = condition(lambda x, y: {"product": x * y}, np.float32([3.0]), np.float32([5.0]))
  assert 15 <= found["product"] <= 31


def test_the_condition_is_that_of_the_most_sensitive_output_among_many_others():
  x_N = np.float32([1000, -1000, *np.ones(100_000)])

  def outputs(x_N):
    x_N = x_N.astype(np.float64)
    return np.append(x_N[2:] / 1e6, x_N[:2].sum())

  found = condition(outputs, x_N, draws=100)
  # Two terms move by one unit in the last place of 1000 each, half of 2**-13.
  deviation = 2**0.5 * 2.0**-14 / np.finfo(np.float32).eps
  assert 0.7 < found / deviation < 1.4


def test_the_condition_of_many_outputs_is_a_standard_deviation_and_notices_a_small_fault():
  x_BN = np.random.default_rng(0).normal(0, 1000, (256, 64)).astype(np.float32)
  x_BN[:, -1] -= x_BN.sum(1)  # cancels
  found = condition(lambda x: x.astype(np.float64).sum(-1), x_BN)
  moves_BN = np.spacing(np.abs(x_BN)).astype(np.float64)
  deviation = np.sqrt((moves_BN**2).sum(-1).mean()) / np.finfo(np.float32).eps
  assert 1 < found / deviation < 3  # the largest of 256 estimates, each from three draws
  exact_B, bound = x_BN.astype(np.float64).sum(-1), rounding(64, found)
  for order in (slice(None), slice(None, None, -1)):
    sums_B = np.array([serial_sum(x_N[order]) for x_N in x_BN])
    assert_within(sums_B, exact_B, bound)
  faulty_BN = x_BN.copy()
  faulty_BN[:, 0] *= np.float32(1.0002)
  with exceeds_the_bound():
    assert_within(faulty_BN.astype(np.float64).sum(-1), exact_B, bound)


def test_the_condition_moves_floats_only():
  found = condition(lambda x, n, on: x[n] * on, np.float32([1, 2]), np.array([1]), np.ones(1, bool))
  assert 2 <= found <= 3


def test_rows_have_conditions_of_their_own():
  x_BD = np.float32([[1, 2], [1000, -999.5]])
  found_B1 = condition(lambda x: x.sum(-1, keepdims=True), x_BD, of_rows=True)
  assert found_B1.shape == (2, 1) and found_B1[0] <= 4 and found_B1[1] > 100
  assert condition(lambda x: x.sum(-1, keepdims=True), x_BD) == found_B1.max()


def test_trees_have_a_bound_for_each_leaf():
  ours = {"a": np.float32([1, 2]), "b": [np.float32(3)]}
  off = {"a": np.float32([1, 2.5]), "b": [np.float32(3)]}
  assert_within(ours, ours, 0)
  assert_within((ours, 1), (ours, 1), (0, 0))
  assert_within(off, ours, {"a": 0.6, "b": [0]})
  with pytest.raises(BoundExceeded, match=r"\['a'\]\[1\] is 2.5, expected 2: .* 1 of 2"):
    assert_within(off, ours, {"a": 0.4, "b": [1]})
  with pytest.raises(BoundExceeded):
    assert_within(off, ours, 0.4)


def test_what_is_not_finite_exceeds_every_bound_but_equal_infinities():
  assert_within(np.float32([np.inf, 1]), np.float32([np.inf, 1]), 0)
  for value in (np.nan, np.inf, -np.inf):
    with exceeds_the_bound():
      assert_within(np.float32([value]), np.float32([1]), 1e30)


def test_shapes_are_not_broadcast():
  with pytest.raises(AssertionError, match=r"shapes \(2, 1\), \(2,\)"):
    assert_within(np.zeros((2, 1)), np.zeros(2), 1)
  assert_within(np.ones((2, 1)), 1.5, 0.5)


def test_accuracy_is_measured_against_the_truth():
  truth = np.array([1.0, 2.0])
  theirs = truth + [0, 1e-6]
  assert_as_accurate(truth + 1.9e-6, theirs, truth, floor=0)
  with exceeds_the_bound():
    assert_as_accurate(truth + 2.1e-6, theirs, truth, floor=0)
  assert_as_accurate(truth + 2.1e-6, theirs, truth, floor=2e-7)


def test_a_fault_that_is_not_noticed_fails():
  with pytest.raises(pytest.fail.Exception), exceeds_the_bound():
    assert_within(np.ones(1), np.ones(1), 0)
