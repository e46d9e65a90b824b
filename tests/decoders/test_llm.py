import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import tree
from mooer_jax.decoders.llm import LLM, LLMConfig, Placement
from mooer_jax.nn.compute import ExecutionConfig
from tests import tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

B, S = 3, 11
# Rows with holes: at the left, in the middle, at the right.
VALID_BS = np.ones((B, S), bool)
VALID_BS[1, :3] = VALID_BS[1, 6] = VALID_BS[2, 4:6] = VALID_BS[2, 9:] = False


LONGEST = 56  # terms of the longest sum, that of the MLP


def shapes_of(config, **compute):
  """(model, its parameters as shapes)."""
  model = LLM(config, ExecutionConfig(**compute))
  inputs = jnp.zeros((1, 2, config.hidden_size)), jnp.ones((1, 2), bool)
  init = lambda key: model.init(key, *inputs, method=LLM.init_all_params)  # noqa: E731
  return model, jax.eval_shape(init, jax.random.key(0))["params"]


def make(config=tiny.LLM_CONFIG, **compute):
  """(model, random params in its layout, inputs [B, S, D])."""
  _, shapes = shapes_of(config)
  params = tiny.random_params(shapes)
  model = LLM(config, ExecutionConfig(**compute))
  inputs = np.random.default_rng(0).normal(size=(B, S, config.hidden_size)).astype(np.float32)
  return model, tree.stack_layers(params) if model.compute.scan else params, inputs


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *args, **kwargs):
  return model.apply({"params": params}, *args, **kwargs)


def run(model, params, inputs, valid, **kwargs):
  """Hidden states without a cache."""
  return np.asarray(apply(model, params, inputs, valid, **kwargs)[0])


@pytest.fixture(scope="module")
def bound():
  """Bound on what rounding changes of the hidden states of `make`: [B, S, 1]."""
  model, params, inputs = make()
  hidden = lambda params, inputs: run(model, params, inputs, VALID_BS)  # noqa: E731
  return rounding(LONGEST, condition(hidden, params, inputs, of_rows=True))


@pytest.mark.parametrize(
  "name, count",
  [("qwen2_0.5b", 494_032_768), ("qwen2_1.5b", 1_543_714_304), ("qwen2_7b", 7_615_616_512)],
)
def test_named_sizes_have_the_published_parameter_counts(name, count):
  _, shapes = shapes_of(LLMConfig.SIZES[name])
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
  _, scanned = shapes_of(LLMConfig.SIZES[name], scan=True)
  assert tree.stack_layers(shapes) == scanned


def test_lora_on_7b_has_161_million_parameters():
  _, shapes = shapes_of(dataclasses.replace(LLMConfig.SIZES["qwen2_7b"], lora_rank=64), scan=True)
  lora, frozen = tree.partition(shapes, [".*/lora_[ab]"])
  # Per layer, rank x (in + out): q and o 2 x 7168, k and v 2 x 4096, gate, up and down 3 x 22528.
  assert sum(leaf.size for leaf in jax.tree.leaves(lora)) == 28 * 64 * 90_112
  assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) == 7_615_616_512


def check_rows(together, model, params, inputs, bound, *, valid_BS=VALID_BS, **kwargs):
  """Each row of a batch is what the model makes of its valid slots alone."""
  for n in range(B):
    keep = valid_BS[n]
    alone = run(model, params, inputs[n : n + 1, keep], np.ones((1, keep.sum()), bool), **kwargs)
    assert_within(together[n, keep], alone[0], bound[n, keep])


def test_holes_and_batch_size_change_nothing(bound):
  model, params, inputs = make()
  check_rows(run(model, params, inputs, VALID_BS), model, params, inputs, bound)


@pytest.mark.parametrize(
  "fault",
  [
    {"valid_BS": np.roll(VALID_BS, 1, axis=1)},
    {"lora_scale": 4 * 1.001},
    {"config": {"rope_theta": 1.01e6}},
    {"config": {"norm_eps": 1e-3}},
  ],
  ids=["mask one slot later", "LoRA x 1.001", "RoPE theta x 1.01", "norm eps 1e-3"],
)
def test_a_fault_exceeds_the_bound(bound, fault):
  model, params, inputs = make()
  other = LLM(dataclasses.replace(model.config, **fault.pop("config", {})))
  together = run(model, params, inputs, VALID_BS)
  with exceeds_the_bound():
    check_rows(together, other, params, inputs, bound, **fault)


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
  plain, params, inputs = make()
  expected = gradient(plain, params, inputs, VALID_BS)
  scale = condition(lambda *x: gradient(plain, *x, VALID_BS), params, inputs)
  value, (grads, of_inputs) = gradient(*make(scan=scan, remat=remat), VALID_BS)
  grads = tree.unstack_layers(grads) if scan else grads
  assert_within((value, (grads, of_inputs)), expected, rounding(LONGEST, scale))


@pytest.mark.parametrize("change", [{"lora_alpha": 16 * 1.001}, {"rope_theta": 1.01e6}], ids=str)
def test_the_gradient_of_another_model_exceeds_the_bound(change):
  model, params, inputs = make()
  scale = condition(lambda *x: gradient(model, *x, VALID_BS), params, inputs)
  other = LLM(dataclasses.replace(model.config, **change))
  with exceeds_the_bound():
    found = gradient(other, params, inputs, VALID_BS)
    assert_within(found, gradient(model, params, inputs, VALID_BS), rounding(LONGEST, scale))


def create_cache(config, slots, dtype=jnp.float32, batch=B):
  return config.empty_cache(rows=batch, slots=slots, dtype=dtype)


@pytest.mark.parametrize("cuts", [[S], [4, *range(5, S + 1)], [4, 5, 9, 10, S]], ids=str)
def test_cached_decoding_equals_the_full_pass(cuts, bound):
  model, params, inputs = make()
  expected = run(model, params, inputs, VALID_BS)
  cache = create_cache(model.config, S + 4)  # more slots than are ever filled
  start, parts = 0, []
  for end in cuts:
    hidden, cache = apply(model, params, inputs[:, start:end], VALID_BS[:, start:end], cache)
    parts.append(hidden)
    start = end
  out = np.concatenate(parts, axis=1)
  assert_within(out[VALID_BS], expected[VALID_BS], bound[VALID_BS])
  assert int(cache.filled) == S
  np.testing.assert_array_equal(cache.positions_B, VALID_BS.sum(1))
  np.testing.assert_array_equal(cache.valid_BS[:, :S], VALID_BS)
  assert not cache.valid_BS[:, S:].any()


def test_cached_decoding_traces_and_lowers_one_layer_for_all():
  model, params, inputs = make(dataclasses.replace(tiny.LLM_CONFIG, layers=3))
  cache = create_cache(model.config, S)
  program = apply.lower(model, params, inputs, VALID_BS, cache).as_text()
  assert program.count("func.func private @_run_layer(") == 1
  assert program.count("call @_run_layer(") == 3


@pytest.mark.parametrize("fault", ["a hole less", "one slot more"])
def test_a_fault_of_the_cache_exceeds_the_bound(fault, bound):
  model, params, inputs = make()
  expected = run(model, params, inputs, VALID_BS)
  _, cache = apply(model, params, inputs[:, :5], VALID_BS[:, :5], create_cache(model.config, S + 4))
  if fault == "a hole less":
    cache = cache.replace(valid_BS=cache.valid_BS.at[:, :5].set(True))
  else:
    cache = cache.replace(positions_B=cache.positions_B + (VALID_BS[:, 5:].any(1)))
  hidden, _ = apply(model, params, inputs[:, 5:], VALID_BS[:, 5:], cache)
  with exceeds_the_bound():
    assert_within(hidden, expected[:, 5:], bound[:, 5:])


def test_a_cache_with_stacked_params_is_refused_with_the_remedy():
  model, params, inputs = make(scan=True)
  with pytest.raises(ValueError, match="scan=False, unstack_layers"):
    model.apply({"params": params}, inputs, VALID_BS, create_cache(model.config, S))


def test_lora_scale_per_row_equals_one_scale_a_call():
  model, params, inputs = make()
  scales = np.float32([0.0, 1.5, 4.0])
  hidden = lambda *x: run(model, *x[:2], VALID_BS, lora_scale=x[2])  # noqa: E731
  bound = rounding(LONGEST, condition(hidden, params, inputs, scales, of_rows=True))
  out = run(model, params, inputs, VALID_BS, lora_scale=scales)
  for n, scale in enumerate(scales):
    alone = run(model, params, inputs, VALID_BS, lora_scale=scale)
    assert_within(out[n], alone[n], bound[n])
  for scale in (0.0, 4.004):
    other = run(model, params, inputs, VALID_BS, lora_scale=scale)
    with exceeds_the_bound():
      assert_within(out[2], other[2], bound[2])


@pytest.mark.parametrize("scan", [False, True])
def test_lora_scale_defaults_to_alpha_over_rank_and_may_be_traced(scan, bound):
  model, params, inputs = make(scan=scan)
  expected = run(model, params, inputs, VALID_BS)
  for scale in (16.0 / 4, np.full(B, 4.0)):
    out = run(model, params, inputs, VALID_BS, lora_scale=scale)
    assert_within(out[VALID_BS], expected[VALID_BS], bound[VALID_BS])


def test_rank_0_is_the_plain_model(bound):
  model, params, inputs = make()
  plain_config = dataclasses.replace(tiny.LLM_CONFIG, lora_rank=0)
  _, shapes = shapes_of(plain_config)
  assert not any("lora" in path for path in tree.flatten(shapes))
  _, plain_params = tree.partition(params, [".*/lora_[ab]"])
  expected = run(LLM(plain_config), plain_params, inputs, VALID_BS)
  out = run(model, params, inputs, VALID_BS, lora_scale=0.0)
  assert_within(out[VALID_BS], expected[VALID_BS], bound[VALID_BS])


def test_lora_stands_at_the_targets_only():
  _, shapes = shapes_of(dataclasses.replace(tiny.LLM_CONFIG, lora_targets=("v", "gate")))
  at = {path.split("/")[-2] for path in tree.flatten(shapes) if path.endswith("lora_a")}
  assert at == {"v", "gate"}


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_acts_with_a_key_only(scan, bound):
  config = dataclasses.replace(tiny.LLM_CONFIG, lora_dropout=0.3)
  model, params, inputs = make(config, scan=scan)
  plain, _, _ = make(scan=scan)
  expected = run(plain, params, inputs, VALID_BS)
  np.testing.assert_array_equal(run(model, params, inputs, VALID_BS), expected)
  one, again, two = (
    run(model, params, inputs, VALID_BS, rngs={"dropout": jax.random.key(n)}) for n in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  for other in (expected, two):
    with exceeds_the_bound():
      assert_within(one[VALID_BS], other[VALID_BS], bound[VALID_BS])


def test_tied_logits_are_products_with_the_embedding():
  model, params, inputs = make(dataclasses.replace(tiny.LLM_CONFIG, tie_word_embeddings=True))
  assert "head" not in params
  logits = model.apply({"params": params}, inputs, method=LLM.logits)
  exact = np.float64(inputs) @ np.float64(params["embed"]["embedding"].T)
  assert_within(logits, exact, rounding(40, np.abs(exact).max()))
  with exceeds_the_bound():
    assert_within(logits * 1.001, exact, rounding(40, np.abs(exact).max()))


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_is_close_and_takes_bfloat16_params(tied):
  config = dataclasses.replace(tiny.LLM_CONFIG, tie_word_embeddings=tied)
  model, params, inputs = make(config)
  half = LLM(config, ExecutionConfig(dtype="bfloat16"))
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  cache = create_cache(config, S, jnp.bfloat16)
  hidden, cache = apply(half, rounded, inputs, VALID_BS, cache)
  assert hidden.dtype == jnp.bfloat16 and cache.layers[0][0].dtype == jnp.bfloat16
  assert half.apply({"params": rounded}, hidden, method=LLM.logits).dtype == jnp.float32
  tokens = jnp.array([[1]])
  assert half.apply({"params": rounded}, tokens, method=LLM.embed_tokens).dtype == jnp.bfloat16
  expected = run(model, params, inputs, VALID_BS)
  # Products of bfloat16 are summed in float32, so one rounding of each input is all.
  hidden_of = lambda *x: run(model, *x, VALID_BS)  # noqa: E731
  bf16_bound = rounding(1, condition(hidden_of, params, inputs, of_rows=True), jnp.bfloat16)
  assert_within(hidden[VALID_BS], expected[VALID_BS], bf16_bound[VALID_BS])
  with exceeds_the_bound():
    shifted = run(model, params, inputs, np.roll(VALID_BS, 1, axis=1))
    assert_within(hidden[VALID_BS], shifted[VALID_BS], bf16_bound[VALID_BS])


@pytest.mark.parametrize(
  "values, message",
  [
    ({"heads": 28, "kv_heads": 5}, "llm.heads=28 .* llm.kv_heads=5"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
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
    attention_mask_BRT = np.ones((B, branches, S + branches * steps), bool)
    for branch in range(branches):
      own = [S + branches * past + branch for past in range(step + 1)]
      attention_mask_BRT[:, branch, S:] = np.isin(np.arange(S, S + branches * steps), own)
    positions_BR = np.repeat(VALID_BS.sum(1)[:, None] + step, branches, axis=1)
    new, valid = more[:, :, step].astype(np.float32), np.ones((B, branches), bool)
    end = S + branches * (step + 1)
    placement = Placement(positions_BR, attention_mask_BRT, end)
    hidden, cache = apply(model, params, new, valid, cache, placement=placement)
    found[:, :, step] = hidden
  assert int(cache.filled) == S + branches * steps
  valid_BS = np.concatenate([VALID_BS, np.ones((B, steps), bool)], axis=1)
  for branch in range(branches):
    together = np.concatenate([inputs, more[:, branch]], axis=1).astype(np.float32)
    continuation = lambda *x: run(model, *x, valid_BS)[:, S:]  # noqa: E731
    bound = rounding(LONGEST, condition(continuation, params, together, of_rows=True))
    expected = continuation(params, together)
    assert_within(found[:, branch], expected, bound)
    with exceeds_the_bound():
      assert_within(found[:, 1 - branch], expected, bound)
