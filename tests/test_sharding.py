import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mooer_jax import speech_llm, tree
from mooer_jax.config import model_config
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.generation.weights import quantized_shapes
from mooer_jax.sharding import (
  MeshConfig,
  batch_sharding,
  cache_shardings,
  make_mesh,
  param_shardings,
  sharding_rules,
)


def S(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def dense(inputs, outputs, bias=False, rank=0):
  leaves = {"kernel": S(inputs, outputs)}
  if bias:
    leaves["bias"] = S(outputs)
  if rank:
    leaves |= {"lora_a": S(inputs, rank), "lora_b": S(rank, outputs)}
  return leaves


def mooer(layers=2, d=512, m=1024, kv=128, v=4096, rank=64, tied=False):
  """The paths of MooER at small sizes, unstacked."""
  norm = {"scale": S(512), "bias": S(512)}

  def sanm(inputs):
    return {
      "norm1": {"scale": S(inputs), "bias": S(inputs)},
      "norm2": norm,
      "attention": {
        "qkv": dense(inputs, 1536, True),
        "out": dense(512, 512, True),
        "fsmn": {"kernel": S(11, 512)},
      },
      "feed_forward": {"up": dense(512, 2048, True), "down": dense(2048, 512, True)},
    }

  block = {
    "input_norm": {"scale": S(d)},
    "mlp_norm": {"scale": S(d)},
    "attention": {
      "q": dense(d, d, True, rank),
      "k": dense(d, kv, True, rank),
      "v": dense(d, kv, True, rank),
      "o": dense(d, d, False, rank),
    },
    "mlp": {
      "gate": dense(d, m, False, rank),
      "up": dense(d, m, False, rank),
      "down": dense(m, d, False, rank),
    },
  }
  decoder = {
    "embed": {"embedding": S(v, d)},
    "final_norm": {"scale": S(d)},
    **{f"layers_{n}": block for n in range(layers)},
  }
  if not tied:
    decoder["head"] = dense(d, v)
  return {
    "frontend": {"sanm": {"shift": S(560), "scale": S(560)}},
    "encoders": {
      "sanm": {
        "first_layer": sanm(560),
        "after_norm": norm,
        **{f"layers_{n}": sanm(512) for n in range(layers)},
      }
    },
    "connector": {"linear1": dense(1024, 2048, True), "linear2": dense(2048, d, True)},
    "decoder": decoder,
  }


def specs(mesh, params, **options):
  shardings = param_shardings(mesh, params, **options)
  return {path: sharding.spec for path, sharding in tree.flatten(shardings).items()}


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(data=2, fsdp=2, tensor=2)


def test_make_mesh_fills_one_axis():
  assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  assert dict(make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
  "sizes",
  [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": -1, "tensor": 3}, {"data": 0}, {"data": 16}],
)
def test_make_mesh_refuses_sizes_that_do_not_use_every_device(sizes):
  with pytest.raises(ValueError, match=r"mesh\.data="):
    make_mesh(**sizes)


@pytest.mark.parametrize(
  "text, sizes",
  [
    ("data=2,fsdp=1,tensor=4", (2, 1, 4)),
    ("tensor=4", (-1, 1, 4)),
    (" fsdp=-1, data=1", (1, -1, 1)),
  ],
)
def test_sizes_are_read_from_text(text, sizes):
  assert MeshConfig.parse(text) == MeshConfig(*sizes)


@pytest.mark.parametrize("text", ["", "model=4", "tensor", "tensor=two", "tensor=2,tensor=2", "4"])
def test_text_that_names_no_mesh_is_refused(text):
  with pytest.raises(ValueError, match="the axes data, fsdp, tensor, as in data=2,tensor=4"):
    MeshConfig.parse(text)


@pytest.mark.parametrize("kv_heads", [4, 2, 3])
def test_a_cache_is_split_by_rows_and_by_heads_where_they_divide(kv_heads):
  """Over data=2 x fsdp=2, and over tensor=2."""
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  config = LLMConfig(
    vocab_size=8, hidden_size=8, layers=1, heads=12, kv_heads=kv_heads, head_dim=32,
    intermediate_size=8,
  )  # fmt: skip
  cache = jax.eval_shape(lambda: config.empty_cache(rows=8, slots=5, dtype=jnp.bfloat16))
  shardings = cache_shardings(cache, kv_heads, mesh)
  shapes = jax.tree.map(lambda x, s: s.shard_shape(x.shape), cache, shardings)
  parts = 2 if kv_heads % 2 == 0 else 1
  assert shapes.layers == (((2, 5, kv_heads * 32 // parts),) * 2,)
  assert (shapes.valid_BS, shapes.filled, shapes.positions_B) == ((2, 5), (), (2,))


MOOER_7B = {
  "encoders": ("sanm_large",),
  "connector": "linear",
  "decoder": "qwen2_7b",
  "llm": {"lora_rank": 64, "layers": 2},
  "sanm": {"layers": 3},
}
SALMONN_7B = {
  "encoders": ("whisper_large", "beats_iter3"),
  "encoder_norm": True,
  "connector": "qformer",
  "decoder": "vicuna_7b",
  "llm": {"lora_rank": 8, "layers": 2},
  "whisper": {"layers": 2},
  "beats": {"layers": 2},
  "chat_template": "vicuna",
}


@pytest.mark.parametrize("scan", [True, False])
def test_the_table_has_a_rule_for_every_leaf_and_no_rule_too_many(mesh, scan):
  paths = {}
  for sizes in (MOOER_7B | {"speech_output": {}}, SALMONN_7B):
    config = model_config(sizes, {"scan": scan})
    params = jax.eval_shape(lambda c=config: speech_llm.init(jax.random.key(0), c))
    for leaf, sharding in zip(
      jax.tree.leaves(params), jax.tree.leaves(param_shardings(mesh, params)), strict=True
    ):
      assert sharding.shard_shape(leaf.shape)
    paths |= tree.flatten(params)
    rounded = quantized_shapes(speech_llm.param_shapes(config))
    assert param_shardings(mesh, rounded).keys() == rounded.keys()
    paths |= tree.flatten(rounded)
  tree.first_match(
    sharding_rules(), tree.unflatten(paths)
  )  # an unused rule would be a mistyped one


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [0, 64])
def test_every_path_of_every_variant_has_a_rule(mesh, tied, rank):
  params = mooer(tied=tied, rank=rank)
  assert specs(mesh, params).keys() == tree.flatten(params).keys()
  trainable, frozen = tree.partition(params, ("connector/.*",))
  whole = specs(mesh, params)
  assert {**specs(mesh, trainable), **specs(mesh, frozen)} == whole


def test_pairs_of_layers_are_split_by_columns_then_rows(mesh):
  at = specs(mesh, mooer())
  assert at["decoder/layers_1/mlp/up/kernel"] == P("fsdp", "tensor")
  assert at["decoder/layers_1/mlp/down/kernel"] == P("tensor", "fsdp")
  assert at["decoder/layers_0/attention/q/bias"] == P("tensor")
  assert at["decoder/layers_0/input_norm/scale"] == P(None)
  assert at["decoder/embed/embedding"] == P("tensor", "fsdp")
  assert at["encoders/sanm/layers_0/attention/qkv/kernel"] == P(None, "tensor")
  assert at["encoders/sanm/first_layer/attention/qkv/kernel"] == P(None, "tensor")


def test_the_lora_product_lies_like_its_kernel(mesh):
  at = specs(mesh, mooer(), fsdp_min_size=0)
  for path in ("attention/q", "attention/o", "mlp/gate", "mlp/down"):
    path = f"decoder/layers_0/{path}"
    rows, columns = at[f"{path}/kernel"]
    assert at[f"{path}/lora_a"] == P(rows, None)
    assert at[f"{path}/lora_b"] == P(None, columns)


def test_stacked_layers_are_split_like_unstacked_ones(mesh):
  single = specs(mesh, mooer())
  stacked = specs(mesh, tree.stack_layers(mooer()))
  for path, spec in stacked.items():
    one = single[path.replace("/layers/", "/layers_1/")]
    whole = len(spec) > len(one)
    assert tuple(spec) == ((None,) if whole else ()) + tuple(one), path
    assert whole == ("/layers/" in path), path


def test_small_leaves_are_not_split_over_fsdp_whatever_the_number_of_layers(mesh):
  params = mooer(layers=8)
  for form in (params, tree.stack_layers(params)):
    at = specs(mesh, form)
    layer = "layers" if form is not params else "layers_0"
    # 512 x 128 = 2**16 is split, 512 x 64 is not; their stacks of 8 follow them
    assert "fsdp" in at[f"decoder/{layer}/attention/k/kernel"]
    assert "fsdp" not in at[f"decoder/{layer}/attention/q/lora_a"]
    assert "tensor" in at[f"decoder/{layer}/attention/q/lora_b"]


def test_sizes_that_do_not_divide_are_refused_by_name(mesh):
  with pytest.raises(ValueError, match=r"attention/k/bias: an axis of 129 .*mesh.tensor=2"):
    param_shardings(mesh, mooer(kv=129))
  with pytest.raises(ValueError, match=r"head/kernel: an axis of 513 .*mesh.fsdp=2"):
    param_shardings(mesh, {"decoder": {"head": dense(513, 2048)}})


def test_a_new_part_needs_a_rule_and_a_rule_needs_a_part(mesh):
  params = {**mooer(), "narrator": dense(512, 512)}
  with pytest.raises(ValueError, match="no rule for narrator/kernel"):
    param_shardings(mesh, params)
  rules = ((r"narrator/.*", P(None, "fsdp")),)
  assert specs(mesh, params, rules=rules)["narrator/kernel"] == P(None, "fsdp")
  with pytest.raises(ValueError, match="narrator"):
    param_shardings(mesh, mooer(), rules=rules)


def test_arrays_take_their_shardings_and_the_batch_is_split_by_rows(mesh):
  kernel = jax.device_put(
    np.zeros((512, 1024), np.float32),
    param_shardings(mesh, {"decoder": {"layers_0": {"mlp": {"up": dense(512, 1024)}}}})["decoder"][
      "layers_0"
    ]["mlp"]["up"]["kernel"],
  )
  assert kernel.addressable_shards[0].data.shape == (256, 512)
  rows = jax.device_put(np.zeros((8, 3)), batch_sharding(mesh))
  assert rows.addressable_shards[0].data.shape == (2, 3)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU that is not there; slices number their chips alike, as on the device."""

  slice_index: int
  coords: tuple[int, int, int]
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  core_on_chip: int = 0

  @property
  def id(self):
    return self.slice_index * 100_000 + 4 * self.coords[1] + self.coords[0]

  @property
  def process_index(self):
    return self.slice_index


def chips(slices, *, width=2, height=2, **options):
  return [
    Chip(number, (x, y, 0), **options)
    for y in range(height)
    for x in range(width)
    for number in range(slices)
  ]


def slice_indices(mesh):
  return np.vectorize(lambda chip: chip.slice_index)(mesh.devices)


def test_slices_split_data():
  mesh = make_mesh(data=-1, fsdp=2, devices=chips(2))
  assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
  assert (slice_indices(mesh) == np.array([0, 0, 1, 1])[:, None, None]).all()
  mesh = make_mesh(data=3, fsdp=-1, tensor=2, devices=chips(3, width=4))
  assert (slice_indices(mesh) == np.arange(3)[:, None, None]).all()
  # Inside of a slice, the chips are arranged as without others.
  alone = make_mesh(data=1, fsdp=4, tensor=2, devices=chips(1, width=4))
  for of_slice in mesh.devices:
    places = np.vectorize(lambda chip: str(chip.coords))
    assert (places(of_slice) == places(alone.devices[0])).all()


def test_one_slice_is_as_before_and_any_axis_may_cross_hosts_of_gpus():
  assert (slice_indices(make_mesh(fsdp=4, devices=chips(1))) == 0).all()
  gpus = chips(2, platform="gpu", device_kind="GPU")
  assert make_mesh(data=1, fsdp=8, devices=gpus).devices.ravel().tolist() == gpus


def test_sizes_that_do_not_fit_slices_are_refused_by_name():
  expected = (
    r"mesh.data=1, .*mesh.data \(1\) must be divisible by the number of TPU slices, 2.*raise"
  )
  with pytest.raises(ValueError, match=expected):
    make_mesh(data=1, fsdp=-1, devices=chips(2))
  with pytest.raises(ValueError, match=r"mesh.data \(2\) .* TPU slices, 4"):
    make_mesh(data=2, fsdp=8, devices=chips(4))
  with pytest.raises(ValueError, match=r"slices have \[3, 5\] chips"):
    make_mesh(data=2, fsdp=-1, devices=chips(2)[:-1] + chips(1)[:1])
