"""The kernels for TPU, compiled by Mosaic for real chips without one."""

import importlib.util

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.chips import kernels_of, topology_devices
from benchmarks.kernels import SPECS

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="no libtpu (Linux on x86-64)"
)
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


# VMEM that XLA grants a kernel by default, the same for all of these chips.
VMEM_BYTES = 16 * 2**20
# Pallas kernels of each operation and its gradients.
KERNELS = {
  "attention": {"flash_attention_forward", "flash_attention_dq", "flash_attention_dkv"},
  "decode_attention": {"decode_attention"},
  "window_attention": {"window_attention_forward", "window_attention_backward"},
}
SHORT = ("sanm", "decode qwen2_0.5b", "windows")


def compiled(case, topology, implementation):
  spec, chips = SPECS[case], topology_devices(topology)
  sharding = NamedSharding(Mesh(np.array(chips[:1]), ("x",)), PartitionSpec())
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in spec.shapes()]
  return kernels_of(jax.jit(spec.function(implementation, platform="tpu")).lower(*shapes).compile())


def check(case, topology):
  found = compiled(case, topology, "mosaic")
  assert found.keys() == KERNELS[SPECS[case].operation]
  for kernel in found.values():
    assert kernel["calls"] == 1 and 0 < kernel["vmem_bytes"] <= VMEM_BYTES


@pytest.mark.parametrize("case", SHORT)
def test_compiles_for_a_v5e(case):
  check(case, "v5e:2x2")


@pytest.mark.parametrize("case", ["sanm", "qwen2_7b"])
def test_splash_attention_of_jax_compiles_for_a_v5e(case):
  """Forward, dq and dkv; its kernels have no names in the program."""
  (found,) = compiled(case, "v5e:2x2", "splash").values()
  assert found["calls"] == 3


@pytest.mark.nightly
@pytest.mark.parametrize("chips", CHIPS)
@pytest.mark.parametrize("case", SPECS)
def test_compiles_for_every_chip(case, chips):
  check(case, chips)
