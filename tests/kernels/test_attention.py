import contextlib
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mooer_jax.kernels import attention, decode_attention, window_attention
from mooer_jax.kernels.attention.flash import Bias, flash_attention
from mooer_jax.kernels.choice import IMPLEMENTATIONS
from mooer_jax.sharding import make_mesh
from tests.kernels.plain import Inputs, attention_and_gradients, bounds, random_inputs
from tests.numerics import assert_within, exceeds_the_bound, rounding


def random_qkv(B=2, T=5, S=7, H=6, K=3, C=8, dtype=np.float32):
  return random_inputs(B, T, S, H, K, C, dtype)[:3]


def exact_attention(q_BTHC, k_BSKC, v_BSKC, attention_mask_BTS, bias_BHTS=None):
  inputs = Inputs(q_BTHC, k_BSKC, v_BSKC, do_BTHC=q_BTHC)
  return attention_and_gradients(inputs, attention_mask_BTS, bias_BHTS)[0]


def bound(q_BTHC, k_BSKC, v_BSKC):
  return bounds(Inputs(q_BTHC, k_BSKC, v_BSKC, do_BTHC=q_BTHC))[0]


def named(implementation):
  """Arguments that name an implementation, for a backend that has it."""
  return {"implementation": implementation, "platform": IMPLEMENTATIONS[implementation][-1]}


def causal_mask(T, S, first_query):
  return np.arange(S)[None] <= first_query + np.arange(T)[:, None]


@pytest.mark.parametrize("H, K", [(4, 4), (6, 3), (8, 1)])
@pytest.mark.parametrize("causal, first_query", [(False, 0), (True, 0), (True, 2)])
def test_equals_a_plain_softmax(H, K, causal, first_query):
  q, k, v = random_qkv(H=H, K=K)
  valid_BS = np.array([[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 0]], bool)
  attention_mask_BTS = np.repeat(valid_BS[:, None], 5, 1)
  if causal:
    attention_mask_BTS = attention_mask_BTS & causal_mask(5, 7, first_query)
  out = attention(
    q, k, v, valid_BS=valid_BS, causal=causal, first_query=first_query, implementation="xla"
  )
  assert_within(out, exact_attention(q, k, v, attention_mask_BTS), bound(q, k, v))


@pytest.mark.parametrize("fault", ["mask", "one key later", "scale", "head"])
def test_a_fault_exceeds_the_bound(fault):
  q, k, v = random_qkv()
  valid_BS = np.array([[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 0]], bool)
  expected = exact_attention(q, k, v, valid_BS[:, None] & causal_mask(5, 7, 2))
  arguments = dict(valid_BS=valid_BS, causal=True, first_query=2)
  assert_within(attention(q, k, v, **arguments), expected, bound(q, k, v))
  if fault == "mask":
    arguments["valid_BS"] = np.roll(valid_BS, 1, axis=1)
  elif fault == "one key later":
    arguments["first_query"] = 3
  elif fault == "scale":
    q = q * np.float32(1.001)
  else:
    q = np.roll(q, 1, axis=2)
  with exceeds_the_bound():
    assert_within(attention(q, k, v, **arguments), expected, bound(q, k, v))


def test_first_query_may_be_traced():
  q, k, v = random_qkv()
  valid_BS = np.ones((2, 7), bool)
  call = functools.partial(attention, q, k, v, valid_BS=valid_BS, causal=True)
  expected = exact_attention(q, k, v, np.repeat(causal_mask(5, 7, 1)[None], 2, 0))
  assert_within(jax.jit(call)(first_query=1), expected, bound(q, k, v))


@pytest.mark.parametrize("H, K", [(4, 4), (6, 3)])
def test_a_bias_by_distance_is_added_to_the_scaled_scores(H, K):
  q, k, v = random_qkv(H=H, K=K)
  valid_BS = np.array([[1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]], bool)
  rng = np.random.default_rng(1)
  bias = Bias(rng.normal(size=(2, 5, H)), rng.normal(size=(H, 5 + 7 - 1)))
  bias = Bias(*(x.astype(np.float32) for x in bias))
  bias_BHTS = np.zeros((2, H, 5, 7), np.float32)
  for b, h, t, s in np.ndindex(bias_BHTS.shape):
    bias_BHTS[b, h, t, s] = bias.gate_BTH[b, t, h] * bias.table_HR[h, s - t + 4]
  out = attention(q, k, v, valid_BS=valid_BS, bias=bias)
  expected = exact_attention(q, k, v, np.repeat(valid_BS[:, None], 5, 1), bias_BHTS)
  assert_within(out, expected, bound(q, k, v))
  with exceeds_the_bound():  # a bias scaled as the scores are
    scaled = bias._replace(gate_BTH=bias.gate_BTH * np.float32(8**-0.5))
    assert_within(attention(q, k, v, valid_BS=valid_BS, bias=scaled), expected, bound(q, k, v))


def test_decoding_attends_to_the_slots_of_a_mask():
  q, k, v = random_qkv()
  mask_BTS = np.random.default_rng(1).random((2, 5, 7)) < 0.6
  cache = [x.reshape(*x.shape[:2], -1) for x in (k, v)]
  out = decode_attention(q, *cache, kv_heads=3, mask_BTS=mask_BTS, end=7)
  assert_within(out, exact_attention(q, k, v, mask_BTS), bound(q, k, v))


def test_dropout_of_windows_multiplies_weights_after_the_softmax():
  q, k, v = random_qkv(H=6, K=6)
  scale_NHQL = np.zeros((2, 6, 5, 7), np.float32)
  call = functools.partial(window_attention, q, k, v)
  assert_within(call(), exact_attention(q, k, v, np.ones((2, 5, 7), bool)), bound(q, k, v))
  # Twice a float is exact.
  np.testing.assert_array_equal(call(weight_scale_NHQL=scale_NHQL + 2), 2 * call())
  scale_NHQL[1, 4, 2] = 3
  out = np.array(call(weight_scale_NHQL=scale_NHQL))
  assert_within(out[1, 2, 4], 3 * call()[1, 2, 4], 3 * bound(q, k, v))
  out[1, 2, 4] = 0
  assert not out.any()
  # The sum of each key's share equals the whole.
  shares = [call(weight_scale_NHQL=np.broadcast_to(one, (2, 6, 5, 7))) for one in np.eye(7)]
  assert_within(sum(shares), call(), bound(q, k, v))
  with exceeds_the_bound():
    assert_within(sum(shares[1:]), call(), bound(q, k, v))
  with pytest.raises(ValueError, match="6 query heads must be equal to 3 key-value heads"):
    window_attention(q, k[:, :, :3], v[:, :, :3])
  for name in ("cudnn", "mosaic", "triton"):
    with pytest.raises(ValueError, match=f"'{name}' does not support dropout.*attention='auto'"):
      call(weight_scale_NHQL=scale_NHQL, **named(name))


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
  expected = exact_attention(*rounded, np.ones((2, 5, 7), bool))
  # The weights, whose sum is 1, and the output are rounded to bfloat16, the rest to float32.
  of_values = rounding(2, np.abs(expected).max(), jnp.bfloat16)
  assert_within(out, expected, of_values)
  with exceeds_the_bound():
    assert_within(attention(*rounded, valid_BS=valid_BS, causal=True), expected, of_values)


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


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(q=np.ones((2, 5, 6, 8), int)), "q_BTHC is int64; expected float"),
    (
      dict(q=np.ones((1, 5, 6, 8))),
      r"k_BSKC has shape \(2, 7, 3, 8\); expected \[B=1, S, K, C=8\]",
    ),
    (dict(q=np.ones((2, 5, 6))), r"q_BTHC has shape \(2, 5, 6\); expected \[B, T, H, C\]"),
    (dict(v=np.ones((2, 6, 3, 8))), r"v_BSKC has shape .*S=7"),
    (dict(valid_BS=np.ones((2, 7), int)), "valid_BS is int64; expected bool"),
    (dict(valid_BS=np.ones((1, 7), bool)), r"valid_BS has shape \(1, 7\); expected \[B=2, S=7\]"),
    (
      dict(first_query=np.array([0, 2])),
      r"first_query=array\(\[0, 2\]\): must be an integer scalar",
    ),
    (dict(first_query=1.5), "first_query=1.5: must be an integer scalar"),
    (dict(bias=Bias(np.ones((2, 5, 6)), np.ones((6, 10)))), r"table_HR has shape .*H=6, R=11\]"),
  ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
  q, k, v = random_qkv()
  arguments = dict(q=q, k=k, v=v, valid_BS=np.ones((2, 7), bool)) | changes
  q, k, v = (arguments.pop(name) for name in "qkv")
  with pytest.raises(ValueError, match=message):
    attention(q, k, v, **arguments)


def test_a_cache_or_window_that_does_not_fit_is_refused():
  q, k, v = random_qkv()
  cache = [x.reshape(*x.shape[:2], -1) for x in (k, v)]
  with pytest.raises(ValueError, match=r"E=24 channels; expected .* = 2 \* 8"):
    decode_attention(q, *cache, kv_heads=2, mask_BTS=np.ones((2, 5, 7), bool), end=7)
  with pytest.raises(ValueError, match=r"mask_BTS has shape \(2, 1, 7\)"):
    decode_attention(q, *cache, kv_heads=3, mask_BTS=np.ones((2, 1, 7), bool), end=7)
  with pytest.raises(ValueError, match=r"k_NLKC has shape .*N=1"):
    window_attention(q[:1], k, v)


@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_kernels_have_the_arguments_that_xla_has_also_on_a_mesh(name, monkeypatch):
  interpreted = functools.partial(flash_attention, interpret=True)
  monkeypatch.setattr(sys.modules[attention.__module__], "flash_attention", interpreted)
  q, k, v = random_qkv(B=4, H=4, K=2, C=16)
  valid_BS = np.arange(7) >= np.array([[0], [2], [1], [0]])
  rng = np.random.default_rng(1)
  bias = [rng.normal(size=shape).astype(np.float32) for shape in ((4, 5, 4), (4, 5 + 7 - 1))]
  mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])

  def run(name, on_mesh, *, bias=None, **arguments):
    def loss(q, k, v, bias):
      context = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
      with context if on_mesh else contextlib.nullcontext():
        bias = bias and Bias(*bias)
        out = attention(q, k, v, valid_BS=valid_BS, bias=bias, **named(name), **arguments)
      return jnp.square(out).sum(), out

    inputs = jax.device_put((q, k, v, bias), NamedSharding(mesh, P()) if on_mesh else None)
    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)

  for arguments in ({"causal": True, "first_query": 2}, {"bias": bias}):
    expected = run("xla", False, **arguments)
    scale = 16 * bound(q, k, v)  # gradients of the square sum further products
    for on_mesh in (False, True):
      assert_within(run(name, on_mesh, **arguments), expected, scale)
  with exceeds_the_bound():
    shifted = run(name, True, causal=True, first_query=1)
    assert_within(shifted, run("xla", False, causal=True), scale)
  with pytest.raises(ValueError, match="2 key-value heads over mesh.tensor=4"):
    four = jax.sharding.AbstractMesh((1, 1, 4), ("data", "fsdp", "tensor"))
    with jax.sharding.use_abstract_mesh(four):
      attention(q, k, v, valid_BS=valid_BS, **named(name))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_equals_the_reference(causal):
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(T=64, S=64, H=8, K=2, C=64))
  valid_BS = jnp.arange(64)[None] >= jnp.array([[0], [7]])
  out, expected = (
    jax.jit(lambda n=name: attention(q, k, v, valid_BS=valid_BS, causal=causal, implementation=n))()
    for name in ("cudnn", "xla")
  )
  # Both round the weights and the output to bfloat16.
  assert_within(out, expected, rounding(2, float(jnp.abs(expected).max()), jnp.bfloat16))
