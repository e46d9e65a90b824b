"""Kernels run on each device's rows and heads, where a mesh splits them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mooer_jax import kernels
from mooer_jax.kernels.arrays import axes_to_split, on_mesh
from mooer_jax.kernels.decode_attention import gpu, tpu
from tests.jaxprs import equations

SPEC = P(("data", "fsdp"), None, "tensor")


def make_mesh(*sizes):
  names = ("data", "fsdp", "tensor")
  return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("sizes, part", [((2, 2, 2), (2, 5, 2)), ((8, 1, 1), (1, 5, 4))])
def test_each_device_has_its_part_and_the_result_is_whole(sizes, part):
  mesh, seen = make_mesh(*sizes), []

  def double(x):
    seen.append(x.shape)
    return 2 * x

  @jax.jit
  def program(x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return on_mesh(double, (SPEC,), SPEC)(x)

  x = np.arange(8 * 5 * 4.0).reshape(8, 5, 4)
  out = program(jax.device_put(x, NamedSharding(mesh, SPEC)))
  np.testing.assert_array_equal(out, 2 * x)
  assert seen == [part]


def test_without_a_mesh_or_within_a_device_the_function_is_called_as_it_is():
  x = jnp.ones((8, 5, 4))
  call = functools.partial(on_mesh, lambda x: 2 * x, (SPEC,), SPEC)
  assert "shard_map" not in str(jax.make_jaxpr(lambda x: call()(x))(x))
  per_device = jax.pmap(lambda x: call()(x))
  np.testing.assert_array_equal(per_device(x), 2 * x)


def test_a_mesh_of_one_device_splits_nothing():
  mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])

  def program(x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return on_mesh(lambda x: 2 * x, (SPEC,), SPEC)(x)

  names = {e.primitive.name for e in equations(jax.make_jaxpr(program)(jnp.ones((8, 5, 4))))}
  assert "shard_map" not in names


@pytest.mark.parametrize(
  "name, backend, platform", [("mosaic", tpu, "tpu"), ("triton", gpu, "gpu")]
)
def test_the_decoding_kernel_gets_the_rows_and_heads_of_a_device(
  monkeypatch, name, backend, platform
):
  mesh, shapes = make_mesh(2, 2, 2), []
  kernel = backend.decode_attention

  def recorded(q, k, v, mask, end, *, interpret):
    shapes.append((q.shape, k.shape, mask.shape))
    return kernel(q, k, v, mask, end, interpret=True)

  monkeypatch.setattr(backend, "decode_attention", recorded)
  rng = np.random.default_rng(0)
  q_BTHC = rng.normal(size=(8, 3, 4, 16)).astype(np.float32)
  k_BSE, v_BSE = rng.normal(size=(2, 8, 20, 2 * 16)).astype(np.float32)
  mask_BTS = rng.random((8, 3, 20)) < 0.7
  mask_BTS[..., 0], mask_BTS[..., 15:] = True, False

  @functools.partial(jax.jit, static_argnames="implementation")
  def attend(q, k, v, mask_BTS, end, implementation):
    chosen = dict(implementation=implementation, platform=platform)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return kernels.decode_attention(q, k, v, kv_heads=2, mask_BTS=mask_BTS, end=end, **chosen)

  split = jax.device_put((q_BTHC, k_BSE, v_BSE, mask_BTS), NamedSharding(mesh, P(("data", "fsdp"))))
  out, expected = (attend(*split, jnp.int32(15), name) for name in (name, "xla"))
  # Each is within the rounding of sums of 20 terms of the weighted values, all below 1.
  terms, largest = 20 + 16, np.abs(v_BSE).max()
  bound = 4 * terms * np.finfo(np.float32).eps * largest
  assert np.abs(out - expected).max() < bound
  # 2 of 8 rows; 1 of 2 key-value heads with 2 of 4 heads, for 3 queries each.
  assert shapes == [((2, 1, 6, 16), (2, 20, 16), (2, 3, 20))]


def test_inside_of_shard_map_no_axis_is_left_to_split():
  mesh = make_mesh(1, 1, 8)
  seen = []

  def of_device(x):
    seen.append(axes_to_split())
    return x

  x = jnp.ones((8, 2))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    assert axes_to_split() == {"tensor": 8}
  jax.shard_map(of_device, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"))(x)
  assert seen == [{}]
