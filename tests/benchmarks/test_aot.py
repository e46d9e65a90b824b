"""The AOT tool on a small model: real libtpu, FLOPs by hand, and where the activations lie."""

import importlib.util
import json
import platform
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import flops
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.nn.compute import Compute
from mooer_jax.run.program import abstract_state, jitted_step
from mooer_jax.speech_llm import Batch
from mooer_jax.training.optimizer import OptimizerConfig
from mooer_jax.training.sharding import make_mesh

ROWS, FRAMES, PROMPT, ANSWER = 48, 50, 7, 9
LENGTH = FRAMES // 2 + PROMPT + ANSWER - 1
SMALL_CONFIG = """
import importlib.util

def get_config():
  spec = importlib.util.spec_from_file_location("full", {full!r})
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.model.unlock()
  config.model.sanm = dict(layers=3, width=256, heads=2, mlp_width=512)
  config.model.linear = dict(hidden_width=256)
  config.model.llm.update(
    lora_rank=16, layers=3, width=256, heads=2, kv_heads=1, mlp_width=512, vocab=1024)
  config.data.buckets = (64,)
  config.data.answer_buckets = (32,)
  config.data.max_s = 3.8
  config.data.batch_size = 32
  return config
"""


def model(remat):
  return SpeechLLMConfig(
    encoders=(SANMConfig(layers=3, width=256, heads=2, mlp_width=512),),
    connector=LinearConfig(hidden_width=256),
    decoder=LLMConfig(
      lora_rank=16,
      layers=3,
      width=256,
      heads=4,
      kv_heads=2,
      head_width=64,
      mlp_width=512,
      vocab=1024,
    ),
    compute=Compute(scan=True, remat=remat),
  )


def traced(remat, fsdp=8):
  """The step of two micro-batches, traced for a mesh of faked CPU devices."""
  config = model(remat)
  mesh = make_mesh(data=1, fsdp=fsdp, devices=jax.devices()[:fsdp])
  optimizer = OptimizerConfig()
  (state, frozen), shardings = abstract_state(
    config, optimizer, trainable=("connector/.*", "decoder/.*/lora_[ab]"), mesh=mesh
  )

  def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct((ROWS, *sizes), dtype)

  batch = Batch(
    features=(shape(FRAMES, 560, dtype=jnp.float32),),
    frames=(shape(),),
    before_BS=shape(0),
    after_BS=shape(PROMPT),
    answer_BS=shape(ANSWER),
  )
  step = jitted_step(config, optimizer, accumulation=2, mesh=mesh, shardings=shardings)
  return step.trace(state, frozen, batch)


def needed(config):
  return flops.train_step(config, rows=ROWS, frames=FRAMES, prompt=PROMPT, answer=ANSWER)


def test_counted_flops_are_those_by_hand():
  assert flops.traced(traced("none").jaxpr) == needed(model("none"))


def test_recomputation_adds_at_most_a_forward_pass():
  more = flops.traced(traced("full").jaxpr) / needed(model("full"))
  assert 1.1 < more < 1.5


def test_a_loop_counts_as_often_as_it_runs():
  def double(x, _):
    return x @ x, None

  x = jnp.ones((4, 4))
  jaxpr = jax.make_jaxpr(lambda x: jax.lax.scan(double, x, length=5))(x)
  assert flops.traced(jaxpr) == 5 * 2 * 4**3
  endless = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x))
  with pytest.raises(ValueError, match="while loop"):
    flops.traced(endless(x))


@pytest.mark.slow
def test_every_device_works_on_its_own_rows_only():
  """Left to itself, XLA splits widths and keeps all rows of every layer on every device."""
  text = traced("full").lower().compile().as_text()
  rows = ROWS // 2
  inside = rf"\[(\d+),({LENGTH}|{FRAMES}),\d+\]"
  found = {int(match[1]) for match in re.finditer(inside, text)}
  assert rows // 8 in found
  assert rows not in found and ROWS not in found


@pytest.fixture
def libtpu():
  """Skips where there can be no libtpu."""
  if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("libtpu is only published for Linux on x86_64")
  assert importlib.util.find_spec("libtpu"), "libtpu belongs to the test packages: make test"


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_the_tool_compiles_for_a_tpu(repo_root, tmp_path, plain_env):
  config, out = tmp_path / "small.py", tmp_path / "aot.json"
  config.write_text(SMALL_CONFIG.format(full=str(repo_root / "configs" / "mooer_7b.py")), "utf-8")
  process = subprocess.run(
    [
      sys.executable,
      "-m",
      "benchmarks.aot",
      f"--config={config}",
      "--topology=v5e:2x2",
      "--json",
      str(out),
      "--config.data.window=32",
    ],
    env={key: value for key, value in plain_env.items() if key != "JAX_COMPILATION_CACHE_DIR"},
    cwd=repo_root,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr[-3000:]
  result = json.loads(out.read_text("utf-8"))
  assert (result["chip"], result["chips"]) == ("TPU v5 lite", 4)
  assert result["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
  assert result["batch"]["rows_per_chip_and_micro_batch"] == 4
  memory = result["memory_gb_per_chip"]
  assert result["hbm_gb_per_chip"] == memory["peak"]
  # The state is given up to the step, so all of it is aliased, and nothing else is.
  assert 0 < memory["aliased"] <= memory["outputs"] < memory["arguments"] < memory["peak"] < 1
  assert 1.1 < result["flops_per_chip"] / result["flops_needed_per_chip"] < 1.5
  assert result["compile_seconds"] > 0
  assert "memory: temporaries" in process.stdout


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
  ("options", "said"),
  [
    (["--topology=v99:2x2"], ["--topology=v99:2x2: INVALID_ARGUMENT", "as in v5e:4x4"]),
    # 16 chips are no whole axes of an 8 x 8 x 8 torus
    (
      ["--topology=v5p:8x8x8", "--config.mesh.data=32", "--config.mesh.fsdp=16",
       "--config.data.batch_size=1024"],
      ["mesh.data=32, mesh.fsdp=16, mesh.tensor=1 does not fit the arrangement of the 512 chips"],
    ),
  ],
)  # fmt: skip
def test_chips_that_cannot_be_are_refused_by_name(repo_root, plain_env, options, said):
  process = subprocess.run(
    [sys.executable, "-m", "benchmarks.aot", "--config=configs/mooer_7b.py", *options],
    env=plain_env,
    cwd=repo_root,
    capture_output=True,
    text=True,
  )
  assert process.returncode != 0
  for message in said:
    assert message in process.stderr


@pytest.mark.nightly
@pytest.mark.usefixtures("libtpu")
def test_the_7b_config_fits_sixteen_chips(repo_root, tmp_path, plain_env):
  out = tmp_path / "aot.json"
  process = subprocess.run(
    [
      sys.executable,
      "-m",
      "benchmarks.aot",
      "--config=configs/mooer_7b.py",
      "--topology=v5e:4x4",
      "--json",
      str(out),
    ],
    env={key: value for key, value in plain_env.items() if key != "JAX_COMPILATION_CACHE_DIR"},
    cwd=repo_root,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr[-3000:]
  result = json.loads(out.read_text("utf-8"))
  assert result["chips"] == 16
  # A v5e chip has 16 GiB; two are left for the runtime and what else lies on it.
  assert result["hbm_gb_per_chip"] < 14
