"""A fine-tune finds its base wherever the two are moved, as long as one of its two paths holds."""

import json

import numpy as np
import pytest

from mooer_jax import checkpoint

BASE = {"w": np.float32(1), "lora": np.float32(2)}


def save(folder, params, **options):
  return checkpoint.save(
    folder, params=params, config_json={}, tokenizer=lambda _: None, generation={}, **options
  )


@pytest.fixture
def tuned(tmp_path):
  """`home/models/base` and its fine-tune, `home/runs/tuned`."""
  base = save(tmp_path / "home" / "models" / "base", BASE)
  return save(tmp_path / "home" / "runs" / "tuned", {"lora": np.float32(3)}, base=base)


def assert_whole(folder, base):
  loaded = checkpoint.load(folder)
  assert loaded.base == base
  assert {name: float(leaf) for name, leaf in loaded.params.items()} == {"w": 1.0, "lora": 3.0}


def test_moved_together(tuned, tmp_path):
  (tmp_path / "home").rename(tmp_path / "away")
  assert_whole(tmp_path / "away" / "runs" / "tuned", tmp_path / "away" / "models" / "base")


def test_moved_alone(tuned, tmp_path):
  assert_whole(tuned.rename(tmp_path / "tuned"), tmp_path / "home" / "models" / "base")


def test_the_base_beside_it_comes_first(tuned, tmp_path):
  """A copy of both does not depend on what happens to the originals."""
  (tmp_path / "home").rename(tmp_path / "copy")
  save(tmp_path / "home" / "models" / "base", {"w": np.float32(7), "lora": np.float32(7)})
  assert_whole(tmp_path / "copy" / "runs" / "tuned", tmp_path / "copy" / "models" / "base")


def test_a_checkpoint_that_knows_only_the_absolute_path_still_loads(tuned, tmp_path):
  file = tuned / "checkpoint.json"
  about = json.loads(file.read_text())
  del about["base"]["relative"]
  file.write_text(json.dumps(about))
  assert_whole(tuned, tmp_path / "home" / "models" / "base")


def test_a_whole_checkpoint_takes_no_base(tuned, tmp_path):
  base = tmp_path / "home" / "models" / "base"
  with pytest.raises(
    checkpoint.CheckpointError, match="has no base checkpoint; leave out base_checkpoint="
  ):
    checkpoint.describe(base, base=tuned)
