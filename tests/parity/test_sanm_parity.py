"""SAN-M against funasr's on the same random weights, and both against funasr's in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mooer_jax import tree
from mooer_jax.encoders.sanm import SANMConfig, SANMEncoder
from mooer_jax.nn.compute import ExecutionConfig
from tests.numerics import exceeds_the_bound, rounded_to
from tests.parity import torch_models

FRAMES_B = np.array([41, 17, 1])


def make_features(scale=1.0):
  features_BTF = np.random.default_rng(0).normal(size=(len(FRAMES_B), max(FRAMES_B), 560))
  return (scale * features_BTF).astype(np.float32)


def valid_frames(frames_BTD):
  return frames_BTD[torch.arange(max(FRAMES_B)) < torch.tensor(FRAMES_B)[:, None]]


@functools.partial(jax.jit, static_argnums=0)
def apply(encoder, params, features_BTF):
  return encoder.apply({"params": params}, features_BTF, np.arange(41) < FRAMES_B[:, None])[0]


def check(config, theirs, features_BTF, *, scan=False, fault=None):
  """Raises unless our frames are those of funasr; `fault` changes a kernel of ours."""
  params = torch_models.sanm_params(theirs)
  if fault:
    attention = params["layers_0"]["attention"]["fsmn"]
    attention["kernel"] = fault(attention["kernel"])
  encoder = SANMEncoder(config, ExecutionConfig(scan=scan))
  out_BTD = apply(encoder, tree.stack_layers(params) if scan else params, features_BTF)

  def run(module, dtype):
    inputs = torch.tensor(features_BTF, dtype=dtype), torch.tensor(FRAMES_B)
    return valid_frames(module(*inputs)[0])

  ours = valid_frames(torch.tensor(np.asarray(out_BTD))).numpy()
  torch_models.assert_parity(ours, run, theirs, layers=config.layers)


@pytest.mark.parametrize(
  "changes, scan",
  [
    ({"layers": 2}, False),
    ({"layers": 3}, True),
    ({"intermediate_size": 128}, True),
    pytest.param({}, True, marks=pytest.mark.nightly),
  ],
  ids=["2-layers", "3-layers", "narrow-50-layers", "50-layers"],
)
def test_equals_funasr_at_real_widths(changes, scan):
  config = SANMConfig(**changes)
  check(config, torch_models.sanm(config), make_features(), scan=scan)


@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_features_far_from_unit_scale(scale):
  config = SANMConfig(layers=2)
  check(config, torch_models.sanm(config), make_features(scale))


@pytest.mark.parametrize(
  "fault", [lambda x: np.float32(1.0001) * x, lambda x: rounded_to(jnp.bfloat16, x)]
)
def test_a_fault_in_one_kernel_exceeds_the_bound(fault):
  config = SANMConfig(layers=2)
  with exceeds_the_bound():
    check(config, torch_models.sanm(config), make_features(), fault=fault)


def test_layer_norm_epsilon_is_that_of_paraformer():
  theirs = torch_models.sanm(SANMConfig(layers=2))
  epsilons = {m.eps for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)}
  assert epsilons == {SANMConfig().norm_eps}
