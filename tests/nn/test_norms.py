import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.nn.norms import LayerNorm, RMSNorm


def layer_norm(x, scale, bias, eps):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def rms_norm(x, scale, eps):
  return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * scale


@pytest.mark.parametrize("offset", [0, 1000])
def test_layer_norm_in_float64(offset):
  rng = np.random.default_rng(0)
  x, scale, bias = rng.normal(size=(4, 32)) + offset, rng.normal(size=32), rng.normal(size=32)
  x = x.astype(np.float32).astype(np.float64)
  params = {"scale": jnp.array(scale), "bias": jnp.array(bias)}
  out = LayerNorm(1e-12).apply({"params": params}, jnp.array(x))
  # At offset 1000 the float32 mean is off by 3e-5; a one-pass variance would be off by 0.1.
  np.testing.assert_allclose(out, layer_norm(x, scale, bias, 1e-12), atol=3e-4 if offset else 1e-5)


def test_rms_norm_in_float64():
  rng = np.random.default_rng(0)
  x, scale = rng.normal(size=(4, 32)), rng.normal(size=32)
  out = RMSNorm(1e-6).apply({"params": {"scale": jnp.array(scale)}}, jnp.array(x))
  np.testing.assert_allclose(out, rms_norm(x, scale, 1e-6), atol=1e-5)


@pytest.mark.parametrize("norm", [LayerNorm(), RMSNorm()])
def test_bfloat16_is_rounded_only_at_the_end(norm):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 512)), jnp.bfloat16)
  params = {"scale": jnp.ones(512, jnp.bfloat16)}
  if isinstance(norm, LayerNorm):
    params["bias"] = jnp.zeros(512, jnp.bfloat16)
  out = norm.apply({"params": params}, x)
  assert out.dtype == jnp.bfloat16
  exact = norm.apply({"params": params}, x.astype(jnp.float32))
  np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("norm", [LayerNorm(1e-12), RMSNorm()])
def test_a_constant_or_zero_row_stays_finite(norm):
  variables = norm.init(jax.random.key(0), jnp.ones((1, 8)))
  assert np.isfinite(norm.apply(variables, jnp.zeros((1, 8)))).all()
