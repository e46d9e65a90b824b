"""A small MooER learns on this device: synthetic features, the real train step, the loss falls."""

import time
from typing import Any

import jax
import numpy as np

from mooer_jax import speech_llm, tree
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.sharding import batch_sharding, make_mesh
from mooer_jax.speech_llm import Batch
from mooer_jax.training.optimizer import OptimizerConfig, make_optimizer
from mooer_jax.training.program import abstract_state, jitted_step
from mooer_jax.training.step import create

TRAINED = ("encoders/.*", "connector/.*", "decoder/.*")
WORDS, LENGTH, FRAMES = 10, 4, 6  # every clip: LENGTH of WORDS, FRAMES steps each
EOS = WORDS


def model_config(dry_run: bool) -> SpeechLLMConfig:
  """The sizes of configs/tiny.py, or smaller."""
  width, encoder_layers, llm_layers = (32, 2, 1) if dry_run else (128, 6, 3)
  sizes = dict(hidden_size=width, heads=4)
  llm = dict(kv_heads=2, head_dim=width // 4, intermediate_size=3 * width)
  return SpeechLLMConfig(
    encoders=(SANMConfig(**sizes, layers=encoder_layers, intermediate_size=4 * width),),
    connector=LinearConfig(hidden_size=2 * width),
    decoder=LLMConfig(**sizes, **llm, layers=llm_layers, vocab_size=16, tie_word_embeddings=True),
    compute=ExecutionConfig(dtype="float32", scan=True),
  )


def batch(rng: np.random.Generator, prototypes_WF: np.ndarray, rows: int) -> Batch:
  """Clips in which every word is its own vector, held for some steps, with noise."""
  words_BL = rng.integers(0, WORDS, (rows, LENGTH))
  features = np.repeat(prototypes_WF[words_BL], FRAMES, axis=1)
  features = features + rng.normal(size=features.shape)
  return Batch(
    features=(features.astype(np.float32),),
    frames=(np.full(rows, LENGTH * FRAMES, np.int32),),
    prefix_BS=np.zeros((rows, 0), np.int32),
    suffix_BS=np.full((rows, 1), EOS + 1, np.int32),
    labels_BS=np.pad(words_BL, ((0, 0), (0, 1)), constant_values=EOS).astype(np.int32),
  )


def run(dry_run: bool) -> dict[str, Any]:
  model = model_config(dry_run)
  rows, steps = (16, 60) if dry_run else (64, 300)
  optimizer = OptimizerConfig(
    peak_lr=2e-3, warmup="linear", warmup_steps=10, decay="constant", max_grad_norm=1.0
  )
  mesh = make_mesh(data=1, devices=jax.devices()[:1])
  _, shardings = abstract_state(model, optimizer, trainable=TRAINED, mesh=mesh)
  params = jax.jit(lambda: speech_llm.init(jax.random.key(0), model))()
  trainable, frozen = tree.partition(params, TRAINED)
  state = create(trainable, make_optimizer(optimizer), jax.random.key(1))
  step = jitted_step(model, optimizer, trainable=TRAINED, accumulation=1, mesh=mesh)
  state, frozen = jax.device_put((state, frozen), shardings)
  rng = np.random.default_rng(0)
  prototypes_WF = rng.normal(size=(WORDS, model.encoders[0].input_width))

  kept, start = [], 0.0
  for _ in range(steps):
    inputs = jax.device_put(batch(rng, prototypes_WF, rows), batch_sharding(mesh))
    state, metrics = step(state, frozen, inputs)
    if not kept:
      jax.block_until_ready(metrics)
      start = time.perf_counter()  # the first step compiles
    kept.append(metrics)
  losses, accuracies = ([float(m[name]) for m in kept] for name in ("loss", "accuracy"))
  seconds = time.perf_counter() - start
  first, last = np.mean(losses[:5]), np.mean(losses[-5:])
  return {
    "device": jax.devices()[0].device_kind,
    "steps": steps,
    "steps_per_second": (steps - 1) / seconds,
    "first_loss": float(first),
    "last_loss": float(last),
    "last_accuracy": float(np.mean(accuracies[-5:])),
    "passed": bool(np.isfinite(losses).all() and last < 0.5 * first),
  }
