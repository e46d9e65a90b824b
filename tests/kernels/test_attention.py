import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.kernels import attention


def random_qkv(B=2, T=5, S=7, H=6, K=3, C=8, dtype=np.float32):
  rng = np.random.default_rng(0)
  q_BTHC = rng.normal(size=(B, T, H, C)).astype(dtype)
  k_BSKC, v_BSKC = rng.normal(size=(2, B, S, K, C)).astype(dtype)
  return q_BTHC, k_BSKC, v_BSKC


def numpy_attention(q_BTHC, k_BSKC, v_BSKC, sees_BTS, bias_BHTS=None):
  """Softmax attention written as loops in float64."""
  q_BTHC, k_BSKC, v_BSKC = (np.asarray(x, np.float64) for x in (q_BTHC, k_BSKC, v_BSKC))
  B, T, H, C = q_BTHC.shape
  group = H // k_BSKC.shape[2]
  out_BTHC = np.zeros(q_BTHC.shape)
  for b, t, h in np.ndindex(B, T, H):
    keys = np.flatnonzero(sees_BTS[b, t])
    if not keys.size:
      continue
    scores = k_BSKC[b, keys, h // group] @ q_BTHC[b, t, h] / np.sqrt(C)
    if bias_BHTS is not None:
      scores = scores + bias_BHTS[b, h, t, keys]
    weights = np.exp(scores - scores.max())
    out_BTHC[b, t, h] = weights / weights.sum() @ v_BSKC[b, keys, h // group]
  return out_BTHC


def causal_mask(T, S, first_query):
  return np.arange(S)[None] <= first_query + np.arange(T)[:, None]


@pytest.mark.parametrize("H, K", [(4, 4), (6, 3), (8, 1)])
@pytest.mark.parametrize("causal, first_query", [(False, 0), (True, 0), (True, 2)])
def test_equals_a_plain_softmax(H, K, causal, first_query):
  q, k, v = random_qkv(H=H, K=K)
  valid_BS = np.array([[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 0]], bool)
  sees_BTS = np.repeat(valid_BS[:, None], 5, 1)
  if causal:
    sees_BTS = sees_BTS & causal_mask(5, 7, first_query)
  out = attention(
    q, k, v, valid_BS=valid_BS, causal=causal, first_query=first_query, implementation="xla"
  )
  # Float32 sums of 8 and 7 terms against float64.
  np.testing.assert_allclose(out, numpy_attention(q, k, v, sees_BTS), atol=2e-6)


def test_first_query_may_be_traced():
  q, k, v = random_qkv()
  valid_BS = np.ones((2, 7), bool)
  call = functools.partial(attention, q, k, v, valid_BS=valid_BS, causal=True)
  expected = numpy_attention(q, k, v, np.repeat(causal_mask(5, 7, 1)[None], 2, 0))
  np.testing.assert_allclose(jax.jit(call)(first_query=1), expected, atol=2e-6)


@pytest.mark.parametrize("H, K", [(4, 4), (6, 3)])
def test_a_bias_is_added_to_the_scaled_scores_of_each_query_head(H, K):
  q, k, v = random_qkv(H=H, K=K)
  valid_BS = np.array([[1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]], bool)
  bias_BHTS = np.random.default_rng(1).normal(size=(2, H, 5, 7)).astype(np.float32)
  out = attention(q, k, v, valid_BS=valid_BS, bias_BHTS=bias_BHTS)
  sees_BTS = np.repeat(valid_BS[:, None], 5, 1)
  np.testing.assert_allclose(out, numpy_attention(q, k, v, sees_BTS, bias_BHTS), atol=2e-6)
  with pytest.raises(ValueError, match="'cudnn' takes no bias.*attention='xla'"):
    attention(q, k, v, valid_BS=valid_BS, bias_BHTS=bias_BHTS, implementation="cudnn")


def test_a_mask_adds_to_validity_and_order():
  q, k, v = random_qkv()
  valid_BS = np.array([[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 0]], bool)
  sees_BTS = np.random.default_rng(1).random((2, 5, 7)) < 0.6
  for causal in (False, True):
    out = attention(q, k, v, valid_BS=valid_BS, causal=causal, sees_BTS=sees_BTS)
    seen_BTS = sees_BTS & valid_BS[:, None] & (causal_mask(5, 7, 0) | (not causal))
    np.testing.assert_allclose(out, numpy_attention(q, k, v, seen_BTS), atol=2e-6)


def test_weights_are_multiplied_after_the_softmax():
  q, k, v = random_qkv()
  valid_BS, scale_BHTS = np.ones((2, 7), bool), np.zeros((2, 6, 5, 7), np.float32)
  call = functools.partial(attention, q, k, v, valid_BS=valid_BS)
  np.testing.assert_array_equal(call(weight_scale_BHTS=scale_BHTS + 2), 2 * call())
  scale_BHTS[1, 4, 2] = 3  # head 4 of 6 reads key-value head 2 of 3
  out = np.array(call(weight_scale_BHTS=scale_BHTS))
  np.testing.assert_allclose(out[1, 2, 4], 3 * call()[1, 2, 4], rtol=1e-6)
  out[1, 2, 4] = 0
  assert not out.any()
  # Each key's share alone: together they are the whole.
  shares = [call(weight_scale_BHTS=np.broadcast_to(one, (2, 6, 5, 7))) for one in np.eye(7)]
  np.testing.assert_allclose(sum(shares), call(), atol=2e-6)
  with pytest.raises(ValueError, match="'cudnn' drops no weights.*attention='xla'"):
    call(weight_scale_BHTS=scale_BHTS, implementation="cudnn")


def test_a_query_that_sees_no_key_gives_zeros_and_finite_gradients():
  q, k, v = random_qkv()
  valid_BS = np.array([[False] * 7, [False] + [True] * 6])  # causal: query 0 of row 1 sees none

  def call(q, k, v):
    return attention(q, k, v, valid_BS=valid_BS, causal=True)

  out = np.asarray(call(q, k, v))
  assert not out[0].any() and not out[1, 0].any() and out[1, 1:].all()
  gradients = jax.grad(lambda *x: jnp.square(call(*x)).sum(), argnums=(0, 1, 2))(q, k, v)
  assert all(np.isfinite(g).all() for g in gradients)
  assert not gradients[1][0].any() and not gradients[2][0].any()


def test_what_stands_at_an_invalid_key_does_not_matter():
  q, k, v = random_qkv()
  valid_BS = np.array([[1, 1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1, 1]], bool)
  before = attention(q, k, v, valid_BS=valid_BS)
  k[~valid_BS], v[~valid_BS] = 1e6, -1e6
  np.testing.assert_array_equal(attention(q, k, v, valid_BS=valid_BS), before)


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
  q, k, v = random_qkv()
  valid_BS = np.ones((2, 7), bool)
  rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  out = attention(*rounded, valid_BS=valid_BS)
  assert out.dtype == jnp.bfloat16
  expected = numpy_attention(*rounded, np.ones((2, 5, 7), bool))
  # Weights and outputs are rounded to 8 bits once each; values are of size 1.
  np.testing.assert_allclose(out.astype(np.float32), expected, atol=0.02)


def test_large_scores_do_not_overflow():
  q, k, v = random_qkv()
  out = attention(300 * q, 300 * k, v, valid_BS=np.ones((2, 7), bool))
  assert np.isfinite(out).all() and np.abs(out).max() <= np.abs(v).max()


def test_errors_name_the_value_and_the_choices():
  q, k, v = random_qkv(H=5, K=3)
  valid_BS = np.ones((2, 7), bool)
  with pytest.raises(ValueError, match="5 query heads .* 3 key-value heads"):
    attention(q, k, v, valid_BS=valid_BS)
  q, k, v = random_qkv()
  with pytest.raises(ValueError, match="'flash'.*'xla'"):
    attention(q, k, v, valid_BS=valid_BS, implementation="flash")


@pytest.mark.parametrize("backend, dtype", [("cpu", jnp.bfloat16), ("gpu", jnp.float16)])
def test_cudnn_is_refused_where_it_cannot_run(monkeypatch, backend, dtype):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  q, k, v = random_qkv(dtype=dtype)
  with pytest.raises(ValueError, match="'cudnn'.*bfloat16.*attention='xla'"):
    attention(q, k, v, valid_BS=np.ones((2, 7), bool), implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_equals_the_reference(causal):
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(T=64, S=64, H=8, K=2, C=64))
  valid_BS = jnp.arange(64)[None] >= jnp.array([[0], [7]])
  out, expected = (
    jax.jit(lambda n=name: attention(q, k, v, valid_BS=valid_BS, causal=causal, implementation=n))()
    for name in ("cudnn", "xla")
  )
  # Both round to bfloat16; values are of size 1.
  np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), atol=0.03)
