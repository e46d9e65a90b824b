import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import tree
from mooer_jax.encoders.sanm import SANMConfig, SANMEncoder
from mooer_jax.nn.compute import ExecutionConfig
from tests import tiny
from tests.encoders import contract


def memory_kernel(config, params, features, frames_B):
  flat = tree.flatten(params)
  flat["layers_0/attention/fsmn/kernel"] *= np.float32(1.001)
  return config, tree.unflatten(flat), features, frames_B


class TestContract(contract.EncoderContract):
  module = SANMEncoder
  config = tiny.SANM
  frames_B = (12, 7, 1)
  empty_B = (0, 12, 1)
  longest = 56  # a frame's features
  fillers = (1e4, -1e4)
  faults = (
    contract.louder,
    contract.one_frame_later,
    contract.shorter_mask,
    memory_kernel,
    contract.other_eps,
  )


def test_paraformer_large_has_157_98_million_parameters():
  config = SANMConfig()
  shapes = (jax.ShapeDtypeStruct((1, 8, 560), jnp.float32), jax.ShapeDtypeStruct((1, 8), bool))
  trees = {}
  for scan in (False, True):
    encoder = SANMEncoder(config, ExecutionConfig(scan=scan))
    trees[scan] = jax.eval_shape(encoder.init, jax.random.key(0), *shapes)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(trees[False])) == 157_975_648
  assert tree.stack_layers(trees[False]) == trees[True]
  out, _ = jax.eval_shape(SANMEncoder(config).apply, {"params": trees[False]}, *shapes)
  assert out.shape == (1, 8, 512)


@pytest.mark.parametrize(
  "values, message",
  [
    ({"hidden_size": 510}, "sanm.hidden_size=510 .* sanm.heads=4"),
    ({"memory_kernel": 10}, "memory_kernel=10 must be odd"),
    ({"layers": 1}, "sanm.layers=1"),
  ],
)
def test_impossible_sizes_are_refused_by_name(values, message):
  with pytest.raises(ValueError, match=message):
    SANMConfig(**values)
