import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import tree
from mooer_jax.config import DECODERS
from mooer_jax.decoders.llm import LLM, KVCache, LLMConfig, Placement
from mooer_jax.nn.compute import Compute
from tests import tiny

B, S = 3, 11
# Rows with holes: at the left, in the middle, at the right.
VALID_BS = np.ones((B, S), bool)
VALID_BS[1, :3] = VALID_BS[1, 6] = VALID_BS[2, 4:6] = VALID_BS[2, 9:] = False


def shapes_of(config, **compute):
  """(model, its parameters as shapes)."""
  model = LLM(config, Compute(**compute))
  inputs = jnp.zeros((1, 2, config.width)), jnp.ones((1, 2), bool)
  init = lambda key: model.init(key, *inputs, method=LLM.everything)  # noqa: E731
  return model, jax.eval_shape(init, jax.random.key(0))["params"]


def make(config=tiny.LLM_CONFIG, **compute):
  """(model, random params in its layout, inputs [B, S, D])."""
  _, shapes = shapes_of(config)
  params = tiny.random_params(shapes)
  model = LLM(config, Compute(**compute))
  inputs = np.random.default_rng(0).normal(size=(B, S, config.width)).astype(np.float32)
  return model, tree.stack_layers(params) if model.compute.scan else params, inputs


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *args, **kwargs):
  return model.apply({"params": params}, *args, **kwargs)


def run(model, params, inputs, valid, **kwargs):
  """Hidden states without a cache."""
  return np.asarray(apply(model, params, inputs, valid, **kwargs)[0])


@pytest.mark.parametrize(
  "name, count",
  [("qwen2_0.5b", 494_032_768), ("qwen2_1.5b", 1_543_714_304), ("qwen2_7b", 7_615_616_512)],
)
def test_named_sizes_have_the_published_parameter_counts(name, count):
  _, shapes = shapes_of(DECODERS[name])
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
  _, scanned = shapes_of(DECODERS[name], scan=True)
  assert tree.stack_layers(shapes) == scanned


def test_lora_on_7b_has_161_million_parameters():
  _, shapes = shapes_of(dataclasses.replace(DECODERS["qwen2_7b"], lora_rank=64), scan=True)
  lora, frozen = tree.partition(shapes, [".*/lora_[ab]"])
  # Per layer, rank x (in + out): q and o 2 x 7168, k and v 2 x 4096, gate, up and down 3 x 22528.
  assert sum(leaf.size for leaf in jax.tree.leaves(lora)) == 28 * 64 * 90_112
  assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) == 7_615_616_512


def test_holes_and_batch_size_change_nothing():
  model, params, inputs = make()
  together = run(model, params, inputs, VALID_BS)
  for n in range(B):
    keep = VALID_BS[n]
    alone = run(model, params, inputs[n : n + 1, keep], np.ones((1, keep.sum()), bool))
    # Sums run in another order when shapes change; outputs are of size 1.
    np.testing.assert_allclose(together[n, keep], alone[0], atol=2e-5)


def test_what_stands_in_a_hole_does_not_matter():
  model, params, inputs = make()
  before = run(model, params, inputs, VALID_BS)
  inputs[~VALID_BS] = 1e3
  np.testing.assert_array_equal(run(model, params, inputs, VALID_BS)[VALID_BS], before[VALID_BS])


@pytest.mark.parametrize("scan", [False, True])
def test_no_slot_sees_the_future_or_a_hole(scan):
  model, params, inputs = make(scan=scan)
  row, valid = inputs[2:3], VALID_BS[2:3]

  def per_slot(row):
    return model.apply({"params": params}, row, valid)[0][0].sum(-1)

  # gradient[t, s]: what slot t takes from slot s.
  gradient = np.abs(jax.jit(jax.jacobian(per_slot))(row)[:, 0]).sum(-1)
  expected = np.tril(np.ones((S, S), bool)) & valid[0]
  queries = valid[0]
  np.testing.assert_array_equal(gradient[queries] > 0, expected[queries])


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params, inputs, valid):
  def loss(params, inputs):
    hidden, _ = model.apply({"params": params}, inputs, valid)
    logits = model.apply({"params": params}, hidden, method=LLM.logits)
    return jnp.where(valid[..., None], jnp.sin(logits), 0).mean()

  return jax.value_and_grad(loss, argnums=(0, 1))(params, inputs)


def test_a_row_of_holes_stays_finite_also_backwards():
  valid = np.array([[True] * S, [False] * S, [False] + [True] * (S - 1)])
  value, grads = gradient(*make(), valid)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert not grads[1][1].any() and not grads[1][2, 0].any() and grads[1][0].any()


@pytest.mark.parametrize("scan, remat", [(True, "dots"), (True, "full"), (False, "full")])
def test_scan_and_remat_change_neither_output_nor_gradient(scan, remat):
  value, (grads, _) = gradient(*make(scan=scan, remat=remat), VALID_BS)
  grads = tree.unstack_layers(grads) if scan else grads
  expected_value, (expected, _) = gradient(*make(), VALID_BS)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  # Fusions differ, so float32 rounding does, relative to the largest term of a sum.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max())),
    grads,
    expected,
  )


def create_cache(config, slots, dtype=jnp.float32, batch=B):
  return KVCache.create(
    layers=config.layers,
    batch=batch,
    slots=slots,
    kv_heads=config.kv_heads,
    channels=config.head_width,
    dtype=dtype,
  )


@pytest.mark.parametrize("cuts", [[S], [4, *range(5, S + 1)], [4, 5, 9, 10, S]], ids=str)
def test_cached_decoding_equals_the_full_pass(cuts):
  model, params, inputs = make()
  expected = run(model, params, inputs, VALID_BS)
  cache = create_cache(model.config, S + 4)  # more slots than are ever filled
  start, parts = 0, []
  for end in cuts:
    hidden, cache = apply(model, params, inputs[:, start:end], VALID_BS[:, start:end], cache)
    parts.append(hidden)
    start = end
  out = np.concatenate(parts, axis=1)
  # Sums over S + 4 slots instead of S run in another order; outputs are of size 1.
  np.testing.assert_allclose(out[VALID_BS], expected[VALID_BS], atol=2e-5)
  assert int(cache.filled) == S
  np.testing.assert_array_equal(cache.positions_B, VALID_BS.sum(1))
  np.testing.assert_array_equal(cache.valid_BS[:, :S], VALID_BS)
  assert not cache.valid_BS[:, S:].any()


def test_a_cache_with_stacked_params_is_refused_with_the_remedy():
  model, params, inputs = make(scan=True)
  with pytest.raises(ValueError, match="scan=False, unstack_layers"):
    model.apply({"params": params}, inputs, VALID_BS, create_cache(model.config, S))


def test_lora_scale_per_row_equals_one_scale_a_call():
  model, params, inputs = make()
  scales = [0.0, 1.5, 4.0]
  out = run(model, params, inputs, VALID_BS, lora_scale=jnp.array(scales))
  for n, scale in enumerate(scales):
    alone = run(model, params, inputs, VALID_BS, lora_scale=scale)
    np.testing.assert_allclose(out[n], alone[n], atol=1e-5)
  assert not np.allclose(out[2], run(model, params, inputs, VALID_BS, lora_scale=0.0)[2])


@pytest.mark.parametrize("scan", [False, True])
def test_lora_scale_defaults_to_alpha_over_rank_and_may_be_traced(scan):
  model, params, inputs = make(scan=scan)
  expected = run(model, params, inputs, VALID_BS)
  for scale in (16.0 / 4, np.full(B, 4.0)):
    out = run(model, params, inputs, VALID_BS, lora_scale=scale)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_rank_0_is_the_plain_model():
  model, params, inputs = make()
  plain_config = dataclasses.replace(tiny.LLM_CONFIG, lora_rank=0)
  _, shapes = shapes_of(plain_config)
  assert not any("lora" in path for path in tree.flatten(shapes))
  _, plain_params = tree.partition(params, [".*/lora_[ab]"])
  expected = run(LLM(plain_config), plain_params, inputs, VALID_BS)
  np.testing.assert_array_equal(run(model, params, inputs, VALID_BS, lora_scale=0.0), expected)


def test_lora_stands_at_the_targets_only():
  _, shapes = shapes_of(dataclasses.replace(tiny.LLM_CONFIG, lora_targets=("v", "gate")))
  at = {path.split("/")[-2] for path in tree.flatten(shapes) if path.endswith("lora_a")}
  assert at == {"v", "gate"}


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_acts_with_a_key_only(scan):
  config = dataclasses.replace(tiny.LLM_CONFIG, lora_dropout=0.3)
  model, params, inputs = make(config, scan=scan)
  plain, _, _ = make(scan=scan)
  expected = run(plain, params, inputs, VALID_BS)
  np.testing.assert_array_equal(run(model, params, inputs, VALID_BS), expected)
  one, again, two = (
    run(model, params, inputs, VALID_BS, rngs={"dropout": jax.random.key(n)}) for n in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  assert not np.allclose(one, expected) and not np.allclose(one, two)


def test_tied_logits_are_products_with_the_embedding():
  model, params, inputs = make(dataclasses.replace(tiny.LLM_CONFIG, tied=True))
  assert "head" not in params
  logits = model.apply({"params": params}, inputs, method=LLM.logits)
  np.testing.assert_allclose(logits, inputs @ params["embed"]["embedding"].T, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_is_close_and_takes_bfloat16_params(tied):
  config = dataclasses.replace(tiny.LLM_CONFIG, tied=tied)
  model, params, inputs = make(config)
  half = LLM(config, Compute(dtype="bfloat16"))
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  cache = create_cache(config, S, jnp.bfloat16)
  hidden, cache = apply(half, rounded, inputs, VALID_BS, cache)
  assert hidden.dtype == jnp.bfloat16 and cache.layers[0][0].dtype == jnp.bfloat16
  assert half.apply({"params": rounded}, hidden, method=LLM.logits).dtype == jnp.float32
  tokens = jnp.array([[1]])
  assert half.apply({"params": rounded}, tokens, method=LLM.embed_tokens).dtype == jnp.bfloat16
  expected = run(model, params, inputs, VALID_BS)
  error = np.abs(hidden.astype(np.float32) - expected)[VALID_BS]
  # 8 bits of mantissa through 2 layers; outputs are of size 1.
  assert error.mean() < 0.06


@pytest.mark.parametrize(
  "values, message",
  [
    ({"heads": 28, "kv_heads": 5}, "llm.heads=28 .* llm.kv_heads=5"),
    ({"head_width": 7}, "head_width=7 must be even"),
    ({"lora_targets": ("q", "qkv")}, "unknown .'qkv'.*'gate'"),
  ],
)
def test_impossible_sizes_are_refused_by_name(values, message):
  with pytest.raises(ValueError, match=message):
    LLMConfig(**values)


def test_branches_of_one_row_equal_rows_of_their_own():
  """Two continuations of each row, read turn by turn into one cache, do not see each other."""
  model, params, inputs = make()
  branches, steps = 2, 3
  more = np.random.default_rng(1).normal(size=(B, branches, steps, inputs.shape[-1]))
  cache = create_cache(model.config, S + branches * steps)
  _, cache = apply(model, params, inputs, VALID_BS, cache)
  found = np.zeros(more.shape)
  for step in range(steps):
    sees_BRT = np.ones((B, branches, S + branches * steps), bool)
    for branch in range(branches):
      own = [S + branches * past + branch for past in range(step + 1)]
      sees_BRT[:, branch, S:] = np.isin(np.arange(S, S + branches * steps), own)
    positions_BR = np.repeat(VALID_BS.sum(1)[:, None] + step, branches, axis=1)
    new, valid = more[:, :, step].astype(np.float32), np.ones((B, branches), bool)
    hidden, cache = model.apply(
      {"params": params}, new, valid, cache, placement=Placement(positions_BR, sees_BRT)
    )
    found[:, :, step] = hidden
  assert int(cache.filled) == S + branches * steps
  for branch in range(branches):
    together = np.concatenate([inputs, more[:, branch]], axis=1).astype(np.float32)
    valid_BS = np.concatenate([VALID_BS, np.ones((B, steps), bool)], axis=1)
    expected = run(model, params, together, valid_BS)[:, S:]
    # Sums over another number of slots run in another order; outputs are of size 1.
    np.testing.assert_allclose(found[:, branch], expected, atol=2e-5)
