"""Whisper's encoder: transformers' output, silence for padding, and no trace of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from mooer_jax import tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.encoders.whisper import WhisperConfig, WhisperEncoder
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.nn.positions import sinusoids
from tests.audio.test_logmel import transformers_float64
from tests.encoders import contract
from tests.numerics import assert_as_accurate, assert_within, condition, exceeds_the_bound, rounding
from tests.parity import torch_models

SMALL = WhisperConfig(
  input_width=8,
  hidden_size=32,
  layers=3,
  heads=4,
  intermediate_size=48,
  positions=20,
  context=12,
  trim=True,
)


def other_positions(config, params, features, frames_B):
  params = params | {"positions": np.roll(params["positions"], 1, axis=0)}
  return config, params, features, frames_B


class TestContract(contract.EncoderContract):
  module = WhisperEncoder
  config = SMALL
  frames_B = (22, 7, 1)
  empty_B = (0, 22, 1)
  longest = 3 * 32  # the second convolution
  faults = (
    contract.louder,
    contract.one_frame_later,
    contract.shorter_mask,
    contract.other_eps,
    other_positions,
  )

  @staticmethod
  def tokens(frames):
    return -(-frames // 2)


def run(encoder, params, x_BTF, frames_B):
  """(outputs, number of valid ones in each row)."""
  out, valid = contract.apply(encoder, params, x_BTF, contract.valid_of(x_BTF, frames_B))
  assert out.shape[:2] == valid.shape == (len(x_BTF), encoder.config.context)
  return np.asarray(out), np.asarray(valid).sum(1)


def original(config, seed=0):
  """transformers' encoder with norms and biases that are not ones and zeros."""
  from transformers import WhisperConfig as TheirConfig
  from transformers.models.whisper.modeling_whisper import WhisperEncoder as Theirs

  torch.manual_seed(seed)
  described = TheirConfig(
    num_mel_bins=config.input_width,
    d_model=config.hidden_size,
    encoder_layers=config.layers,
    encoder_attention_heads=config.heads,
    encoder_ffn_dim=config.intermediate_size,
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
  encoder = WhisperEncoder(config, ExecutionConfig(scan=scan))
  params = jax.eval_shape(encoder.init, jax.random.key(0), *inputs)["params"]
  return params, jax.eval_shape(encoder.apply, {"params": params}, *inputs)


def test_stacked_layers_are_the_same_parameters():
  config = WhisperConfig.SIZES["whisper_tiny"]
  stacked, (out, valid) = shapes(config)
  assert tree.stack_layers(shapes(config, scan=False)[0]) == stacked
  assert out.shape == (1, 1500, 384) and valid.shape == (1, 1500)


def test_the_sizes_have_the_parameters_of_the_releases():
  from transformers import WhisperConfig as TheirConfig
  from transformers.models.whisper.modeling_whisper import WhisperEncoder as Theirs

  counts = {
    name: sum(leaf.size for leaf in jax.tree.leaves(shapes(config)[0]))
    for name, config in WhisperConfig.SIZES.items()
  }
  assert counts["whisper_tiny"] == 8_208_384 and counts["whisper_large_v3"] == 636_968_960
  for name, c in WhisperConfig.SIZES.items():
    described = TheirConfig(
      num_mel_bins=c.input_width,
      d_model=c.hidden_size,
      encoder_layers=c.layers,
      encoder_attention_heads=c.heads,
      encoder_ffn_dim=c.intermediate_size,
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
  waveform_N, config = load_audio(clips[0].path), WhisperConfig.SIZES["whisper_tiny"]
  theirs_TF = transformers_float64(waveform_N, WhisperFeatureExtractor())
  x_TF = LogMelConfig().features(waveform_N)
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


def test_the_padding_is_the_clips_silence():
  encoder, params, x_BTF = TestContract.make()
  for largest, silence in ((1.2, -0.8), (0.1, -1.5), (-1.5, -1.5)):
    x_BTF = np.minimum(x_BTF, largest)
    x_BTF[:, 0, 0] = largest
    padded = np.full((3, 24, 8), silence, np.float32)
    padded[:, :7] = x_BTF[:, :7]
    outputs = lambda *x: run(encoder, *x, [24] * 3)[0]  # noqa: E731
    bound = rounding(TestContract.longest, condition(outputs, params, padded, of_rows=True))
    short, _ = run(encoder, params, x_BTF, [7] * 3)
    assert_within(short, outputs(params, padded), bound)
    with exceeds_the_bound():
      padded[:, 7:] += np.float32(1e-3)
      assert_within(short, outputs(params, padded), bound)


def test_without_trimming_all_of_the_context_is_valid():
  trimmed, params, x_BTF = TestContract.make()
  encoder = WhisperEncoder(dataclasses.replace(SMALL, trim=False))
  out, lengths = run(encoder, params, x_BTF, [22, 7, 0])
  np.testing.assert_array_equal(lengths, [12, 12, 0])  # a row of padding has none
  same, lengths = run(trimmed, params, x_BTF, [22, 7, 0])
  np.testing.assert_array_equal(lengths, [11, 4, 0])
  assert_within(out[:2], same[:2], rounding(TestContract.longest, TestContract.scale()[:2]))


def test_features_that_do_not_fit_are_refused_by_name():
  encoder, params, _ = TestContract.make()
  with pytest.raises(ValueError, match=r"25 frames .* whisper.context=12 allows 24.*at most 20"):
    run(encoder, params, np.zeros((1, 25, 8), np.float32), [25])


@pytest.mark.parametrize(
  "values, message",
  [
    ({"hidden_size": 382}, "whisper.hidden_size=382 .* whisper.heads=6"),
    ({"hidden_size": 381, "heads": 3}, "whisper.hidden_size=381 must be even"),
    ({"layers": 0}, "whisper.layers=0"),
    ({"context": 1501}, "whisper.context=1501 .* whisper.positions=1500"),
    ({"context": 0}, "whisper.context=0"),
  ],
)
def test_impossible_sizes_are_refused_by_name(values, message):
  with pytest.raises(ValueError, match=message):
    WhisperConfig(**values)
