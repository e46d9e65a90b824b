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
from tests.numerics import exceeds_the_bound
from tests.parity import torch_models, torch_qformer
from tests.parity.torch_qformer import Blip2, QFormer

SMALL = dict(hidden_size=48, heads=4, intermediate_size=80, window=7, queries=3, layers=3)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, frames_BTD):
  return module.apply({"params": params}, frames_BTD, np.ones(frames_BTD.shape[:2], bool))


def check(kind, config, *, ours=None, frames=60, input_width=2048, output_width=96, scan=False):
  """Raises unless our tokens are those of `kind`; `ours` is the config of our side."""
  theirs = torch_qformer.make(kind, config, input_width, output_width)
  params = torch_qformer.params(theirs.state_dict())
  params = tree.stack_layers(params) if scan else params
  rng = np.random.default_rng(0)
  frames_BTD = rng.normal(size=(2, frames, input_width)).astype(np.float32)
  module = WindowedQFormer(ours or config, output_width, ExecutionConfig(scan=scan))
  tokens_BSD, valid_BS = apply(module, params, frames_BTD)
  assert valid_BS.all()

  def run(module, dtype):
    return torch_qformer.tokens(module, torch.tensor(frames_BTD, dtype=dtype), config)

  torch_models.assert_parity(tokens_BSD, run, theirs, layers=config.layers)


@pytest.mark.parametrize("kind, scan", [(QFormer, True), (Blip2, False)])
def test_equals_at_the_real_sizes(kind, scan):
  check(kind, QFormerConfig(), scan=scan)


@pytest.mark.parametrize("kind", [QFormer, Blip2])
@pytest.mark.parametrize("edge", ["drop", "pad"])
@pytest.mark.parametrize("stride, frames", [(7, 30), (5, 30), (1, 12), (7, 28)])
def test_equals_with_several_queries_strides_and_edges(kind, edge, stride, frames):
  config = QFormerConfig(**SMALL, stride=stride, edge=edge)
  check(kind, config, frames=frames, input_width=32)


def test_another_epsilon_or_activation_exceeds_the_bound(monkeypatch):
  config = QFormerConfig(**SMALL, stride=7)
  with exceeds_the_bound():
    check(QFormer, config, ours=dataclasses.replace(config, norm_eps=1e-4), input_width=32)
  gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")
  monkeypatch.setattr(torch.nn.functional, "gelu", gelu)
  with exceeds_the_bound():
    check(QFormer, config, input_width=32)
