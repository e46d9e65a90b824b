"""SAN-M against funasr's on the same random weights."""

import jax
import numpy as np
import pytest
import torch

from mooer_jax import tree
from mooer_jax.encoders.sanm import SANMConfig, SANMEncoder
from mooer_jax.nn.compute import ExecutionConfig
from tests.parity import torch_models

# The bound of the project: float32 rounding that adds up like a random walk over the layers.
TOLERANCE = 1e-4


@pytest.mark.parametrize("layers, scan", [(2, False), (3, True), (50, True)])
def test_equals_funasr_at_real_widths(layers, scan):
  config = SANMConfig(layers=layers)
  theirs = torch_models.sanm(config)
  params = torch_models.sanm_params(theirs)
  if scan:
    params = tree.stack_layers(params)
  encoder = SANMEncoder(config, ExecutionConfig(scan=scan))
  frames_B = np.array([41, 17, 1])
  features_BTF = np.random.default_rng(0).normal(size=(3, 41, 560)).astype(np.float32)
  with torch.no_grad():
    expected_BTD, *_ = theirs(torch.tensor(features_BTF), torch.tensor(frames_B))
  valid_BT = np.arange(41) < frames_B[:, None]
  out_BTD, _ = jax.jit(encoder.apply)({"params": params}, features_BTF, valid_BT)
  error = torch_models.error(np.asarray(out_BTD)[valid_BT], expected_BTD.numpy()[valid_BT])
  print(f"error: {error:.1e} standard deviations")
  assert error <= TOLERANCE * layers**0.5


def test_layer_norm_epsilon_is_that_of_paraformer():
  theirs = torch_models.sanm(SANMConfig(layers=2))
  epsilons = {m.eps for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)}
  assert epsilons == {SANMConfig().norm_eps}


@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_features_far_from_unit_scale(scale):
  config = SANMConfig(layers=2)
  theirs = torch_models.sanm(config)
  features_BTF = scale * np.random.default_rng(0).normal(size=(1, 9, 560)).astype(np.float32)
  with torch.no_grad():
    expected_BTD, *_ = theirs(torch.tensor(features_BTF), torch.tensor([9]))
  params = {"params": torch_models.sanm_params(theirs)}
  out_BTD, _ = SANMEncoder(config).apply(params, features_BTF, np.ones((1, 9), bool))
  assert torch_models.error(out_BTD, expected_BTD) <= TOLERANCE * 2**0.5
