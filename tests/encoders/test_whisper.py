"""Whisper's encoder: transformers' output, silence for padding, and no trace of the batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from mooer_jax import tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.logmel import LogMelConfig, features
from mooer_jax.encoders.whisper import WHISPER_SIZES, WhisperConfig, WhisperEncoder
from mooer_jax.nn.compute import Compute
from mooer_jax.nn.positions import sinusoids
from tests import tiny
from tests.audio.test_logmel import transformers_float64
from tests.numerics import assert_as_accurate, assert_within, condition, exceeds_the_bound, rounding
from tests.parity import torch_models

SMALL = WhisperConfig(
  input_width=8, width=32, layers=3, heads=4, mlp_width=48, positions=20, context=12, trim=True
)
FRAMES_B = [22, 7, 1]
LONGEST = 3 * 32  # terms of the longest sum, that of the second convolution


def make(config=SMALL, **compute):
  """An encoder, random params in its layout, features [3, 22, F]."""
  rng = np.random.default_rng(0)
  x_BTF = rng.normal(size=(3, 22, config.input_width)).astype(np.float32)
  shapes = jax.eval_shape(WhisperEncoder(config).init, jax.random.key(0), x_BTF, x_BTF[..., 0] > 9)
  params = tiny.random_params(shapes["params"])
  encoder = WhisperEncoder(config, Compute(**compute))
  return encoder, tree.stack_layers(params) if encoder.compute.scan else params, x_BTF


@functools.partial(jax.jit, static_argnums=0)
def apply(encoder, params, x_BTF, valid_BT, **kwargs):
  return encoder.apply({"params": params}, x_BTF, valid_BT, **kwargs)


def run(encoder, params, x_BTF, frames_B, **kwargs):
  """(outputs, how many of each row are valid)."""
  valid_BT = np.arange(x_BTF.shape[1]) < np.asarray(frames_B)[:, None]
  out, valid = map(np.asarray, apply(encoder, params, x_BTF, valid_BT, **kwargs))
  assert out.shape[:2] == valid.shape == (len(x_BTF), encoder.config.context)
  lengths = valid.sum(1)
  np.testing.assert_array_equal(valid, np.arange(valid.shape[1]) < lengths[:, None])
  return out, lengths


def original(config, seed=0):
  """transformers' encoder with norms and biases that are not ones and zeros."""
  from transformers import WhisperConfig as TheirConfig
  from transformers.models.whisper.modeling_whisper import WhisperEncoder as Theirs

  torch.manual_seed(seed)
  described = TheirConfig(
    num_mel_bins=config.input_width,
    d_model=config.width,
    encoder_layers=config.layers,
    encoder_attention_heads=config.heads,
    encoder_ffn_dim=config.mlp_width,
    max_source_positions=config.positions,
  )
  module = torch_models.vary_vectors(Theirs(described), seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      if name.endswith("weight") and parameter.ndim == 2 and "embed" not in name:
        parameter.normal_(0, parameter.shape[1] ** -0.5)  # so that attention is not uniform
  return module


def params_of(module):
  """The parameter tree of transformers' encoder, through the converter's table."""
  from convert.parts.whisper import table

  rules, leaves = table(""), {}
  for name, tensor in module.state_dict().items():
    path, transform = rules.to_jax(name)
    leaves[path.removeprefix("encoders/whisper/")] = transform.to_jax(tensor.numpy())
  return tree.unflatten(leaves)


def shapes(config, *, scan=True):
  inputs = (
    jax.ShapeDtypeStruct((1, 8, config.input_width), jnp.float32),
    jax.ShapeDtypeStruct((1, 8), bool),
  )
  encoder = WhisperEncoder(config, Compute(scan=scan))
  params = jax.eval_shape(encoder.init, jax.random.key(0), *inputs)["params"]
  return params, jax.eval_shape(encoder.apply, {"params": params}, *inputs)


def test_stacked_layers_are_the_same_parameters():
  config = WHISPER_SIZES["whisper_tiny"]
  stacked, (out, valid) = shapes(config)
  assert tree.stack_layers(shapes(config, scan=False)[0]) == stacked
  assert out.shape == (1, 1500, 384) and valid.shape == (1, 1500)


def test_the_sizes_have_the_parameters_of_the_releases():
  from transformers import WhisperConfig as TheirConfig
  from transformers.models.whisper.modeling_whisper import WhisperEncoder as Theirs

  counts = {
    name: sum(leaf.size for leaf in jax.tree.leaves(shapes(config)[0]))
    for name, config in WHISPER_SIZES.items()
  }
  assert counts["whisper_tiny"] == 8_208_384 and counts["whisper_large_v3"] == 636_968_960
  for name, c in WHISPER_SIZES.items():
    described = TheirConfig(
      num_mel_bins=c.input_width,
      d_model=c.width,
      encoder_layers=c.layers,
      encoder_attention_heads=c.heads,
      encoder_ffn_dim=c.mlp_width,
    )
    with torch.device("meta"):
      assert sum(p.numel() for p in Theirs(described).parameters()) == counts[name], name


@pytest.mark.parametrize(
  "config",
  [
    dataclasses.replace(SMALL, context=20),
    dataclasses.replace(SMALL, input_width=5, positions=30, context=30, heads=2, layers=1),
  ],
)
def test_outputs_are_those_of_transformers(config):
  rng = np.random.default_rng(1)
  x_BTF = rng.normal(size=(2, 2 * config.context, config.input_width)).astype(np.float32)
  module = original(config)
  check_transformers(WhisperEncoder(config), module, x_BTF, x_BTF)
  with exceeds_the_bound():  # that of torch's LayerNorm is 1e-5
    faulty = WhisperEncoder(dataclasses.replace(config, norm_eps=1e-4))
    check_transformers(faulty, module, x_BTF, x_BTF)


def check_transformers(encoder, module, x_BTF, theirs_BTF):
  """Raises unless our outputs are those of `module` of the features that transformers has."""

  def run_module(module, dtype):
    return module(torch.tensor(theirs_BTF, dtype=dtype).transpose(1, 2)).last_hidden_state

  ours, lengths = run(encoder, params_of(module), x_BTF, [x_BTF.shape[1]] * len(x_BTF))
  assert (lengths == encoder.config.context).all()
  torch_models.assert_parity(ours, run_module, module, layers=encoder.config.layers)


@pytest.mark.slow
def test_outputs_of_tiny_are_those_of_transformers_on_speech(clips):
  waveform_N, config = load_audio(clips[0].path), WHISPER_SIZES["whisper_tiny"]
  theirs_TF = transformers_float64(waveform_N, WhisperFeatureExtractor())
  x_TF = features(waveform_N, LogMelConfig())
  assert len(x_TF) < len(theirs_TF) == 3000  # the encoder adds the silence
  check_transformers(WhisperEncoder(config), original(config), x_TF[None], theirs_TF[None])


def test_the_positions_start_as_transformers_do():
  from transformers.models.whisper.modeling_whisper import sinusoids as theirs

  # Theirs is float32 throughout: angles up to 1500 are rounded to 1e-4.
  periods_C = 10000.0 ** (np.arange(192) / 191)
  angles_TC = np.arange(1500)[:, None] / periods_C
  truth_TC = np.concatenate([np.sin(angles_TC), np.cos(angles_TC)], axis=1)
  ours = sinusoids(1500, 384, first=0)
  assert_as_accurate(ours, theirs(1500, 384), truth_TC, floor=rounding(1))
  with exceeds_the_bound():
    assert_as_accurate(
      sinusoids(1500, 384, first=1), theirs(1500, 384), truth_TC, floor=rounding(1)
    )


@pytest.fixture(scope="module")
def scale():
  """Sensitivity of the outputs of `make` to rounding: [B, T, 1]."""
  encoder, params, x_BTF = make()
  return condition(lambda *x: run(encoder, *x, FRAMES_B)[0], params, x_BTF, of_rows=True)


def check_rows(together, encoder, params, x_BTF, scale, *, frames_B=FRAMES_B):
  """Each row of a batch is what the encoder makes of its valid frames alone."""
  for n, frames in enumerate(frames_B):
    alone, _ = run(encoder, params, x_BTF[n : n + 1, :frames], [frames])
    assert_within(together[n], alone[0], rounding(LONGEST, scale[n]))


def test_padding_and_batch_size_change_nothing(scale):
  encoder, params, x_BTF = make()
  together, lengths = run(encoder, params, x_BTF, FRAMES_B)
  np.testing.assert_array_equal(lengths, [11, 4, 1])
  check_rows(together, encoder, params, x_BTF, scale)


@pytest.mark.parametrize("fault", ["gain 1.001", "one frame later", "mask", "eps", "positions"])
def test_a_fault_exceeds_the_bound(scale, fault):
  encoder, params, x_BTF = make()
  (together, _), frames_B = run(encoder, params, x_BTF, FRAMES_B), FRAMES_B
  if fault == "gain 1.001":
    x_BTF = x_BTF * np.float32(1.001)
  elif fault == "one frame later":
    x_BTF = np.roll(x_BTF, 1, axis=1)
  elif fault == "mask":
    frames_B = [21, 6, 1]
  elif fault == "eps":
    encoder = WhisperEncoder(dataclasses.replace(SMALL, norm_eps=1e-3))
  else:
    params = params | {"positions": np.roll(params["positions"], 1, axis=0)}
  with exceeds_the_bound():
    check_rows(together, encoder, params, x_BTF, scale, frames_B=frames_B)


def test_what_stands_in_the_padding_does_not_matter():
  encoder, params, x_BTF = make()
  before, _ = run(encoder, params, x_BTF, FRAMES_B)
  x_BTF[1, 7:], x_BTF[2, 1:] = np.nan, 1e4
  after, _ = run(encoder, params, x_BTF, FRAMES_B)
  np.testing.assert_array_equal(before, after)


def test_the_padding_is_the_clips_silence():
  encoder, params, x_BTF = make()
  for largest, silence in ((1.2, -0.8), (0.1, -1.5), (-1.5, -1.5)):
    x_BTF = np.minimum(x_BTF, largest)
    x_BTF[:, 0, 0] = largest
    padded = np.full((3, 24, 8), silence, np.float32)
    padded[:, :7] = x_BTF[:, :7]
    outputs = lambda *x: run(encoder, *x, [24] * 3)[0]  # noqa: E731
    bound = rounding(LONGEST, condition(outputs, params, padded, of_rows=True))
    short, _ = run(encoder, params, x_BTF, [7] * 3)
    assert_within(short, outputs(params, padded), bound)
    with exceeds_the_bound():
      padded[:, 7:] += np.float32(1e-3)
      assert_within(short, outputs(params, padded), bound)


def test_without_trimming_all_of_the_context_is_valid(scale):
  trimmed, params, x_BTF = make()
  encoder = WhisperEncoder(dataclasses.replace(SMALL, trim=False))
  out, lengths = run(encoder, params, x_BTF, [22, 7, 0])
  np.testing.assert_array_equal(lengths, [12, 12, 0])  # a row of padding has none
  same, lengths = run(trimmed, params, x_BTF, [22, 7, 0])
  np.testing.assert_array_equal(lengths, [11, 4, 0])
  assert_within(out[:2], same[:2], rounding(LONGEST, scale[:2]))


@functools.partial(jax.jit, static_argnums=0)
def gradient(encoder, params, x_BTF, valid_BT):
  def loss(params, x_BTF):
    return jnp.sin(encoder.apply({"params": params}, x_BTF, valid_BT)[0]).mean()

  return jax.value_and_grad(loss, (0, 1))(params, x_BTF)


def test_a_row_of_padding_stays_finite_also_backwards():
  value, grads = gradient(*make(), np.arange(22) < np.array([[0], [22], [1]]))
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("scan, remat", [(True, "none"), (True, "dots"), (True, "full")])
def test_scan_and_remat_change_neither_output_nor_gradient(scan, remat):
  valid_BT = np.arange(22) < np.array([[22], [7], [1]])
  plain, params, x_BTF = make()
  bound = rounding(LONGEST, condition(lambda *x: gradient(plain, *x, valid_BT), params, x_BTF))
  value, (grads, of_inputs) = gradient(*make(scan=scan, remat=remat), valid_BT)
  expected = gradient(plain, params, x_BTF, valid_BT)
  assert_within((value, (tree.unstack_layers(grads), of_inputs)), expected, bound)
  with exceeds_the_bound():
    louder = gradient(plain, params, x_BTF * np.float32(1.001), valid_BT)
    assert_within(louder, expected, bound)


def test_dropout_acts_with_a_key_only(scale):
  encoder, params, x_BTF = make(dataclasses.replace(SMALL, dropout=0.2))
  plain, _, _ = make()
  expected, _ = run(plain, params, x_BTF, FRAMES_B)
  np.testing.assert_array_equal(run(encoder, params, x_BTF, FRAMES_B)[0], expected)
  one, again, two = (
    run(encoder, params, x_BTF, FRAMES_B, rngs={"dropout": jax.random.key(n)})[0] for n in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  for other in (expected, two):
    with exceeds_the_bound():
      assert_within(one, other, rounding(LONGEST, scale))


def test_bfloat16_is_close_and_takes_bfloat16_params(scale):
  encoder, params, x_BTF = make()
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  out, _ = run(WhisperEncoder(SMALL, Compute(dtype="bfloat16")), rounded, x_BTF, FRAMES_B)
  assert out.dtype == jnp.bfloat16
  # Products of bfloat16 are summed in float32, so one rounding of each input is all.
  bound = rounding(1, scale, jnp.bfloat16)
  expected, _ = run(encoder, params, x_BTF, FRAMES_B)
  assert_within(out, expected, bound)
  with exceeds_the_bound():
    assert_within(out[:, :-1], expected[:, 1:], bound[:, 1:])


def test_features_that_do_not_fit_are_refused_by_name():
  encoder, params, x_BTF = make()
  with pytest.raises(ValueError, match="width 8, got 7"):
    run(encoder, params, x_BTF[..., :-1], FRAMES_B)
  with pytest.raises(ValueError, match=r"25 frames .* whisper.context=12 holds 24.*at most 20"):
    run(encoder, params, np.zeros((1, 25, 8), np.float32), [25])


@pytest.mark.parametrize(
  "values, message",
  [
    ({"width": 382}, "whisper.width=382 .* whisper.heads=6"),
    ({"width": 381, "heads": 3}, "whisper.width=381 must be even"),
    ({"layers": 0}, "whisper.layers=0"),
    ({"context": 1501}, "whisper.context=1501 .* whisper.positions=1500"),
    ({"context": 0}, "whisper.context=0"),
  ],
)
def test_impossible_sizes_are_refused_by_name(values, message):
  with pytest.raises(ValueError, match=message):
    WhisperConfig(**values)
