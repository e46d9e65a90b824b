"""How exactly matrix products are computed."""

from typing import Any

import jax
import jax.numpy as jnp


def precision(dtype: Any) -> jax.lax.Precision:
  """Float32 means float32 on every backend: GPUs would use TF32, TPUs bfloat16 passes."""
  return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT
