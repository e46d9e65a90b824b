"""BEATs in torch on random weights, and those weights in our layout."""

import dataclasses

import numpy as np
import torch

from convert.parts import beats
from convert.verify.reference.beats import BEATs
from mooer_jax import tree
from mooer_jax.encoders.beats import BEATsConfig
from tests import tiny
from tests.parity.torch_models import vary_vectors

SMALL = dataclasses.replace(tiny.BEATS, layers=3)


def model(config: BEATsConfig, seed=0) -> BEATs:
  torch.manual_seed(seed)
  cfg = beats.cfg_of(dataclasses.replace(config, input_width=BEATsConfig.input_width))
  return louder(vary_vectors(BEATs(cfg, config.input_width), seed))


def louder(module, seed=1):
  """Makes what starts small or even large enough that a mistake in it shows."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      if "relative_attention_bias" in name:
        parameter.normal_(0, 1, generator=generator)
      elif name.endswith(("grep_a", "weight_g", "original0")):
        parameter *= 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
      elif name.endswith(("weight_v", "original1")):
        parameter *= 3
  return module.eval()


def params(module) -> dict:
  """The module's state dict in our layout, through the converter's table."""
  leaves = {}
  for name, tensor in module.state_dict().items():
    # speechbrain's weight norm is torch's newer one, of the same two tensors.
    name = name.replace("parametrizations.weight.original0", "weight_g")
    name = name.replace("parametrizations.weight.original1", "weight_v")
    mapped = beats.TABLE.to_jax(name)
    if mapped is None:
      assert "relative_attention_bias" in name or name.startswith("predictor."), name
      continue
    path, transform = mapped
    leaves[path] = np.ascontiguousarray(transform.to_jax(tensor.detach().clone().numpy()))
  return tree.unflatten(leaves)["encoders"]["beats"]
