import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import tree


def params(layers=3, make=np.full):
  def layer(n):
    return {
      "norm": {"scale": make((4,), float(n), np.float32)},
      "mlp": {"up": {"kernel": make((4, 8), n + 0.5, jnp.bfloat16)}},
    }

  return {
    "decoder": {
      "embed": {"embedding": make((16, 4), 9.0, jnp.bfloat16)},
      **{f"layers_{n}": layer(n) for n in range(layers)},
    },
    "connector": {"linear1": {"kernel": make((4, 4), 1.0, np.float32)}},
  }


def assert_same(a, b):
  a, b = tree.flatten(a), tree.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    assert a[path].dtype == b[path].dtype, path
    assert a[path].shape == b[path].shape, path
    if not isinstance(a[path], jax.ShapeDtypeStruct):
      np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def shapes(shape, _, dtype):
  return jax.ShapeDtypeStruct(shape, dtype)


def test_unflatten_inverts_flatten():
  flat = tree.flatten(params())
  assert "decoder/layers_2/mlp/up/kernel" in flat
  assert_same(tree.unflatten(flat), params())


@pytest.mark.parametrize("bad", [{"a/b": 1}, {"": 1}])
def test_keys_that_would_make_a_path_ambiguous_are_refused(bad):
  with pytest.raises(ValueError, match="empty or contains"):
    tree.flatten({"top": bad})


def test_a_path_cannot_be_leaf_and_parent():
  with pytest.raises(ValueError, match="a is a leaf"):
    tree.unflatten({"a/b": 1, "a": 2})
  with pytest.raises(ValueError, match="a is a leaf"):
    tree.unflatten({"a": 2, "a/b": 1})


@pytest.mark.parametrize("make", [np.full, shapes])
def test_partition_loses_no_leaf(make):
  whole = params(make=make)
  trainable, frozen = tree.partition(whole, ("connector/.*", ".*/layers_1/.*"))
  assert sorted(tree.flatten(trainable)) == [
    "connector/linear1/kernel",
    "decoder/layers_1/mlp/up/kernel",
    "decoder/layers_1/norm/scale",
  ]
  assert not tree.flatten(trainable).keys() & tree.flatten(frozen).keys()
  assert_same(tree.merge(trainable, frozen), whole)


def test_partition_with_overlapping_patterns_and_with_none():
  trainable, frozen = tree.partition(params(), ("connector/.*", ".*"))
  assert frozen == {}
  trainable, frozen = tree.partition(params(), ())
  assert trainable == {}
  assert_same(frozen, params())


def test_an_unused_pattern_is_an_error_that_names_it():
  with pytest.raises(ValueError, match=r"'conector/\.\*' matches no path"):
    tree.partition(params(), ("conector/.*",))
  with pytest.raises(ValueError, match="whole path"):
    tree.partition(params(), ("connector",))
  with pytest.raises(ValueError, match="not a regular expression"):
    tree.partition(params(), ("(",))
  with pytest.raises(TypeError, match="not the string"):
    tree.partition(params(), "connector/.*")


def test_merge_refuses_a_path_given_twice():
  with pytest.raises(ValueError, match="connector/linear1/kernel"):
    tree.merge(params(), {"connector": params()["connector"]})


def test_first_match_takes_the_first_rule():
  rules = ((".*/layers_0/.*", "zero"), ("decoder/.*", "decoder"), (".*", "rest"))
  values = tree.flatten(tree.first_match(rules, params()))
  assert values["decoder/layers_0/norm/scale"] == "zero"
  assert values["decoder/layers_1/norm/scale"] == "decoder"
  assert values["connector/linear1/kernel"] == "rest"


def test_first_match_names_a_path_without_rule_and_a_rule_without_path():
  with pytest.raises(ValueError, match="no rule for connector/linear1/kernel"):
    tree.first_match((("decoder/.*", 1),), params())
  rules = ((".*", 1), ("decoder/.*", 2))
  with pytest.raises(ValueError, match=r"'decoder/\.\*' matches no path"):
    tree.first_match(rules, params())
  assert tree.first_match(rules, params(), optional=("decoder/.*",))


@pytest.mark.parametrize(
  "make", [np.full, lambda s, v, d: jnp.full(s, v, d), shapes], ids=["numpy", "jax", "shapes"]
)
def test_unstack_inverts_stack_with_values_dtypes_and_kinds(make):
  whole = params(layers=12, make=make)  # 12: the order is by number, not layers_10 before layers_2
  stacked = tree.stack_layers(whole)
  kernel = stacked["decoder"]["layers"]["mlp"]["up"]["kernel"]
  assert kernel.shape == (12, 4, 8)
  assert kernel.dtype == jnp.bfloat16
  assert isinstance(kernel, type(whole["decoder"]["embed"]["embedding"]))
  assert "layers_0" not in stacked["decoder"]
  if make is not shapes:
    np.testing.assert_array_equal(stacked["decoder"]["layers"]["norm"]["scale"][:, 0], range(12))
  assert_same(tree.unstack_layers(stacked), whole)
  assert_same(tree.stack_layers(tree.unstack_layers(stacked)), stacked)


def test_stacks_nest():
  def inner(v):
    return {f"layers_{n}": {"w": np.full(2, v + n)} for n in range(2)}

  whole = {f"layers_{n}": inner(10 * n) for n in range(3)}
  stacked = tree.stack_layers(whole)
  assert stacked["layers"]["layers"]["w"].shape == (3, 2, 2)
  assert_same(tree.unstack_layers(stacked), whole)


def test_stacking_works_inside_a_trace():
  whole = params(make=lambda s, v, d: jnp.full(s, v, d))
  assert_same(jax.eval_shape(tree.stack_layers, whole), tree.stack_layers(params(make=shapes)))
  stacked = jax.jit(tree.stack_layers)(whole)
  assert_same(jax.jit(tree.unstack_layers)(stacked), whole)


def test_groups_that_do_not_stack_are_refused_by_name():
  gap = params()
  del gap["decoder"]["layers_1"]
  with pytest.raises(ValueError, match="layers_1 is missing"):
    tree.stack_layers(gap)
  paths = params()
  del paths["decoder"]["layers_1"]["norm"]
  with pytest.raises(ValueError, match="layers_1 and layers_0.*norm/scale"):
    tree.stack_layers(paths)
  dtypes = params()
  dtypes["decoder"]["layers_1"]["norm"]["scale"] = np.zeros(4, np.float64)
  with pytest.raises(ValueError, match="norm/scale"):
    tree.stack_layers(dtypes)
  both = {"layers": {"w": np.zeros((1, 2))}, "layers_0": {"w": np.zeros(2)}}
  with pytest.raises(ValueError, match="are siblings"):
    tree.stack_layers(both)
  with pytest.raises(ValueError, match="are siblings"):
    tree.unstack_layers(both)
  with pytest.raises(ValueError, match="leading axis"):
    tree.unstack_layers({"layers": {"a": np.zeros((2, 3)), "b": np.zeros((3, 3))}})
