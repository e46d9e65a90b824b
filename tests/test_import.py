"""What `import mooer_jax` costs and pulls in."""

import json
import subprocess
import sys
import time

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


def test_importing_the_library_takes_under_two_seconds(plain_env):
  def seconds(code):
    start = time.perf_counter()
    _run(code, plain_env)
    return time.perf_counter() - start

  # Best of three: the first reads cold files, and other tests may use the same cores.
  assert min(seconds("import mooer_jax") for _ in range(3)) - min(seconds("") for _ in range(3)) < 2


def test_public_names_of_the_package_load_on_demand(plain_env):
  code = """
import mooer_jax
assert "Transcriber" in dir(mooer_jax) or "Transcriber" in mooer_jax.__all__
try:
  mooer_jax.no_such_name
except AttributeError as error:
  assert "no_such_name" in str(error)
else:
  raise SystemExit("mooer_jax.no_such_name did not fail")
"""
  _run(code, plain_env)
