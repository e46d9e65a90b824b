"""Correctness of the model parts on this device, against float64 NumPy and the CPU."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.llm_sizes import SMALL_LLM
from benchmarks.provenance import ROOT
from mooer_jax import kernels, tree
from mooer_jax.connectors.qformer import QFormerConfig, WindowedQFormer
from mooer_jax.decoders.llm import LLM, LLMConfig
from mooer_jax.encoders.beats import BEATsConfig, BEATsEncoder
from mooer_jax.encoders.sanm import SANMConfig, SANMEncoder
from mooer_jax.encoders.whisper import WhisperConfig, WhisperEncoder
from mooer_jax.kernels.attention import Bias
from mooer_jax.nn.compute import ExecutionConfig

# Rounding of one result: float32 sums of some hundred terms, the 8 bits of bfloat16.
ATTENTION_TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
# Sums in another order; 4 layers in float32, in standard deviations of the output.
TOLERANCE = 1e-4


def run(dry_run: bool) -> dict[str, Any]:
  checks = [*attention_checks(dry_run), *device_checks(dry_run), cache_check(dry_run)]
  tests = {"kernel_tests": "not run"} if dry_run else kernel_tests()
  return {
    "device": jax.devices()[0].device_kind,
    "checks": checks,
    **tests,
    "passed": all(check["passed"] for check in checks) and not tests.get("failed"),
  }


def kernel_tests() -> dict[str, Any]:
  """tests/kernels with the kernels compiled for this device; needs pytest and pytest-timeout."""
  if not all(importlib.util.find_spec(name) for name in ("pytest", "pytest_timeout")):
    return {"kernel_tests": "not run: pip install pytest pytest-timeout"}
  command = [sys.executable, "-m", "pytest", "-q", "-m", "not nightly", "tests/kernels"]
  env = {**os.environ, "JAX_PLATFORMS": "cuda,cpu"}
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=90)
  lines = done.stdout.strip().splitlines()
  failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
  return {"kernel_tests": lines[-1] if lines else done.stderr[-300:], "failed": failures}


def check(name: str, error: float, tolerance: float) -> dict[str, Any]:
  error = float(error)
  return {"name": name, "error": error, "tolerance": tolerance, "passed": error <= tolerance}


def attention_checks(dry_run: bool):
  rows, tokens, channels = (2, 24, 16) if dry_run else (2, 300, 128)
  implementations = [("xla", "float32"), ("xla", "bfloat16")]
  if jax.default_backend() == "gpu":
    implementations += [("cudnn", "bfloat16"), ("triton", "bfloat16"), ("triton", "float32")]
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(rows, tokens, heads, channels)) for heads in (8, 2, 2))
  valid_BS = np.arange(tokens) < np.array([[tokens], [tokens - 7]])
  valid_BS[1, :3] = False  # padding on both sides; with causal=True some queries attend to nothing
  gate_BTH, table_HR = rng.normal(size=(rows, tokens, 8)), rng.normal(size=(8, 2 * tokens - 1))
  by_distance = Bias(jnp.asarray(gate_BTH, jnp.float32), jnp.asarray(table_HR, jnp.float32))
  for kind in ("", " causal", " with a bias"):
    causal, bias = kind == " causal", by_distance if kind == " with a bias" else None
    for implementation, dtype in implementations:
      if bias is not None and implementation == "cudnn":
        continue  # does not support a bias
      rounded = [jnp.asarray(x, dtype) for x in (q, k, v)]
      exact = [np.asarray(x, np.float64) for x in rounded]
      exact_bias = bias and np.asarray(bias.expand(), np.float64)
      expected = reference(*exact, valid_BS, causal, exact_bias)
      attention = functools.partial(kernels.attention, causal=causal, implementation=implementation)
      got = jax.jit(attention)(*rounded, valid_BS=valid_BS, bias=bias)
      error = np.abs(np.asarray(got, np.float64) - expected).max()
      yield check(f"attention {implementation} {dtype}{kind}", error, ATTENTION_TOLERANCE[dtype])


def reference(q_BTHC, k_BSKC, v_BSKC, valid_BS, causal, bias_BHTS=None):
  """Attention in float64; queries that attend to nothing return zeros."""
  shared = q_BTHC.shape[2] // k_BSKC.shape[2]
  k_BSHC, v_BSHC = (np.repeat(x, shared, axis=2) for x in (k_BSKC, v_BSKC))
  scores_BHTS = np.einsum("BTHC,BSHC->BHTS", q_BTHC, k_BSHC) * q_BTHC.shape[-1] ** -0.5
  scores_BHTS = scores_BHTS if bias_BHTS is None else scores_BHTS + bias_BHTS
  mask_BHTS = np.broadcast_to(valid_BS[:, None, None], scores_BHTS.shape)
  if causal:
    mask_BHTS = mask_BHTS & np.tri(q_BTHC.shape[1], dtype=bool)
  weights_BHTS = np.where(mask_BHTS, np.exp(scores_BHTS - scores_BHTS.max(-1, keepdims=True)), 0)
  total = weights_BHTS.sum(-1, keepdims=True)
  weights_BHTS = weights_BHTS / np.where(total, total, 1)
  return np.einsum("BHTS,BSHC->BTHC", weights_BHTS, v_BSHC)


def random_params(shapes) -> dict:
  """NumPy params of a useful scale: He's for matrices, near 1 for the scales of norms."""
  rng = np.random.default_rng(0)
  flat = {}
  for path, leaf in tree.flatten(shapes).items():
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    if path.rsplit("/", 1)[-1] in ("kernel", "lora_a", "lora_b"):
      flat[path] = noise * leaf.shape[-2] ** -0.5
    else:
      flat[path] = noise if "embedding" in path else 0.1 * noise + path.endswith("scale")
  return tree.unflatten(flat)


def small_llm(dry_run: bool) -> LLM:
  """Real widths of Qwen2-1.5B, four layers and a short vocabulary."""
  qwen2 = LLMConfig.SIZES["qwen2_1.5b"]
  config = dataclasses.replace(qwen2, vocab_size=4096, layers=4, lora_rank=64)
  return LLM(SMALL_LLM if dry_run else config, ExecutionConfig(dtype="float32"))


def encoders_and_qformer(dry_run: bool) -> list[tuple[str, Any, int, int]]:
  """(name, module with few layers, width and length of its input)."""
  if dry_run:
    sizes = dict(layers=1, hidden_size=32, heads=2, intermediate_size=48)
    whisper = WhisperConfig(**sizes, positions=16, context=16)
    beats = BEATsConfig(**sizes, patch_width=24, conv_pos=6, conv_pos_groups=2)
    return [
      ("SAN-M", SANMEncoder(SANMConfig(layers=2, hidden_size=64)), 560, 12),
      ("Whisper", WhisperEncoder(whisper), 80, 24),
      ("BEATs", BEATsEncoder(beats), 128, 48),
      ("Q-Former", WindowedQFormer(QFormerConfig(**sizes), 16), 48, 40),
    ]
  large = dataclasses.replace(
    WhisperConfig.SIZES["whisper_large"], layers=4, positions=300, context=300
  )
  return [
    ("SAN-M", SANMEncoder(SANMConfig(layers=4)), 560, 64),
    ("Whisper", WhisperEncoder(large), 80, 500),
    ("BEATs", BEATsEncoder(BEATsConfig(layers=4)), 128, 320),
    ("Q-Former", WindowedQFormer(QFormerConfig(), 4096), 2048, 300),
  ]


def case(module, steps: int, width: int, *, left: int = 0, right: int = 0):
  """(jitted apply, params, inputs [2, S, D], valid [2, S]); the second row is padded."""
  x_BSD = np.random.default_rng(1).normal(size=(2, steps, width)).astype(np.float32)
  valid_BS = np.ones((2, steps), bool)
  valid_BS[1, :left] = valid_BS[1, steps - right :] = False
  shapes = jax.eval_shape(module.init, jax.random.key(0), x_BSD, valid_BS)
  apply = jax.jit(lambda params, *args: module.apply({"params": params}, *args))
  return apply, random_params(shapes["params"]), x_BSD, valid_BS


def device_checks(dry_run: bool):
  """Encoders, Q-Former and LLM on this device against the CPU."""
  llm, tokens = small_llm(dry_run), 12 if dry_run else 64
  modules = [*encoders_and_qformer(dry_run), ("LLM with LoRA", llm, llm.config.hidden_size, tokens)]
  for name, module, width, steps in modules:
    left, right = (steps // 4, 0) if module is llm else (0, 5)
    apply, params, x_BSD, given_BS = case(module, steps, width, left=left, right=right)
    (here, valid_BS), (there, _) = (
      apply(*jax.device_put((params, x_BSD, given_BS), device))
      for device in (jax.devices()[0], jax.devices("cpu")[0])
    )
    valid_BS = np.asarray(given_BS if valid_BS is None else valid_BS)  # the LLM returns no mask
    here, there = np.asarray(here)[valid_BS], np.asarray(there)[valid_BS]
    error = np.abs(here - there).max() / there.std()
    yield check(f"{name}, {jax.default_backend()} against cpu, float32", error, TOLERANCE)


def cache_check(dry_run: bool):
  """A prompt and single steps with the cache against one forward pass."""
  llm, tokens = small_llm(dry_run), 12 if dry_run else 48
  apply, params, x_BSD, valid_BS = case(llm, tokens, llm.config.hidden_size, left=tokens // 4)
  full_BSD, _ = apply(params, x_BSD, valid_BS)
  cache = llm.config.empty_cache(rows=2, slots=tokens, dtype=jnp.float32)
  parts, start = [], 0
  for end in range(tokens // 2, tokens + 1):
    hidden_BSD, cache = apply(params, x_BSD[:, start:end], valid_BS[:, start:end], cache)
    parts.append(hidden_BSD)
    start = end
  difference = np.abs(np.concatenate(parts, axis=1) - np.asarray(full_BSD))[valid_BS]
  error = difference.max() / np.asarray(full_BSD)[valid_BS].std()
  return check("cached decoding against one pass, float32", error, TOLERANCE)
