import math

import jax
import pytest

from mooer_jax.training.schedule import make_schedule
from tests.numerics import assert_within, exceeds_the_bound, rounding

# A rate is a handful of float32 operations, with a logarithm or cosine that is good to 2 ulp.
OPERATIONS = 8


def schedule(**changes):
  defaults = {"peak_lr": 1e-4, "warmup_steps": 1000, "total_steps": 1_000_000}
  return make_schedule(**{**defaults, **changes})


def test_mooers_published_learning_rate():
  # The training log of the release: five digits.
  assert f"{float(schedule()(600)):.4e}" == "9.2605e-05"


def test_log_warmup_starts_at_zero_and_follows_the_logarithm():
  lr = schedule()
  assert float(lr(0)) == 0.0
  assert float(lr(1)) == 0.0
  for step in (2, 10, 999):
    expected = 1e-4 * math.log(step) / math.log(1000)
    assert_within(lr(step), expected, rounding(OPERATIONS, expected))
    with exceeds_the_bound():
      assert_within(lr(step + 1), expected, rounding(OPERATIONS, expected))


def test_linear_decay_is_continuous_and_ends_at_zero():
  lr = schedule()
  bound = rounding(OPERATIONS, 1e-4)
  assert_within(lr(1000), 1e-4, bound)
  assert_within(lr(500_500), 0.5e-4, bound)
  with exceeds_the_bound():
    assert_within(lr(500_600), 0.5e-4, bound)
  assert float(lr(1_000_000)) == 0.0
  assert float(lr(2_000_000)) == 0.0


@pytest.mark.parametrize(
  ("decay", "half", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_linear_warmup_with_each_decay(decay, half, end):
  lr = schedule(peak_lr=2.0, warmup="linear", warmup_steps=10, total_steps=110, decay=decay)
  values = [float(lr(step)) / 2 for step in (0, 5, 10, 60, 110)]
  assert_within(values, [0, 0.5, 1, half, end], rounding(OPERATIONS))


@pytest.mark.parametrize("warmup_steps", [0, 1, 2])
@pytest.mark.parametrize("warmup", ["log", "linear"])
def test_tiny_warmups_reach_the_peak(warmup, warmup_steps):
  lr = schedule(warmup=warmup, warmup_steps=warmup_steps, decay="constant")
  assert_within(lr(warmup_steps), 1e-4, rounding(OPERATIONS, 1e-4))


def test_a_traced_step_gives_the_same_rate():
  assert_within(jax.jit(schedule())(600), schedule()(600), rounding(OPERATIONS, 1e-4))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"warmup": "cubic"}, "warmup='cubic'"),
    ({"decay": "step"}, "decay='step'"),
    ({"warmup_steps": -1}, "warmup_steps=-1"),
    ({"total_steps": 1000}, "total_steps=1000 leaves no room"),
  ],
)
def test_impossible_schedules_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    schedule(**changes)


def test_salmonns_schedule():
  """Its scheduler: linear from 1e-6 to 3e-5, then a cosine to 1e-5 that counts from step 0."""
  schedule = make_schedule(
    peak_lr=3e-5, warmup_steps=3000, total_steps=90_000, warmup="linear",
    decay="cosine_from_start", start_lr=1e-6, end_lr=1e-5,
  )  # fmt: skip
  bound = rounding(OPERATIONS, 3e-5)
  for step in (0, 1, 1500, 2999):
    assert_within(schedule(step), 1e-6 + (3e-5 - 1e-6) * step / 3000, bound)
  for step in (3000, 3001, 45_000, 89_999, 90_000):
    cosine = 0.5 * (1 + math.cos(math.pi * step / 90_000))
    assert_within(schedule(step), 1e-5 + (3e-5 - 1e-5) * cosine, bound)
  with exceeds_the_bound():  # one that counts from the end of the warmup
    assert_within(schedule(45_000), 1e-5 + 1e-5 * (1 + math.cos(math.pi * 42 / 87)), bound)
  with pytest.raises(ValueError, match="end_lr=0.001 must lie"):
    make_schedule(peak_lr=1e-4, warmup_steps=1, total_steps=9, end_lr=1e-3)
