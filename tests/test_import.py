"""What `import mooer_jax` costs and pulls in."""

import json
import subprocess
import sys
import time

import pytest

import mooer_jax

FORBIDDEN = (
  "librosa", "torch", "grain", "tensorflow", "tensorflow_datasets", "gradio", "orbax", "optax",
  "soundfile", "soxr", "av", "tokenizers", "rich", "matplotlib", "tensorboardX", "transformers",
)  # fmt: skip


def _run(code, env):
  return subprocess.run(
    [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=120
  ).stdout


def test_importing_the_library_loads_no_heavy_package(plain_env):
  code = "import json, sys, mooer_jax; print(json.dumps([*sys.modules]))"
  loaded = json.loads(_run(code, plain_env))
  assert "mooer_jax" in loaded
  assert sorted(set(FORBIDDEN) & set(loaded)) == []


@pytest.mark.parametrize("name, limit_s", [("mooer_jax", 2), ("mooer_jax.speech_llm", 4)])
def test_importing_is_quick(plain_env, name, limit_s):
  def seconds(code):
    start = time.perf_counter()
    _run(code, plain_env)
    return time.perf_counter() - start

  # Best of three: the first reads cold files, and other tests may use the same cores.
  needed = min(seconds(f"import {name}") for _ in range(3)) - min(seconds("") for _ in range(3))
  assert needed < limit_s


def test_public_names_of_the_package_load_on_demand(plain_env):
  code = """
import json, sys, mooer_jax
before = {*sys.modules}
loaded = mooer_jax.Transcriber
assert isinstance(loaded, type) and callable(loaded.from_checkpoint)
print(json.dumps([[*before], [*sys.modules]]))
"""
  before, after = (set(modules) for modules in json.loads(_run(code, plain_env)))
  ours = {"mooer_jax.transcribe.transcriber", "mooer_jax.speech_llm", "mooer_jax.checkpoint"}
  assert not ({"jax", "flax", "numpy", *FORBIDDEN} | ours) & before
  assert ours <= after


def test_an_unknown_name_of_the_package_is_refused():
  with pytest.raises(AttributeError, match="no_such_name"):
    _ = mooer_jax.no_such_name


def test_every_public_name_exists():
  for name in mooer_jax.__all__:
    assert callable(getattr(mooer_jax, name))
