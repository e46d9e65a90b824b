"""The kernels for TPU, compiled by Mosaic for real chips without one."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mooer_jax.kernels.decode_tpu import decode_attention
from mooer_jax.kernels.flash_attention import Bias, flash_attention
from mooer_jax.kernels.window_tpu import window_attention

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="no libtpu (Linux on x86-64)"
)
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def custom_calls(function, *shapes, chips):
  """Number of Mosaic kernels in a function that is compiled for one chip."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  devices = topologies.get_topology_desc(platform="tpu", topology_name=chips).devices
  sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
  shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
  return jax.jit(function).lower(*shapes).compile().as_text().count('"tpu_custom_call"')


def flash_case(B, T, H, K, C, dtype, *, causal, biased=False):
  shapes = [((B, T, H, C), dtype), ((B, T, K, C), dtype), ((B, T, K, C), dtype), ((B, T), bool)]
  if biased:
    shapes += [((B, T, H), jnp.float32), ((H, 2 * T - 1), jnp.float32)]

  def loss(q, k, v, valid_BS, *bias):
    bias = Bias(*bias) if bias else None
    out = flash_attention(q, k, v, valid_BS=valid_BS, causal=causal, bias=bias, backend="mosaic")
    return out.astype(jnp.float32).sum()

  return jax.grad(loss, (0, 1, 2, 4, 5) if biased else (0, 1, 2)), shapes, 3


def decode_case(B, T, S, H, K, C):
  cache = ((B, S, K * C), jnp.bfloat16)
  shapes = [((B, T, H, C), jnp.bfloat16), cache, cache, ((B, T, S), bool), ((), jnp.int32)]

  def attend(q, k, v, mask, end):
    return decode_attention(q, k, v, kv_heads=K, mask_BTS=mask, end=end)

  return attend, shapes, 1


def window_case(N, Q, L, H, C, dtype):
  shapes = [((N, Q, H, C), dtype), ((N, L, H, C), dtype), ((N, L, H, C), dtype)]
  loss = lambda *qkv: window_attention(*qkv).astype(jnp.float32).sum()  # noqa: E731
  return jax.value_and_grad(loss, (0, 1, 2)), shapes, 2


# The shapes of the released models: SAN-M and Qwen2-7B, Whisper, Qwen2-0.5B in float32, BEATs;
# 30 s clips. Four beams of Qwen2-7B, of Qwen2-0.5B and of Vicuna-13B. SALMONN's Q-Former.
CASES = {
  "sanm": lambda: flash_case(2, 500, 4, 4, 128, jnp.bfloat16, causal=False),
  "whisper": lambda: flash_case(1, 1500, 20, 20, 64, jnp.bfloat16, causal=False),
  "beats": lambda: flash_case(2, 1496, 12, 12, 64, jnp.bfloat16, causal=False, biased=True),
  "qwen2_7b": lambda: flash_case(2, 620, 28, 4, 128, jnp.bfloat16, causal=True),
  "qwen2_0.5b": lambda: flash_case(1, 187, 14, 2, 64, jnp.float32, causal=True),
  "decode qwen2_7b": lambda: decode_case(16, 4, 1500, 28, 4, 128),
  "decode qwen2_0.5b": lambda: decode_case(4, 1, 333, 14, 2, 64),
  "decode vicuna_13b": lambda: decode_case(4, 4, 700, 40, 40, 128),
  "windows": lambda: window_case(704, 1, 17, 12, 64, jnp.bfloat16),
  "windows of 4 queries": lambda: window_case(88, 4, 17, 12, 64, jnp.float32),
}
SHORT = ("sanm", "decode qwen2_0.5b", "windows")


def check(case, chips):
  function, shapes, kernels = CASES[case]()
  assert custom_calls(function, *shapes, chips=chips) == kernels


@pytest.mark.parametrize("case", SHORT)
def test_compiles_for_a_v5e(case):
  check(case, "v5e:2x2")


@pytest.mark.nightly
@pytest.mark.parametrize("chips", CHIPS)
@pytest.mark.parametrize("case", CASES)
def test_compiles_for_every_chip(case, chips):
  check(case, chips)
