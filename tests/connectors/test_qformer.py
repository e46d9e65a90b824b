import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mooer_jax import tree
from mooer_jax.connectors.qformer import (
  QFormerAttention,
  QFormerConfig,
  WindowedQFormer,
  num_tokens,
  shortest_frames,
)
from mooer_jax.nn.compute import ExecutionConfig
from tests import tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

SMALL = QFormerConfig(
  window=5, stride=5, queries=2, hidden_size=24, layers=2, heads=3, intermediate_size=40
)
WIDTH, OUT = 16, 10
LONGEST = 40  # terms of the longest sum, that of the MLP
EDGES = pytest.mark.parametrize("edge", ["drop", "pad"])
STRIDES = pytest.mark.parametrize("stride", [5, 3])


def small(**changes):
  return dataclasses.replace(SMALL, **changes)


def make(config=SMALL, frames=21, **compute):
  """A connector, random params in its layout, frames [3, T, D]."""
  x_BTD = np.random.default_rng(0).normal(size=(3, frames, WIDTH)).astype(np.float32)
  valid = np.ones((3, frames), bool)
  shapes = jax.eval_shape(WindowedQFormer(config, OUT).init, jax.random.key(0), x_BTD, valid)
  params = tiny.random_params(shapes["params"])
  connector = WindowedQFormer(config, OUT, ExecutionConfig(**compute))
  return connector, tree.stack_layers(params) if connector.compute.scan else params, x_BTD


@functools.partial(jax.jit, static_argnums=0)
def apply(connector, params, x_BTD, valid_BT, **kwargs):
  return connector.apply({"params": params}, x_BTD, valid_BT, **kwargs)


def run(connector, params, x_BTD, frames_B=None, **kwargs):
  B, T = x_BTD.shape[:2]
  valid_BT = np.arange(T) < np.reshape([T] * B if frames_B is None else frames_B, (-1, 1))
  tokens, valid = apply(connector, params, x_BTD, valid_BT, **kwargs)
  return np.asarray(tokens), np.asarray(valid)


def torch_windows(frames, config):
  """How many windows torch's unfold cuts, after padding as little as keeps every frame."""
  padding = 0
  while True:
    length = frames + padding
    windows = 0
    if length >= config.window:
      windows = torch.zeros(length).unfold(0, config.window, config.stride).shape[0]
    heard = (windows - 1) * config.stride + config.window if windows else 0
    if config.edge == "drop" or heard >= frames:
      return windows
    padding += 1


@given(st.integers(0, 60), st.integers(1, 9), st.data())
def test_counts_are_those_of_torch(frames, window, data):
  stride = data.draw(st.integers(1, window))
  edge = data.draw(st.sampled_from(["drop", "pad"]))
  config = small(window=window, stride=stride, edge=edge)
  assert num_tokens(frames, config) == 2 * torch_windows(frames, config)
  shortest = shortest_frames(config)
  assert num_tokens(shortest - 1, config) == 0 and num_tokens(shortest, config) == 2


def test_30_seconds_give_88_or_89_tokens():
  assert num_tokens(1500, QFormerConfig()) == 88
  assert num_tokens(1500, QFormerConfig(edge="pad")) == 89


@EDGES
@STRIDES
@pytest.mark.parametrize("frames", [5, 7, 21])
def test_as_many_tokens_as_counted_valid_as_for_the_clip_alone(edge, stride, frames):
  config = small(stride=stride, edge=edge)
  connector, params, x_BTD = make(config, frames)
  for shorter in range(frames + 1):
    tokens, valid = run(connector, params, x_BTD, [frames, shorter, 0])
    assert tokens.shape == (3, num_tokens(frames, config), OUT)
    counts = [num_tokens(n, config) for n in (frames, shorter, 0)]
    np.testing.assert_array_equal(valid, np.arange(tokens.shape[1]) < np.array(counts)[:, None])


@EDGES
@STRIDES
def test_a_clip_gives_the_same_alone_and_in_any_batch(edge, stride):
  config = small(stride=stride, edge=edge)
  connector, params, x_BTD = make(config)
  frames_B = [21, 13, 6]
  x_BTD[1, 13:], x_BTD[2, 6:] = 1e4, np.nan
  together, valid = run(connector, params, x_BTD, frames_B)
  bound = rounding(LONGEST, sensitivity(connector, params, x_BTD, frames_B))
  for n, frames in enumerate(frames_B):
    alone, alone_valid = run(connector, params, x_BTD[n : n + 1, :frames])
    assert alone_valid.all() and valid[n].sum() == alone.shape[1]
    assert_within(together[n, valid[n]], alone[0], bound[n, valid[n]])


def sensitivity(connector, params, x_BTD, frames_B=None):
  """To rounding of each token: [B, S, 1]."""
  tokens = lambda *x: run(connector, *x, frames_B)[0]  # noqa: E731
  return condition(tokens, params, x_BTD, of_rows=True)


@pytest.mark.parametrize("fault", ["gain 1.001", "one frame later", "one window later", "eps"])
def test_a_fault_exceeds_the_bound(fault):
  connector, params, x_BTD = make()
  expected, _ = run(connector, params, x_BTD)
  bound = rounding(LONGEST, sensitivity(connector, params, x_BTD))
  if fault == "gain 1.001":
    x_BTD = x_BTD * np.float32(1.001)
  elif fault == "one frame later":
    x_BTD = np.roll(x_BTD, 1, axis=1)
  elif fault == "eps":
    connector = WindowedQFormer(small(norm_eps=1e-3), OUT)
  else:
    x_BTD = np.roll(x_BTD, SMALL.stride, axis=1)
  with exceeds_the_bound():
    assert_within(run(connector, params, x_BTD)[0], expected, bound)


@EDGES
@pytest.mark.parametrize("stride", [5, 3, 1])
def test_one_window_later_in_is_one_window_later_out(edge, stride):
  config = small(stride=stride, edge=edge)
  connector, params, x_BTD = make(config)
  tokens, _ = run(connector, params, x_BTD)
  shifted, _ = run(connector, params, np.pad(x_BTD, ((0, 0), (stride, 0), (0, 0))))
  assert shifted.shape[1] == tokens.shape[1] + config.queries
  bound = rounding(LONGEST, sensitivity(connector, params, x_BTD))
  assert_within(shifted[:, config.queries :], tokens, bound)


@EDGES
@STRIDES
def test_a_token_depends_on_all_frames_of_its_window_and_no_others(edge, stride):
  config = small(stride=stride, edge=edge)
  connector, params, x_BTD = make(config)
  valid = np.ones((1, 21), bool)
  jacobian = jax.jacrev(lambda x: apply(connector, params, x[None], valid)[0][0])(x_BTD[0])
  depends = np.abs(jacobian).max((1, 3)) > 0  # [tokens, frames]
  first = stride * (np.arange(len(depends)) // config.queries)[:, None]
  frame = np.arange(21)
  np.testing.assert_array_equal(depends, (first <= frame) & (frame < first + config.window))


@EDGES
def test_other_frames_of_one_window_change_its_tokens_alone(edge):
  config = small(edge=edge)
  connector, params, x_BTD = make(config)
  before, _ = run(connector, params, x_BTD)
  x_BTD[:, 10:15] += 1
  after, _ = run(connector, params, x_BTD)
  changed = (before != after).any((0, 2))
  np.testing.assert_array_equal(np.flatnonzero(changed), [4, 5])


def test_queries_give_tokens_of_their_own():
  connector, params, x_BTD = make()
  tokens, _ = run(connector, params, x_BTD)
  assert np.abs(tokens[:, 0::2] - tokens[:, 1::2]).max() > 0.1


@functools.partial(jax.jit, static_argnums=0)
def gradient(connector, params, x_BTD, valid_BT):
  def loss(params):
    tokens, valid = connector.apply({"params": params}, x_BTD, valid_BT)
    return jnp.sin(jnp.where(valid[..., None], tokens, 0)).sum()

  return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("scan, remat", [(True, "none"), (True, "full")])
def test_scan_and_remat_change_neither_output_nor_gradient(scan, remat):
  valid = np.arange(21) < np.array([[21], [13], [0]])
  plain, params, x_BTD = make()
  scale = condition(lambda p: gradient(plain, p, x_BTD, valid), params)
  # A key's bias moves all scores of a query alike, so its gradient is rounding alone: of gradients
  # of the size of the others.
  floor = 0.01 * max(map(np.max, jax.tree.leaves(scale[1])))
  bound = rounding(LONGEST, jax.tree.map(lambda x: np.maximum(x, floor), scale))
  value, grads = gradient(*make(scan=scan, remat=remat), valid)
  expected = gradient(plain, params, x_BTD, valid)
  assert_within((value, tree.unstack_layers(grads)), expected, bound)
  with exceeds_the_bound():
    louder = gradient(plain, params, x_BTD * np.float32(1.001), valid)
    assert_within(louder, expected, bound)


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_acts_with_a_key_only(scan):
  connector, params, x_BTD = make(small(dropout=0.2), scan=scan)
  plain, _, _ = make(scan=scan)
  expected, _ = run(plain, params, x_BTD)
  np.testing.assert_array_equal(run(connector, params, x_BTD)[0], expected)
  one, again, two = (
    run(connector, params, x_BTD, rngs={"dropout": jax.random.key(n)})[0] for n in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  bound = rounding(LONGEST, sensitivity(plain, params, x_BTD))
  for other in (expected, two):
    with exceeds_the_bound():
      assert_within(one, other, bound)


def test_dropout_of_attention_weights_keeps_their_mean():
  config = small(dropout=0.3)
  rng = np.random.default_rng(0)
  x_NQD = rng.normal(size=(1, 2, 24)).astype(np.float32)
  keys_NSE = rng.normal(size=(1, 5, WIDTH)).astype(np.float32)
  attention = QFormerAttention(config, ExecutionConfig())
  params = tiny.random_params(attention.init(jax.random.key(0), x_NQD, keys_NSE)["params"])

  def dropped(key):
    return attention.apply({"params": params}, x_NQD, keys_NSE, rngs={"dropout": key})

  out = jax.vmap(dropped)(jax.random.split(jax.random.key(1), 4000))
  expected = attention.apply({"params": params}, x_NQD, keys_NSE)
  standard_error = np.std(out, 0) / 4000**0.5
  # 48 values: beyond 4.5 standard errors by chance once in 3000 keys, and this is one of them.
  assert (np.abs(out.mean(0) - expected) < 4.5 * standard_error).all()
  assert standard_error.min() > 1e-3


# With LoRA of rank 8 on q and v of 40 layers, 5120 wide, and two norms: the published 33 million.
@pytest.mark.parametrize("input_width, count", [(2048, 26_775_296), (512, 22_056_704)])
def test_the_real_sizes(input_width, count):
  shapes = (
    jax.ShapeDtypeStruct((1, 1500, input_width), jnp.float32),
    jax.ShapeDtypeStruct((1, 1500), bool),
  )
  trees = {}
  for scan in (False, True):
    connector = WindowedQFormer(QFormerConfig(), 5120, ExecutionConfig(scan=scan))
    trees[scan] = jax.eval_shape(connector.init, jax.random.key(0), *shapes)["params"]
  assert tree.stack_layers(trees[False]) == trees[True]
  assert sum(leaf.size for leaf in jax.tree.leaves(trees[False])) == count
  tokens, valid = jax.eval_shape(
    WindowedQFormer(QFormerConfig(), 5120).apply, {"params": trees[False]}, *shapes
  )
  assert tokens.shape == (1, 88, 5120) and valid.shape == (1, 88)


def test_bfloat16_is_close_and_takes_bfloat16_params():
  connector, params, x_BTD = make()
  expected, _ = run(connector, params, x_BTD)
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  tokens, _ = run(WindowedQFormer(SMALL, OUT, ExecutionConfig(dtype="bfloat16")), rounded, x_BTD)
  assert tokens.dtype == jnp.bfloat16
  # Products of bfloat16 are summed in float32, so one rounding of each input is all.
  bound = rounding(1, sensitivity(connector, params, x_BTD), jnp.bfloat16)
  assert_within(tokens, expected, bound)
  with exceeds_the_bound():
    assert_within(tokens[:, :-1], expected[:, 1:], bound[:, 1:])


@pytest.mark.parametrize(
  "edge, frames, message",
  [
    ("drop", 4, "window=5 .*edge='drop'.* of 4 encoder frames; 5 are needed.*edge='pad'"),
    ("pad", 0, "window=5 .*edge='pad'.* of 0 encoder frames; 1 are needed: give longer audio"),
  ],
)
def test_too_few_frames_for_a_token_are_refused(edge, frames, message):
  connector, params, x_BTD = make(small(edge=edge))
  with pytest.raises(ValueError, match=message):
    run(connector, params, x_BTD[:, :frames])


@pytest.mark.parametrize(
  "values, message",
  [
    ({"window": 0}, "qformer.window=0 must be positive"),
    ({"queries": -1}, "qformer.queries=-1"),
    ({"stride": 18}, "qformer.stride=18 .*qformer.window=17 .*at most 17"),
    ({"heads": 7}, "qformer.hidden_size=768 .* qformer.heads=7"),
    ({"edge": "keep"}, "qformer.edge='keep': use 'drop' or 'pad'"),
    ({"dropout": 1.0}, "qformer.dropout=1.0"),
  ],
)
def test_impossible_values_are_refused_by_name(values, message):
  with pytest.raises(ValueError, match=message):
    QFormerConfig(**values)
