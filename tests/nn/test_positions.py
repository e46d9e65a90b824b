import jax.numpy as jnp
import numpy as np

from mooer_jax.nn.positions import rope_angles, rotate, sinusoids


def test_sinusoids_count_from_1_with_sines_first():
  table = sinusoids(50, 560)
  assert table.shape == (50, 560) and table.dtype == np.float32
  i = np.arange(280)
  angles = 7 * 10000.0 ** (-i / 279)
  np.testing.assert_allclose(table[6], np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-6)


def test_longer_table_starts_like_a_shorter_one():
  np.testing.assert_array_equal(sinusoids(500, 560)[:20], sinusoids(20, 560))


def test_rotation_keeps_lengths_and_depends_on_distance_only():
  rng = np.random.default_rng(0)
  q, k = (jnp.array(rng.normal(size=(1, 1, 1, 64)), jnp.float32) for _ in range(2))

  def score(query_at, key_at):
    rotated = [
      rotate(x, rope_angles(jnp.array([[n]]), 64, 1e6)) for x, n in ((q, query_at), (k, key_at))
    ]
    np.testing.assert_allclose(jnp.linalg.norm(rotated[0]), jnp.linalg.norm(q), rtol=1e-5)
    return float((rotated[0] * rotated[1]).sum())

  assert abs(score(9, 4) - score(25, 20)) < 1e-4  # float32 angles of size 25
  assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_position_0_is_no_rotation():
  x = jnp.ones((1, 1, 2, 8))
  np.testing.assert_array_equal(rotate(x, rope_angles(jnp.zeros((1, 1), int), 8, 1e4)), x)


def test_far_positions_stay_accurate():
  angles = np.asarray(rope_angles(jnp.array([[30_000]]), 128, 1e6))[0, 0]
  exact = 30_000 * 1e6 ** (-np.arange(0, 128, 2) / 128)
  # One rounding of the rate and one of the product: 2^-24 each, relative.
  np.testing.assert_allclose(angles, exact, rtol=1.3e-7)
