"""The products with few rows, at tiny size."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cpu_products
from benchmarks.cpu_products import Sizes, measure, written


def test_all_forms_compute_the_same_product():
  result = measure(Sizes(rows=(1, 3), matrices=2, inputs=40, outputs=56, repeats=1))
  assert list(result) == ["1", "3"]
  for found in result.values():
    assert len(found) == 6 and found[cpu_products.BASE]["speed"] == 1
    for name, row in found.items():
      # A column's largest magnitude has 127 steps: a weight is off by up to 1/254 of 4 deviations.
      bound = 4 / 254 * 8 if "int8" in name else 8 * 40**0.5 * np.finfo(np.float32).eps
      assert row["relative_error"] < bound, name
      assert ("int8" in name) == (row["relative_error"] > 40 * np.finfo(np.float32).eps), name


def test_a_matrix_that_the_program_converts_is_counted():
  weight, x = jnp.ones((40, 56), jnp.int8), jnp.ones((3, 40))

  def converted(x, weight):
    return x @ jax.lax.optimization_barrier(weight.astype(jnp.float32))

  def plain(x, weight):
    return x @ weight

  for function, dtype, count in ((converted, jnp.int8, 1), (plain, jnp.float32, 0)):
    program = jax.jit(function).lower(x, weight.astype(dtype)).compile().as_text()
    assert written(program, (40, 56)) == count
