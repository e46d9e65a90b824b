import math

import jax
import numpy as np
import pytest

from mooer_jax.training.schedule import make_schedule


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
    # float32 logarithm: a few units in the last place
    assert float(lr(step)) == pytest.approx(1e-4 * math.log(step) / math.log(1000), rel=1e-6)


def test_linear_decay_is_continuous_and_ends_at_zero():
  lr = schedule()
  assert float(lr(1000)) == pytest.approx(1e-4, rel=1e-6)
  assert float(lr(500_500)) == pytest.approx(0.5e-4, rel=1e-5)
  assert float(lr(1_000_000)) == 0.0
  assert float(lr(2_000_000)) == 0.0


@pytest.mark.parametrize(
  ("decay", "half", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_linear_warmup_with_each_decay(decay, half, end):
  lr = schedule(peak_lr=2.0, warmup="linear", warmup_steps=10, total_steps=110, decay=decay)
  values = [float(lr(step)) / 2 for step in (0, 5, 10, 60, 110)]
  assert values == pytest.approx([0, 0.5, 1, half, end], abs=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 1, 2])
@pytest.mark.parametrize("warmup", ["log", "linear"])
def test_tiny_warmups_reach_the_peak(warmup, warmup_steps):
  lr = schedule(warmup=warmup, warmup_steps=warmup_steps, decay="constant")
  assert float(lr(warmup_steps)) == pytest.approx(1e-4, rel=1e-6)


def test_a_traced_step_gives_the_same_rate():
  assert float(jax.jit(schedule())(600)) == pytest.approx(float(schedule()(600)), rel=1e-6)


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
  for step in (0, 1, 1500, 2999):
    np.testing.assert_allclose(schedule(step), 1e-6 + (3e-5 - 1e-6) * step / 3000, rtol=1e-5)
  for step in (3000, 3001, 45_000, 89_999, 90_000):
    cosine = 0.5 * (1 + math.cos(math.pi * step / 90_000))
    np.testing.assert_allclose(schedule(step), 1e-5 + (3e-5 - 1e-5) * cosine, rtol=1e-5)
  with pytest.raises(ValueError, match="end_lr=0.001 must lie"):
    make_schedule(peak_lr=1e-4, warmup_steps=1, total_steps=9, end_lr=1e-3)
