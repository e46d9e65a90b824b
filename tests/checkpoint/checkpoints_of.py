"""Small checkpoints for tests."""

import ml_dtypes
import numpy as np

from mooer_jax import checkpoint, tree

CONFIG = {"decoder": {"hidden_size": 8}, "text": "转写"}
GENERATION = {"prompt": "Transcribe speech to text. ", "beams": 4}


def params(seed=0):
  rng = np.random.default_rng(seed)

  def block():
    return {
      "q": {
        "kernel": rng.normal(size=(8, 16)).astype(ml_dtypes.bfloat16),
        "lora_a": rng.normal(size=(8, 2)).astype(np.float32),
      },
      "codes": rng.integers(-128, 127, size=(4, 4)).astype(np.int8),
    }

  return {
    "frontend": {"sanm": {"shift": rng.normal(size=6).astype(np.float32)}},
    "decoder": {"layers_0": block(), "layers_1": block()},
    "scalar": np.float32(rng.normal()),
  }


def write_tokenizer(folder):
  (folder / "tokenizer.json").write_text("{}")


def save(folder, tensors, **options):
  defaults = {"config_json": CONFIG, "tokenizer": write_tokenizer, "generation": GENERATION}
  return checkpoint.save(folder, params=tensors, **{**defaults, **options})


def assert_same(a, b):
  a, b = tree.flatten(a), tree.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    assert a[path].dtype == b[path].dtype, path
    np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)
