import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.nn.layers import Dense, LayerNorm, RMSNorm


def with_lora(key=0, rank=4, **kwargs):
  """A layer, its params with a random B, and an input [3, 5, 8]."""
  layer = Dense(6, use_bias=True, rank=rank, **kwargs)
  x = np.random.default_rng(1).normal(size=(3, 5, 8)).astype(np.float32)
  params = layer.init(jax.random.key(key), x)["params"]
  if rank:
    params["lora_b"] = jax.random.normal(jax.random.key(2), (rank, 6))
  return layer, params, x


def test_is_the_formula():
  layer, p, x = with_lora()
  out = layer.apply({"params": p}, x, 0.5)
  expected = x @ p["kernel"] + p["bias"] + 0.5 * (x @ p["lora_a"]) @ p["lora_b"]
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_scale_may_differ_from_row_to_row():
  layer, p, x = with_lora()
  scales = jnp.array([0.0, 0.5, 2.0])
  out = layer.apply({"params": p}, x, scales)
  alone = [layer.apply({"params": p}, x[i : i + 1], scales[i])[0] for i in range(3)]
  np.testing.assert_allclose(out, jnp.stack(alone), atol=1e-6)


def test_rank_0_has_no_lora_and_scale_0_is_plain():
  layer, p, x = with_lora()
  plain, plain_params, _ = with_lora(rank=0)
  assert set(plain_params) == {"kernel", "bias"}
  expected = plain.apply({"params": {k: p[k] for k in plain_params}}, x)
  np.testing.assert_array_equal(layer.apply({"params": p}, x, 0.0), expected)


def test_lora_starts_as_nothing_but_learns():
  layer = Dense(6, rank=4)
  x = jnp.ones((2, 8))
  params = layer.init(jax.random.key(0), x)["params"]
  assert not params["lora_b"].any() and params["lora_a"].all()
  grads = jax.grad(lambda p: layer.apply({"params": p}, x).sum())(params)
  assert grads["lora_b"].any()


def test_dropout_acts_on_lora_only_and_only_with_a_key():
  layer, p, x = with_lora(dropout=0.5)
  without, _, _ = with_lora()
  apply = lambda **kwargs: layer.apply({"params": p}, x, **kwargs)  # noqa: E731
  np.testing.assert_array_equal(apply(), without.apply({"params": p}, x))
  one, two = (apply(rngs={"dropout": jax.random.key(n)}) for n in (0, 1))
  assert not np.allclose(one, two)
  rngs = {"dropout": jax.random.key(0)}
  base = layer.apply({"params": p}, x, 0.0)
  np.testing.assert_array_equal(layer.apply({"params": p}, x, 0.0, rngs=rngs), base)
  draw = jax.vmap(lambda key: apply(rngs={"dropout": key}))
  mean = draw(jax.random.split(jax.random.key(0), 1000)).mean(0)
  # A draw deviates by about 2, so the mean of 1000 by 0.06.
  assert np.abs(mean - apply()).mean() < 0.15


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_computes_in_its_dtype_whatever_the_storage(dtype):
  layer, p, x = with_lora(dtype=jnp.dtype(dtype))
  p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
  assert layer.apply({"params": p}, x).dtype == dtype


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
