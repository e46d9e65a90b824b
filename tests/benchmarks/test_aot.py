"""The AOT tool on a small model: real libtpu, FLOPs by hand, and where the activations lie."""

import dataclasses
import importlib.util
import json
import platform
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import aot_decode, flops
from mooer_jax import speech_llm
from mooer_jax.audio.fbank import FbankConfig
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.data.batches import Batcher
from mooer_jax.data.config import DataConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.beats import BEATsConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.encoders.whisper import WhisperConfig
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.sharding import make_mesh
from mooer_jax.training.optimizer import OptimizerConfig
from mooer_jax.training.program import abstract_state, jitted_step
from tests import forked
from tests.benchmarks import flops_by_hand

ROWS, FRAMES, PROMPT, ANSWER = 48, 50, 7, 9
TRAINED = {
  "mooer": ("connector/.*", "decoder/.*/lora_[ab]"),
  "salmonn": ("encoder_norms/.*", "connector/.*", "decoder/.*/lora_[ab]"),
}
MOOER = SpeechLLMConfig(
  encoders=(SANMConfig(layers=3, hidden_size=256, heads=2, intermediate_size=512),),
  connector=LinearConfig(hidden_size=256),
  decoder=LLMConfig(
    lora_rank=16,
    layers=3,
    hidden_size=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
    intermediate_size=512,
    vocab_size=1024,
  ),
  max_audio_s=3,
)
MODELS = {
  "mooer": MOOER,
  "salmonn": dataclasses.replace(
    MOOER,
    encoders=(
      WhisperConfig(
        layers=3, hidden_size=128, heads=2, intermediate_size=160, input_width=40,
        positions=150, context=60
      ),
      BEATsConfig(
        layers=2, hidden_size=96, heads=4, intermediate_size=192, input_width=32, patch=8,
        patch_width=40, conv_pos=6, conv_pos_groups=3,
      ),
    ),
    connector=QFormerConfig(
      window=7, stride=5, queries=2, hidden_size=72, heads=4, intermediate_size=80
    ),
    decoder=dataclasses.replace(MOOER.decoder, lora_targets=("q", "v"), kv_heads=4),
    frontends=(
      LogMelConfig(bins=40, chunk_s=1.2),
      FrontendConfig(fbank=FbankConfig(bins=32), lfr_window=1, lfr_stride=1),
    ),
    encoder_norm=True,
    chat_template="vicuna",
    max_audio_s=0.4,
  ),
}  # fmt: skip
SMALL_CONFIG = """
import importlib.util

def get_config():
  spec = importlib.util.spec_from_file_location("full", {full!r})
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.model.unlock()
  config.model.llm.update(
    lora_rank=16, layers=3, hidden_size=256, heads=2, kv_heads=2, intermediate_size=512,
    vocab_size=1024)
  config.data.answer_buckets = (32,)
  config.data.max_s = 3.8
  config.data.batch_size = 32
  {more}
  return config
"""
SMALLER = {
  "mooer_7b": """
  config.model.sanm = dict(layers=3, hidden_size=256, heads=2, intermediate_size=512)
  config.model.linear = dict(hidden_size=256)
  config.data.buckets = (64,)
""",
  "salmonn": """
  config.model.whisper = dict(
    layers=3, hidden_size=256, heads=2, intermediate_size=512, positions=190, context=190)
  config.model.beats = dict(layers=3, hidden_size=256, heads=2, intermediate_size=512)
  config.model.qformer.update(hidden_size=256, heads=2, intermediate_size=512)
  config.model.max_audio_s = 3.8
  config.data.buckets = (380,)
""",
}


def batch_of(config):
  """Shapes of a batch with buckets of FRAMES, as training makes them."""
  data = DataConfig(
    "",
    batch_size=ROWS,
    shuffle_buffer_size=ROWS,
    buckets=(FRAMES,),
    answer_buckets=(ANSWER,),
    max_s=0.4,
  )
  return Batcher(data, config, (2, PROMPT - 2)).shapes()[0]


def traced(name, remat, *, fsdp=8, features="host"):
  """The step of two micro-batches, traced for a mesh of faked CPU devices."""
  config = MODELS[name].replace(compute=ExecutionConfig(scan=True, remat=remat, features=features))
  mesh = make_mesh(data=1, fsdp=fsdp, devices=jax.devices()[:fsdp])
  optimizer = OptimizerConfig()
  options = {"trainable": TRAINED[name], "mesh": mesh}
  (state, frozen), _ = abstract_state(config, optimizer, **options)
  step = jitted_step(config, optimizer, accumulation=2, **options)
  return step.trace(state, frozen, batch_of(config))


def needed(name):
  return flops_by_hand.train_step(MODELS[name], batch_of(MODELS[name]))


@pytest.mark.parametrize("name", MODELS)
def test_counted_flops_are_those_by_hand(name):
  assert flops.traced(traced(name, "none").jaxpr) == needed(name)


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_adds_at_most_a_forward_pass(name):
  more = flops.traced(traced(name, "full").jaxpr) / needed(name)
  assert 1.1 < more < 1.5


def test_frames_from_a_cache_take_no_encoder():
  batch = batch_of(config := MODELS["salmonn"])
  encoded = dataclasses.replace(
    batch,
    encoded=True,
    features=tuple(
      jax.ShapeDtypeStruct(
        (ROWS, encoder.num_outputs(x.shape[1]), encoder.hidden_size), jnp.float16
      )
      for encoder, x in zip(config.encoders, batch.features)
    ),
  )
  saved = flops_by_hand.train_step(config, batch) - flops_by_hand.train_step(config, encoded)
  params = jax.eval_shape(lambda: speech_llm.init(jax.random.key(0), config))
  arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
  hearing = jax.make_jaxpr(lambda p: speech_llm.encode(p, arrays, config))(params)
  assert saved == flops.traced(hearing)


def test_features_on_the_device_are_counted_once():
  config = MODELS["salmonn"].with_compute(features="device")  # with both kinds of front ends
  batch = batch_of(config)
  more = flops.traced(traced("salmonn", "none", features="device").jaxpr) - needed("salmonn")
  assert more == sum(flops_by_hand.features(frontend, batch) for frontend in config.frontends)


@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_are_counted_as_xla_does(groups):
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )

  x, kernel = jnp.ones((3, 21, 8)), jnp.ones((5, 8 // groups, 12))
  by_xla = jax.jit(convolve).lower(x, kernel).compile().cost_analysis()["flops"]
  assert flops.traced(jax.make_jaxpr(convolve)(x, kernel)) == by_xla


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
@pytest.mark.parametrize("name", MODELS)
def test_every_device_works_on_its_own_rows_only(name):
  """Left to itself, XLA splits widths and keeps all rows of every layer on every device."""
  text = traced(name, "full").lower().compile().as_text()
  rows = ROWS // 2
  config = MODELS[name]
  heard = [e.num_outputs(x.shape[1]) for e, x in zip(config.encoders, batch_of(config).features)]
  length = config.connector.num_tokens(max(heard)) + PROMPT + ANSWER - 1
  inside = rf"\[(\d+),({'|'.join(map(str, [length, *heard]))}),\d+\]"
  found = {int(match[1]) for match in re.finditer(inside, text)}
  assert rows // 8 in found
  assert rows not in found and ROWS not in found


@pytest.fixture
def aot(repo_root, plain_env):
  """Runs the tool with options; skips where there can be no libtpu."""
  if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("libtpu is only published for Linux on x86_64")
  assert importlib.util.find_spec("libtpu"), "libtpu belongs to the test packages: make test"

  def run(*options):
    return subprocess.run(
      [sys.executable, "-m", "benchmarks.aot", *options],
      env={key: value for key, value in plain_env.items() if key != "JAX_COMPILATION_CACHE_DIR"},
      cwd=repo_root,
      capture_output=True,
      text=True,
    )

  return run


def result_of(process, path) -> dict:
  assert process.returncode == 0, process.stderr[-3000:]
  return json.loads(path.read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, features",
  [
    ("mooer_7b", "host"),
    pytest.param("salmonn", "host", marks=pytest.mark.nightly),
    pytest.param("salmonn", "device", marks=pytest.mark.nightly),
  ],
)
def test_the_tool_compiles_for_a_tpu(aot, repo_root, tmp_path, name, features):
  config, out = tmp_path / "small.py", tmp_path / "aot.json"
  full = repo_root / "configs" / f"{name}.py"
  config.write_text(SMALL_CONFIG.format(full=str(full), more=SMALLER[name].strip()), "utf-8")
  process = aot(
    f"--config={config}", "--topology=v5e:2x2", f"--json={out}",
    "--config.data.shuffle_buffer_size=32",
    "--config.train.gradient_accumulation_steps=2",
    f"--config.compute.features={features}",
  )  # fmt: skip
  result = result_of(process, out)
  assert (result["chip"], result["chips"]) == ("TPU v5 lite", 4)
  assert result["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
  assert result["batch"]["rows_per_chip_and_micro_batch"] == 4
  assert ("samples" in result["batch"]) == (features == "device")
  # By default, attention is that of the Pallas kernels: of encoders and LLM, each a scanned layer.
  # The Q-Former is trained with dropout, which they lack.
  attention = {f"flash_attention_{name}" for name in ("forward", "dq", "dkv")}
  assert result["kernels"].keys() == attention
  if name == "salmonn":
    assert (result["batch"]["whisper_frames"], result["batch"]["beats_frames"]) == (380, 378)
  memory = result["memory_gb_per_chip"]
  assert result["hbm_gb_per_chip"] == memory["peak"]
  # The state is given up to the step, so all of it is aliased, and nothing else is.
  assert 0 < memory["aliased"] <= memory["outputs"] < memory["arguments"] < memory["peak"] < 1
  assert result["hbm_spare_share"] == pytest.approx(1 - memory["peak"] / 16, abs=1e-3)
  assert 1.1 < result["flops_per_chip"] / result["flops_needed_per_chip"] < 1.5
  assert result["compile_seconds"] > 0
  # Layers are gathered one by one. The largest is the head, in bfloat16; a stack of three matrices
  # of the MLP is larger.
  assert result["largest_gather"]["bytes"] == 2 * 1024 * 256
  assert result["collectives"]["all-gather"]["calls"] > 2 * 3 * 7  # of 7 matrices in 3 layers
  assert result["between_slices"] == {}
  found = result["estimate"]
  assert found["means"].startswith("an estimate, not a measurement")
  assert found["slowest"] in found["seconds"].keys() == {"compute", "HBM", "ICI", "DCN"}
  slowest_s, peak = found["seconds"][found["slowest"]], 197e12
  assert slowest_s == max(found["seconds"].values())
  expected = result["flops_needed_per_chip"] / (slowest_s * peak)
  assert found["mfu"] == pytest.approx(expected, rel=1e-2, abs=7e-4)
  assert 0 < found["mfu_without_overlap"] <= found["mfu"] < 1
  assert "memory: temporaries" in process.stdout and "estimated MFU" in process.stdout


@pytest.mark.nightly
def test_only_sums_of_gradients_cross_slices(aot, repo_root, tmp_path):
  config, out = tmp_path / "small.py", tmp_path / "aot.json"
  full, more = repo_root / "configs" / "mooer_7b.py", SMALLER["mooer_7b"].strip()
  config.write_text(SMALL_CONFIG.format(full=str(full), more=more), "utf-8")
  process = aot(
    f"--config={config}", "--topology=v5e:2x2", "--slices=2", f"--json={out}",
    "--config.mesh.data=2", "--config.data.shuffle_buffer_size=32",
    "--config.train.gradient_accumulation_steps=2",
  )  # fmt: skip
  result = result_of(process, out)
  assert (result["slices"], result["chips"]) == (2, 8)
  assert result["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
  assert result["between_slices"].keys() == {"all-reduce SUM"}
  # A chip exchanges its quarter of the gradients: LoRA's in bfloat16 for both micro-batches, those
  # of the connector in float32 for the sum; and a few scalars.
  gradients = 4 * result["parameters"]["trainable"] / 4
  assert 1 <= result["between_slices"]["all-reduce SUM"]["bytes"] / gradients < 1.05
  assert result["collectives"]["all-gather"]["calls"] > 2 * 3 * 7


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", pytest.param("int8", marks=pytest.mark.nightly)])
def test_generation_is_compiled_for_a_tpu(aot, repo_root, tmp_path, quantization):
  config, out = tmp_path / "small.py", tmp_path / "aot.json"
  full, more = repo_root / "configs" / "mooer_7b.py", SMALLER["mooer_7b"].strip()
  config.write_text(SMALL_CONFIG.format(full=str(full), more=more), "utf-8")
  process = aot(
    "--program=decode", f"--config={config}", "--topology=v5e:2x2", f"--json={out}",
    "--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=2",
    "--config.eval.max_s=3.8", "--config.eval.batch_size=7",
    "--config.generation.max_new_tokens=8", "--num_beams=4",
    f"--config.compute.quantization={quantization}",
  )  # fmt: skip
  result = result_of(process, out)
  batch, step, memory = (result[k] for k in ("batch", "decode_step", "memory_gb_per_chip"))
  assert (result["chip"], result["mesh"]) == ("TPU v5 lite", {"data": 2, "fsdp": 1, "tensor": 2})
  # 7 clips of 3.8 s and a padding row; the last of 8 tokens is not read.
  assert (batch["rows"], batch["speech_tokens"], batch["cache_slots"]) == (8, 32, 32 + 26 + 4 * 7)
  # Of each layer half: q, k, v and o, the MLP; biases in float32. Whole: the norms.
  size = {"none": 2, "int8": 1}[quantization]
  layer = (4 * 256 * 256 + 3 * 256 * 512) // 2 * size + 3 * 256 // 2 * 4
  norms, head = (2 * 3 + 1) * 256 * 4, 256 * 1024 // 2 * size
  if quantization == "int8":  # scales of the outputs, which are halved but in o and down
    layer += ((3 * 256 + 2 * 512) // 2 + 2 * 256) * 4
    head += 1024 // 2 * 4
  assert step["weights_bytes_per_chip"] == 3 * layer + norms + head
  # One of the two key-value heads; half of the rows; bfloat16.
  assert step["cache_bytes_per_chip"] == 3 * 2 * (8 // 2) * batch["cache_slots"] * 128 * 2
  read = step["weights_bytes_per_chip"] + step["cache_bytes_per_chip"]
  assert step["read_bytes_per_token"] == read * 4 // 8
  assert step["tokens_per_s_at_full_bandwidth"] == round(8 / (read / 819e9))
  assert result["kernels"].keys() == {"flash_attention_forward", "decode_attention"}
  assert 0 < memory["arguments"] < memory["peak"] == result["hbm_gb_per_chip"] < 1
  assert result["xla_bytes_accessed_per_chip_loops_once"] > read
  assert "a step takes at least" in process.stdout


@pytest.mark.parametrize("llm", ["qwen2_7b", "vicuna_13b"])
def test_int8_weights_are_half_as_large_as_bfloat16(llm):
  mesh = make_mesh(data=1, devices=jax.devices()[:1])

  def size(quantization) -> int:
    compute = ExecutionConfig("bfloat16", quantization=quantization)
    model = SpeechLLMConfig(decoder=LLMConfig.SIZES[llm], compute=compute)
    shapes = aot_decode.abstract_params(model, mesh)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes["decoder"]))

  assert 0.5 < size("int8") / size("none") < 0.55


@pytest.mark.parametrize(
  ("options", "said"),
  [
    (["--topology=v99:2x2"], ["--topology=v99:2x2: INVALID_ARGUMENT", "as in v5e:4x4"]),
    # 16 chips are no whole axes of an 8 x 8 x 8 torus
    (
      ["--topology=v5p:8x8x8", "--config.mesh.data=32", "--config.mesh.fsdp=16",
       "--config.data.batch_size=1024"],
      ["mesh.data=32, mesh.fsdp=16, mesh.tensor=1 does not fit the torus of the 512 chips"],
    ),
    (
      ["--topology=v5e:2x2", "--slices=2"],
      ["mesh.data (1) must be divisible by the number of TPU slices, 2"],
    ),
    (["--slices=2", "--program=decode"], ["--slices has no effect with --program=decode"]),
    (["--num_beams=4"], ["--num_beams has no effect without --program=decode"]),
  ],
)  # fmt: skip
def test_chips_and_options_that_cannot_be_are_refused_by_name(
  repo_root, plain_env, tmp_path, options, said
):
  arguments = ["benchmarks/aot.py", "--config=configs/mooer_7b.py", *options]
  process = forked.run(arguments, cwd=repo_root, env=plain_env, out=tmp_path)
  assert process.returncode != 0
  for message in said:
    assert message in process.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("config", ["mooer_7b.py", "salmonn.py:7b,1"])
def test_the_7b_configs_fit_sixteen_chips(aot, tmp_path, config):
  out = tmp_path / "aot.json"
  process = aot(f"--config=configs/{config}", "--topology=v5e:4x4", f"--json={out}")
  result = result_of(process, out)
  assert result["chips"] == 16
  assert result["hbm_spare_share"] > 0.1
  assert result["largest_gather"]["share_of_the_llm"] < 0.1
  assert result["estimate"]["mfu"] > 0.55


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
  ("config", "topology", "sizes"),
  [("mooer_7b.py", "v5e:2x2", (1, 1, 4)), ("salmonn.py:13b,2", "v5e:2x4", (2, 1, 4))],
)
def test_generation_of_the_large_models_fits_a_few_chips(aot, tmp_path, config, topology, sizes):
  out = tmp_path / "aot.json"
  mesh = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes)]
  options = ["--config.eval.batch_size=16", "--num_beams=4", f"--json={out}", *mesh]
  process = aot(
    "--program=decode", f"--config=configs/{config}", f"--topology={topology}", *options
  )
  result = result_of(process, out)
  assert (result["batch"]["rows"], result["batch"]["num_beams"]) == (16, 4)
  assert result["hbm_gb_per_chip"] < 14  # of 16 GiB, as above
  windows = {"window_attention_forward"} if "salmonn" in config else set()
  assert result["kernels"].keys() == {"flash_attention_forward", "decode_attention"} | windows
