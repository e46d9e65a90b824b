"""The windowed Q-Former against its published structure and against transformers' BLIP-2."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from mooer_jax import tree
from mooer_jax.connectors.qformer import QFormerConfig, WindowedQFormer
from mooer_jax.nn.compute import ExecutionConfig
from tests.parity import torch_qformer
from tests.parity.torch_models import error
from tests.parity.torch_qformer import Blip2, QFormer, tokens

TOLERANCE = 1e-4  # of the deviation, the bound of the project
SMALL = dict(hidden_size=48, heads=4, intermediate_size=80, window=7, queries=3, layers=3)


def largest_error(kind, config, *, frames=60, input_width=2048, output_width=96, scan=False):
  theirs = torch_qformer.make(kind, config, input_width, output_width)
  params = torch_qformer.params(theirs.state_dict())
  params = tree.stack_layers(params) if scan else params
  rng = np.random.default_rng(0)
  frames_BTD = rng.normal(size=(2, frames, input_width)).astype(np.float32)
  ours = WindowedQFormer(config, output_width, ExecutionConfig(scan=scan))
  tokens_BSD, valid_BS = jax.jit(ours.apply)(
    {"params": params}, frames_BTD, np.ones((2, frames), bool)
  )
  assert valid_BS.all()
  worst = error(tokens_BSD, tokens(theirs, frames_BTD, config))
  print(f"{kind.__name__}: error {worst:.1e} standard deviations")
  return worst


@pytest.mark.parametrize("kind, scan", [(QFormer, True), (Blip2, False)])
def test_equals_at_the_real_sizes(kind, scan):
  assert largest_error(kind, QFormerConfig(), scan=scan) <= TOLERANCE


@pytest.mark.parametrize("kind", [QFormer, Blip2])
@pytest.mark.parametrize("edge", ["drop", "pad"])
@pytest.mark.parametrize("stride, frames", [(7, 30), (5, 30), (1, 12), (7, 28)])
def test_equals_with_several_queries_strides_and_edges(kind, edge, stride, frames):
  config = QFormerConfig(**SMALL, stride=stride, edge=edge)
  assert largest_error(kind, config, frames=frames, input_width=32) <= TOLERANCE


def test_another_epsilon_or_activation_is_not_equal(monkeypatch):
  """What the bound is worth: it tells GELU from its approximation."""
  config = QFormerConfig(**SMALL, stride=7)
  frames_BTD = np.random.default_rng(0).normal(size=(2, 30, 32)).astype(np.float32)

  def of(config):
    theirs = torch_qformer.make(QFormer, config, 32, 96)
    return tokens(theirs, frames_BTD, config)

  exact = of(config)
  assert error(of(dataclasses.replace(config, norm_eps=1e-3)), exact) > TOLERANCE
  tanh = functools.partial(torch.nn.functional.gelu, approximate="tanh")
  monkeypatch.setattr(torch.nn.functional, "gelu", tanh)
  assert error(of(config), exact) > TOLERANCE
