import jax.numpy as jnp
import numpy as np

from mooer_jax.nn.positions import rope_angles, rotate, sinusoids
from tests.numerics import assert_within, exceeds_the_bound, rounding


def test_sinusoids_count_from_1_with_sines_first():
  table = sinusoids(50, 560)
  assert table.shape == (50, 560) and table.dtype == np.float32
  i = np.arange(280)
  angles = 7 * 10000.0 ** (-i / 279)
  exact = np.concatenate([np.sin(angles), np.cos(angles)])
  assert_within(table[6], exact, rounding(1))  # of values of size 1, computed in float64
  for wrong in (table[7], np.roll(table[6], 280), sinusoids(50, 560, first=0)[6]):
    with exceeds_the_bound():
      assert_within(wrong, exact, rounding(1))


def test_longer_table_starts_like_a_shorter_one():
  # NumPy may compute the sines at an array's end, where a vector does not fit, by another function.
  assert_within(sinusoids(500, 560)[:20], sinusoids(20, 560), rounding(1))


def test_rotation_keeps_lengths_and_depends_on_distance_only():
  rng = np.random.default_rng(0)
  q, k = (jnp.array(rng.normal(size=(1, 1, 1, 64)), jnp.float32) for _ in range(2))

  def score(query_at, key_at):
    rotated = [
      rotate(x, rope_angles(jnp.array([[n]]), 64, 1e6)) for x, n in ((q, query_at), (k, key_at))
    ]
    for rotated_x, x in zip(rotated, (q, k)):
      assert_within(jnp.linalg.norm(rotated_x), jnp.linalg.norm(x), rounding(64, 8.0))
    return float((rotated[0] * rotated[1]).sum())

  # Angles up to 25 are rounded at that magnitude; a score is a sum of 64 products of size 1.
  bound = rounding(1, 25 * 64**0.5) + rounding(64, 64**0.5)
  assert_within(score(9, 4), score(25, 20), bound)
  for query_at, key_at in ((9, 5), (10, 4)):
    with exceeds_the_bound():
      assert_within(score(9, 4), score(query_at, key_at), bound)


def test_position_0_is_no_rotation():
  x = jnp.ones((1, 1, 2, 8))
  np.testing.assert_array_equal(rotate(x, rope_angles(jnp.zeros((1, 1), int), 8, 1e4)), x)


def test_far_positions_stay_accurate():
  angles = np.asarray(rope_angles(jnp.array([[30_000]]), 128, 1e6))[0, 0]
  exact = 30_000 * 1e6 ** (-np.arange(0, 128, 2) / 128)
  # Exact on every processor: the rate and the product are rounded once each, by 2^-24.
  assert_within(angles, exact, 2.1 * 2.0**-24 * exact)
  with exceeds_the_bound():
    assert_within(angles * np.float32(30_001 / 30_000), exact, 2.1 * 2.0**-24 * exact)
