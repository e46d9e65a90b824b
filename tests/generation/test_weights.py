"""Weights for decoding: the LoRA merged, other layouts; the same answers."""

import functools

import jax
import numpy as np
import pytest

from mooer_jax import speech_llm, tree
from mooer_jax.decoders.llm import LLM, MLP
from mooer_jax.generation import GenerationConfig, generate, weights
from mooer_jax.nn.layers import times_int8
from tests import tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

# The longest sum (56 terms, of the MLP), and that of LoRA.
TERMS = 56 + 40
SCALE = 1.5


@functools.partial(jax.jit, static_argnames=("config", "scale"))
def logits(params, batch, config, scale=None):
  return speech_llm.answer_logits(params, batch, config, lora_scale=scale)


def make(config):
  """(params, a batch of two clips)."""
  rng = np.random.default_rng(0)

  def tokens(n):
    return rng.integers(0, config.decoder.vocab_size, (2, n)).astype(np.int32)

  batch = speech_llm.Batch(
    features=tuple(
      rng.normal(size=(2, 40, encoder.input_width)).astype(np.float32)
      for encoder in config.encoders
    ),
    frames=(np.int32([40, 31]),) * len(config.encoders),
    prefix_BS=tokens(2),
    suffix_BS=tokens(3),
    labels_BS=tokens(4),
  )
  return jax.tree.map(jax.numpy.asarray, tiny.init(config)), batch


def copied(params):
  return jax.tree.map(jax.numpy.copy, params)


@pytest.mark.parametrize("scale", [None, SCALE])
def test_a_merged_lora_gives_the_logits_of_one_kept_apart(scale):
  config = tiny.model_config()
  params, batch = make(config)
  apart = functools.partial(logits, config=config, scale=scale)
  bound = rounding(TERMS, condition(apart, params, batch, of_rows=True))
  merged, plain = weights.merge_lora(copied(params), config, scale)
  assert plain.decoder.lora_rank == 0
  assert not any("lora" in path for path in tree.flatten(merged))
  expected = apart(params, batch)
  assert_within(logits(merged, batch, plain), expected, bound)
  other, _ = weights.merge_lora(copied(params), config, (scale or config.decoder.lora_scale) * 1.01)
  with exceeds_the_bound():
    assert_within(logits(other, batch, plain), expected, bound)


def test_a_merged_lora_is_rounded_once():
  config = tiny.model_config()
  params, _ = make(config)
  path = "decoder/layers_1/mlp/down"
  leaves = tree.flatten(params)
  exact = np.float64(leaves[f"{path}/lora_a"]) @ np.float64(leaves[f"{path}/lora_b"])
  leaves[f"{path}/kernel"] = leaves[f"{path}/kernel"].astype("bfloat16")
  kernel = np.array(leaves[f"{path}/kernel"])
  in_float32 = rounding(config.decoder.lora_rank, np.abs(kernel) + SCALE * np.abs(exact).max())
  exact = np.float64(kernel) + SCALE * exact
  merged, _ = weights.merge_lora(tree.unflatten(leaves), config, SCALE)
  found = tree.flatten(merged)[f"{path}/kernel"]
  assert found.dtype == "bfloat16"
  nearest = exact.astype(np.float32).astype(found.dtype)
  half_a_unit = np.spacing(np.abs(nearest)).astype(np.float64) / 2
  assert_within(found, exact, half_a_unit + in_float32)
  twice = (kernel + (exact - kernel).astype("bfloat16")).astype("bfloat16")
  with exceeds_the_bound():
    assert_within(twice, exact, half_a_unit + in_float32)


def test_a_scale_without_lora_is_refused(config, params):
  with pytest.raises(ValueError, match="lora_scale=2 has no effect: the model has no LoRA"):
    weights.merge_lora(params, config, 2.0)
  assert weights.merge_lora(params, config) == (params, config)


@pytest.mark.parametrize("make_config", [tiny.model_config, tiny.salmonn_config])
def test_the_layout_changes_no_logits(make_config):
  config = make_config()
  params, batch = make(config)
  bound = rounding(TERMS, condition(functools.partial(logits, config=config), params, batch))
  expected = logits(params, batch, config)
  laid_out = weights.lay_out(copied(params), config)
  paths = list(tree.flatten(laid_out))
  assert not [path for path in paths if path.startswith("encoders") and "layers_" in path]
  assert not [path for path in paths if path.startswith("decoder") and path.endswith("kernel")]
  assert_within(logits(laid_out, batch, config), expected, bound)
  layer = laid_out["decoder"]["layers_1"]["attention"]
  layer["q"]["weight"] = layer["o"]["weight"].T
  with exceeds_the_bound():
    assert_within(logits(laid_out, batch, config), expected, bound)


def test_tied_embeddings_are_the_head_without_a_copy(config, params, batch):
  laid_out = weights.lay_out(copied(params), config)
  decoder = laid_out["decoder"]
  assert decoder["head"]["weight"] is decoder["embed"]["embedding"]
  options = GenerationConfig(max_new_tokens=8)
  clips = batch([20, 13, 7])
  found = generate(laid_out, clips, config, options)
  np.testing.assert_array_equal(found.tokens_BS, generate(params, clips, config, options).tokens_BS)
  assert len({tuple(row) for row in found.tokens_BS.tolist()}) == 3  # else the test shows little


def test_the_product_with_few_rows_reads_the_weights_as_they_are(config, params):
  """XLA would fold the transposes into a product of rows by the matrix, the slow one on CPUs."""
  laid_out = weights.lay_out(copied(params), config)["decoder"]
  hidden_BSD = np.zeros((1, 3, config.decoder.hidden_size), np.float32)

  def head(params, hidden_BSD):
    module = config.decoder.module(config.compute)
    return module.apply({"params": params}, hidden_BSD, method=LLM.logits)

  program = jax.jit(head).lower(laid_out, hidden_BSD).as_text("hlo")
  [product] = [line for line in program.splitlines() if " dot(" in line]
  assert f"f32[{config.decoder.vocab_size},3]" in product


def test_int8_rounds_each_kernel_to_the_nearest_of_255_values():
  config = tiny.model_config()
  params, _ = make(config)
  params["decoder"]["layers_0"]["mlp"]["up"]["kernel"] *= np.float32([[0]] + [[1]] * 39)
  params["decoder"]["head"]["kernel"] = params["decoder"]["head"]["kernel"].at[:, 3].set(0)
  kernels = {path: np.array(leaf) for path, leaf in tree.flatten(params["decoder"]).items()}
  leaves = tree.flatten(weights.quantize(params)["decoder"])
  for path, kernel in kernels.items():
    if not path.endswith("/kernel"):
      np.testing.assert_array_equal(leaves[path], kernel)
      continue
    rounded, scale_O = leaves[f"{path}_int8"], np.float64(leaves[f"{path}_scale"])
    assert rounded.dtype == np.int8 and scale_O.shape == kernel.shape[1:]
    assert (np.abs(rounded).max(axis=0) == np.where(scale_O == 0, 0, 127)).all()
    half = scale_O / 2 + rounding(2, np.abs(kernel))
    assert_within(rounded * scale_O, np.float64(kernel), half)
  assert leaves["head/kernel_scale"][3] == 0


@pytest.mark.parametrize("rows", [3, 66])  # few and many are computed in different orders
def test_int8_products_are_exact_but_for_16_bits_of_the_inputs(rows):
  rng = np.random.default_rng(0)
  I, O = 4864, 5
  scale_R1 = np.tile(np.float32([[1], [1e-30], [0]]), (rows // 3, 1))
  x_RI = rng.normal(size=(rows, I)).astype(np.float32) * scale_R1
  x_RI[0, 7] = 100  # an outlier makes the steps of its row wide
  weight_OI = rng.integers(-127, 128, (O, I), dtype=np.int8)
  weight_OI[0] = 127  # the largest sum
  exact_RO = np.float64(x_RI) @ weight_OI.T.astype(np.float64)
  step_R1 = np.abs(x_RI).max(axis=1, keepdims=True).astype(np.float64) / 32512
  magnitude_O = np.abs(np.int64(weight_OI)).sum(axis=1)
  # Half a step for each input; the roundings of the quotient, both sums and their total.
  bound_RO = (step_R1 / 2 + rounding(1, np.abs(x_RI).max(axis=1, keepdims=True))) * magnitude_O
  assert_within(times_int8(x_RI, weight_OI), exact_RO, bound_RO)
  high_alone = times_int8(np.round(x_RI / (256 * step_R1 + 1e-99)), weight_OI) * 256 * step_R1
  with exceeds_the_bound():
    assert_within(high_alone, exact_RO, bound_RO)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_products_keep_values_that_are_not_finite(bad):
  x_RI = np.ones((2, 8), np.float32)
  x_RI[1, 3] = bad
  y_RO = np.asarray(times_int8(x_RI, np.ones((4, 8), np.int8)))
  assert np.isfinite(y_RO[0]).all() and not np.isfinite(y_RO[1]).any()


def test_the_int8_product_on_cpus_reads_the_weights_as_int8(config, params):
  """A product of int8 by floats would write the weights as float32 first."""
  laid_out = weights.lay_out(weights.quantize(copied(params)), config)["decoder"]
  hidden_BSD = np.zeros((1, 3, config.decoder.hidden_size), np.float32)
  mlp = MLP(config.decoder, config.compute)

  def up(params, hidden_BSD):
    return mlp.apply({"params": params}, hidden_BSD, 1.0)

  program = jax.jit(up).lower(laid_out["layers_0"]["mlp"], hidden_BSD).as_text("hlo")
  products = [line for line in program.splitlines() if " dot(" in line]
  products = [line for line in products if "s32[" in line]
  assert len(products) == 3 and all(",6]" in line for line in products)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "lora-apart"])
def test_int8_gives_the_logits_of_the_rounded_kernels(merged):
  config = tiny.model_config()
  params, batch = make(config)
  if merged:
    params, config = weights.merge_lora(params, config)
  quantized = weights.quantize(copied(params))
  rounded = tree.flatten(quantized)
  for path in [path for path in rounded if path.endswith("_int8")]:
    scale_O = rounded.pop(path.replace("_int8", "_scale"))
    rounded[path.removesuffix("_int8")] = rounded.pop(path) * scale_O
  of_rounded = functools.partial(logits, config=config)
  rounded = tree.unflatten(rounded)
  bound = rounding(TERMS, condition(of_rounded, rounded, batch, of_rows=True))
  expected = of_rounded(rounded, batch)
  assert_within(logits(quantized, batch, config), expected, bound)
  with exceeds_the_bound():
    assert_within(logits(params, batch, config), expected, bound)


def test_the_layout_of_int8_gives_the_same_tokens(config, params, batch):
  quantized = weights.quantize(copied(params))
  options, clips = GenerationConfig(max_new_tokens=8), batch([20, 13, 7])
  expected = generate(quantized, clips, config, options).tokens_BS
  laid_out = weights.lay_out(copied(quantized), config)
  leaves = tree.flatten(laid_out["decoder"])
  assert not [path for path in leaves if "kernel_int8" in path]
  assert [path for path in leaves if path.endswith("/weight_int8")]
  np.testing.assert_array_equal(generate(laid_out, clips, config, options).tokens_BS, expected)
