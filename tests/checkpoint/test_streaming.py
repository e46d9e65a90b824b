"""Leaves that are read when it is their turn: the same checkpoint, in little memory."""

import errno

import jax
import ml_dtypes
import numpy as np
import pytest

from mooer_jax import checkpoint, tree
from mooer_jax.checkpoint import LazyArray, SaveError, streaming

SHAPES = {f"decoder/layers_{n}/kernel": (16, 8 + n) for n in range(12)}


def arrays():
  rng = np.random.default_rng(0)
  kinds = (np.float16, ml_dtypes.bfloat16, np.float32)
  made = {
    path: rng.normal(size=shape).astype(kinds[n % 3])
    for n, (path, shape) in enumerate(SHAPES.items())
  }
  return {**made, "frontend/scale": rng.normal(size=5).astype(np.float32)}


def lazy(flat, read=lambda path, array: array):
  return tree.unflatten(
    {
      path: LazyArray(x.shape, x.dtype, lambda path=path, x=x: read(path, x))
      for path, x in flat.items()
    }
  )


def save(folder, params, **options):
  return checkpoint.save(
    folder, params=params, config_json={}, tokenizer=lambda _: None, generation={}, **options
  )


@pytest.fixture(
  params=[streaming.GROUP_BYTES, 1000, pytest.param(1, marks=pytest.mark.nightly)],
  ids=["one-group", "groups", "one-by-one"],
)
def group_bytes(request, monkeypatch):
  monkeypatch.setattr(streaming, "GROUP_BYTES", request.param)
  return request.param


def test_lazy_leaves_make_the_same_checkpoint(tmp_path, group_bytes):
  flat = arrays()
  order = []
  mixed = lazy(flat, lambda path, x: order.append(path) or x)
  mixed["frontend"]["scale"] = flat["frontend/scale"]  # arrays may stand beside them
  save(tmp_path / "c", mixed)
  assert sorted(order) == sorted(SHAPES)  # each is read once
  loaded = tree.flatten(checkpoint.load(tmp_path / "c").params)
  described = checkpoint.describe(tmp_path / "c")
  on_host = checkpoint.read_leaves(described, flat)
  assert loaded.keys() == on_host.keys() == flat.keys()
  for path, x in flat.items():
    assert isinstance(loaded[path], jax.Array) and isinstance(on_host[path], np.ndarray)
    assert loaded[path].dtype == on_host[path].dtype == x.dtype
    assert np.asarray(loaded[path]).tobytes() == on_host[path].tobytes() == x.tobytes()
  assert not checkpoint.find_damage(tmp_path / "c")


def test_no_more_than_two_groups_are_held(tmp_path, monkeypatch):
  monkeypatch.setattr(streaming, "GROUP_BYTES", 2000)
  alive, most = set(), []

  class Counted(np.ndarray):
    def __del__(self):
      alive.discard(id(self))

  def read(path, x):
    array = x.copy().view(Counted)
    alive.add(id(array))
    most.append(len(alive) * x.nbytes)
    return array

  flat = {f"w_{n:02}": np.full((250,), n, np.float32) for n in range(30)}
  save(tmp_path / "c", lazy(flat, read))
  assert max(most) <= 3 * 2000  # two whole groups and the leaf that did not fit any more
  loaded = checkpoint.load(tmp_path / "c").params
  assert all((loaded[path] == x).all() for path, x in flat.items())


def test_a_leaf_that_cannot_be_read_leaves_what_was_there(tmp_path):
  folder = save(tmp_path / "c", lazy(arrays()))

  def broken(path, x):
    if path.endswith("layers_7/kernel"):
      raise OSError(errno.EIO, "Input/output error")
    return x

  with pytest.raises(SaveError, match="Input/output error"):
    save(folder, lazy(arrays(), broken), overwrite=True)
  assert [path.name for path in tmp_path.iterdir()] == ["c"]
  assert not checkpoint.find_damage(folder)


def test_single_leaves_are_read_from_the_checkpoint_and_its_base(tmp_path):
  flat = arrays()
  base = save(tmp_path / "base", lazy(flat))
  tuned = save(tmp_path / "tuned", {"frontend": {"scale": np.zeros(5, np.float32)}}, base=base)
  about = checkpoint.describe(tuned)
  found = checkpoint.read_leaves(about, ["frontend/scale", "decoder/layers_3/kernel"])
  assert not found["frontend/scale"].any()
  np.testing.assert_array_equal(found["decoder/layers_3/kernel"], flat["decoder/layers_3/kernel"])
  assert len(found) == 2


def test_what_a_converter_keeps_is_found_from_a_fine_tune(tmp_path):
  def keep(folder):
    (folder / "config.json").write_text("{}")

  base = save(tmp_path / "base", {"w": np.float32(1)}, source=keep)
  tuned = save(tmp_path / "tuned", {"w": np.float32(2)}, base=base)
  assert checkpoint.describe(base).sources == [base / "source"]
  assert checkpoint.describe(tuned).sources == [base / "source"]
  again = save(tmp_path / "again", {"w": np.float32(2)}, base=tuned, source=keep)
  assert checkpoint.describe(again).sources == [again / "source", base / "source"]
  assert checkpoint.describe(save(tmp_path / "plain", {"w": np.float32(1)})).sources == []
