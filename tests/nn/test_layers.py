import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mooer_jax.nn.layers import Dense, LayerNorm, RMSNorm, gelu
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding


def with_lora(key=0, rank=4, **kwargs):
  """A layer, its params with a random B, and an input [3, 5, 8]."""
  layer = Dense(6, use_bias=True, rank=rank, **kwargs)
  x = np.random.default_rng(1).normal(size=(3, 5, 8)).astype(np.float32)
  params = layer.init(jax.random.key(key), x)["params"]
  if rank:
    params["lora_b"] = jax.random.normal(jax.random.key(2), (rank, 6))
  return layer, params, x


def check_formula(*, scale_error=0.0, bias_error=0.0):
  layer, p, x = with_lora()
  out = layer.apply({"params": p}, x, 0.5)
  x, p = np.float64(x), jax.tree.map(np.float64, p)
  lora = (0.5 + scale_error) * (x @ p["lora_a"]) @ p["lora_b"]
  expected = x @ p["kernel"] + p["bias"] + bias_error + lora
  # Eight terms of the kernel and four of LoRA, each of which is a sum of eight.
  assert_within(out, expected, rounding(8 + 4, np.abs(expected).max()))


def test_is_the_formula():
  check_formula()


@pytest.mark.parametrize("fault", [{"scale_error": 1e-3}, {"bias_error": 1e-4}], ids=str)
def test_another_formula_is_noticed(fault):
  with exceeds_the_bound():
    check_formula(**fault)


def test_scale_may_differ_from_row_to_row():
  layer, p, x = with_lora()
  scales = np.float32([0.0, 0.5, 2.0])
  bound = rounding(8, condition(lambda p, x: layer.apply({"params": p}, x, scales), p, x))
  out = layer.apply({"params": p}, x, scales)
  alone = lambda scales: [layer.apply({"params": p}, x[i : i + 1], scales[i])[0] for i in range(3)]  # noqa: E731
  assert_within(out, jnp.stack(alone(scales)), bound)
  with exceeds_the_bound():
    assert_within(out, jnp.stack(alone(scales * np.float32(1.001))), bound)


def test_rank_0_has_no_lora_and_scale_0_is_plain():
  layer, p, x = with_lora()
  plain, plain_params, _ = with_lora(rank=0)
  assert set(plain_params) == {"kernel", "bias"}
  expected = plain.apply({"params": {k: p[k] for k in plain_params}}, x)
  # Equal on every processor: outside of jit each operation is a program of its own, and y + 0 is y.
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
  drawn = draw(jax.random.split(jax.random.key(0), 1000))
  standard_error = drawn.std(0) / 1000**0.5
  assert (standard_error > 0).all()
  # The mean over 90 outputs of a deviation from the expectation is 0.8 standard errors.
  assert (np.abs(drawn.mean(0) - apply()) / standard_error).mean() < 1.6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_computes_in_its_dtype_whatever_the_storage(dtype):
  layer, p, x = with_lora(dtype=jnp.dtype(dtype))
  p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
  assert layer.apply({"params": p}, x).dtype == dtype


def layer_norm(x, scale, bias, eps):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def rms_norm(x, scale, eps):
  return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * scale


def check_layer_norm(*, offset=0.0, eps_error=0.0, expected=layer_norm):
  rng = np.random.default_rng(0)
  x, scale, bias = (
    np.float32(rng.normal(size=(4, 32)) + offset),
    *np.float32(rng.normal(size=(2, 32))),
  )
  out = LayerNorm(1e-5).apply({"params": {"scale": scale, "bias": bias}}, x)
  exact = expected(*map(np.float64, (x, scale, bias)), 1e-5 + eps_error)
  # The mean of 32 values is rounded at their magnitude, the rest at that of the result.
  assert_within(
    out, exact, rounding(32, np.abs(x).max() * np.abs(scale).max() + np.abs(exact).max())
  )


def one_pass_layer_norm(x, scale, bias, eps):
  """With var = mean(x^2) - mean(x)^2 in float32, which cancels."""
  x = x.astype(np.float32)
  variance = np.square(x).mean(-1, keepdims=True) - np.square(x.mean(-1, keepdims=True))
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + eps) * scale + bias


@pytest.mark.parametrize("offset", [0, 1000])
def test_layer_norm_in_float64(offset):
  check_layer_norm(offset=offset)


@pytest.mark.parametrize("fault", ["eps", "one pass", "biased by n - 1"])
def test_another_layer_norm_is_noticed(fault):
  with exceeds_the_bound():
    if fault == "eps":
      check_layer_norm(eps_error=1e-4)
    elif fault == "one pass":
      check_layer_norm(offset=5000, expected=one_pass_layer_norm)
    else:
      check_layer_norm(
        expected=lambda x, scale, bias, eps: layer_norm(x, scale * (31 / 32) ** 0.5, bias, eps)
      )


def check_rms_norm(*, size=1.0, eps_error=0.0):
  rng = np.random.default_rng(0)
  x, scale = np.float32(size * rng.normal(size=(4, 32))), np.float32(rng.normal(size=32))
  out = RMSNorm(1e-6).apply({"params": {"scale": scale}}, x)
  exact = rms_norm(np.float64(x), np.float64(scale), 1e-6 + eps_error)
  assert_within(out, exact, rounding(32, np.abs(exact).max()))


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_rms_norm_in_float64(size):
  check_rms_norm(size=size)


def test_an_epsilon_of_1e_5_instead_of_1e_6_is_noticed():
  with exceeds_the_bound():
    check_rms_norm(size=0.1, eps_error=9e-6)


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_bfloat16_is_rounded_only_at_the_end(make):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 512)), jnp.bfloat16)
  params = {"scale": jnp.ones(512, jnp.bfloat16)}
  if make is LayerNorm:
    params["bias"] = jnp.zeros(512, jnp.bfloat16)
  out = make(dtype=jnp.bfloat16).apply({"params": params}, x)
  assert out.dtype == jnp.bfloat16
  exact = make(dtype=jnp.float32).apply({"params": params}, x)
  np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("norm", [LayerNorm(1e-12), RMSNorm()])
def test_a_constant_or_zero_row_stays_finite(norm):
  variables = norm.init(jax.random.key(0), jnp.ones((1, 8)))
  assert np.isfinite(norm.apply(variables, jnp.zeros((1, 8)))).all()


def check_gelu(function):
  """In bfloat16: within one rounding of the exact values, tails included."""
  x = jnp.linspace(-6, 6, 1001).astype(jnp.bfloat16)
  exact = np.float64(x)
  exact = exact * scipy.special.ndtr(exact)
  np.testing.assert_allclose(np.float64(function(x)), exact, rtol=2**-8, atol=1e-7)


def test_gelu_is_rounded_once():
  check_gelu(gelu)


def test_gelu_in_bfloat16_is_noticed():
  with pytest.raises(AssertionError):
    check_gelu(lambda x: jax.nn.gelu(x, approximate=False))
