"""Qwen2-7B with random bfloat16 weights in JAX: forward, LoRA train step, greedy decoding."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.llm_sizes import DRY, FULL, LR, Sizes, median_seconds
from mooer_jax import speech_llm, tree
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.decoders.llm import LLM, KVCache
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.training.step import create, make_train_step

GB = 1e9


def run(dry_run: bool) -> dict[str, Any]:
  sizes = DRY if dry_run else FULL
  config = SpeechLLMConfig(
    decoder=sizes.llm, compute=ExecutionConfig(dtype="bfloat16", scan=True, remat="full")
  )
  params = random_params(config)
  inputs_BSD = random_normal(1, (sizes.rows, sizes.tokens, sizes.llm.hidden_size))
  result = {
    "device": jax.devices()[0].device_kind,
    "forward": forward(params, inputs_BSD, config, sizes),
    "train_step": train_step(params, inputs_BSD, config, sizes),
  }
  params = tree.unstack_layers(params)
  result["decode"] = decode(params, config.with_compute(scan=False, remat="none"), sizes)
  return result


@functools.partial(jax.jit, static_argnames=("shape", "scale", "dtype"))
def random_normal(seed, shape, scale=1.0, dtype=jnp.bfloat16):
  return scale * jax.random.normal(jax.random.key(seed), shape, dtype)


def random_params(config: SpeechLLMConfig) -> dict:
  """The decoder's params on the device, made in bfloat16 leaf by leaf; LoRA in float32."""
  module = speech_llm.decoder_module(config)
  D = config.decoder.hidden_size
  shapes = jax.eval_shape(
    lambda: module.init(
      jax.random.key(0), jnp.zeros((1, 1, D)), jnp.ones((1, 1), bool), method=LLM.everything
    )["params"]
  )
  flat = {}
  for seed, (path, leaf) in enumerate(tree.flatten({"decoder": shapes}).items()):
    dtype = jnp.float32 if "lora" in path else jnp.bfloat16
    if path.endswith("scale"):
      flat[path] = jnp.ones(leaf.shape, dtype)
    else:
      flat[path] = random_normal(seed, leaf.shape, 0.02, dtype)
  return tree.unflatten(flat)


def answer_nats(params, inputs_BSD, targets_BA, config):
  """Summed cross-entropy of the last A positions."""
  valid_BS = jnp.ones(inputs_BSD.shape[:2], bool)
  hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, valid_BS, config)
  logits_BAV = speech_llm.logits(params, hidden_BSD[:, -targets_BA.shape[1] :], config)
  return optax.softmax_cross_entropy_with_integer_labels(logits_BAV, targets_BA).sum()


def targets(sizes: Sizes):
  key = jax.random.key(2)
  return jax.random.randint(key, (sizes.rows, sizes.answer), 0, sizes.llm.vocab_size)


def compiled(function, *args, **options):
  """(executable, seconds to trace and compile it, GB that it needs while it runs)."""
  start = time.perf_counter()
  program = jax.jit(function, **options).lower(*args).compile()
  seconds = time.perf_counter() - start
  stats = program.memory_analysis()
  alive = (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
  )
  return program, round(seconds, 2), alive / GB


def forward(params, inputs_BSD, config, sizes: Sizes) -> dict[str, Any]:
  def logits(params, inputs_BSD):
    valid_BS = jnp.ones(inputs_BSD.shape[:2], bool)
    hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, valid_BS, config)
    return speech_llm.logits(params, hidden_BSD[:, -sizes.answer :], config)

  program, compile_seconds, memory = compiled(logits, params, inputs_BSD)
  finite = bool(jnp.isfinite(program(params, inputs_BSD)).all())
  if not finite:
    raise FloatingPointError("forward: logits are not finite")
  seconds = median_seconds(lambda: program(params, inputs_BSD).block_until_ready(), sizes.repeats)
  return {"seconds": seconds, "memory_gb": memory, "compile_seconds": compile_seconds}


def train_step(params, inputs_BSD, config, sizes: Sizes) -> dict[str, Any]:
  trainable, frozen = tree.partition(params, (".*/lora_[ab]",))
  tx = optax.adam(LR)

  def loss_fn(trainable, frozen, batch, key):
    nats = answer_nats(tree.merge(trainable, frozen), *batch, config)
    tokens = jnp.int32(sizes.rows * sizes.answer)
    return nats / tokens, {"loss_sum": nats, "tokens": tokens, "correct": jnp.int32(0)}

  step = make_train_step(loss_fn, tx, schedule=optax.constant_schedule(LR))
  # The state is given up at each call, and `params` is needed again.
  state = create(jax.tree.map(jnp.copy, trainable), tx, jax.random.key(0))
  batch = (inputs_BSD, targets(sizes))
  program, compile_seconds, memory = compiled(step, state, frozen, batch, donate_argnums=0)
  losses = []

  def call():
    nonlocal state
    state, metrics = program(state, frozen, batch)
    losses.append(float(metrics["loss"]))

  seconds = median_seconds(call, sizes.repeats)
  if not losses[-1] < losses[0]:
    raise FloatingPointError(f"the loss on one batch did not fall: {losses}")
  return {
    "seconds": seconds,
    "memory_gb": memory,
    "compile_seconds": compile_seconds,
    "losses": losses,
  }


def decode(params, config, sizes: Sizes) -> dict[str, Any]:
  """Prefill and a while loop over greedy steps, as `generation.generate` does after the encoder."""
  llm = config.decoder
  prompt_BSD = random_normal(3, (sizes.rows, sizes.prompt, llm.hidden_size))

  def greedy(params, prompt_BSD):
    cache = KVCache.create(
      layers=llm.layers,
      batch=sizes.rows,
      slots=sizes.prompt + sizes.new,
      kv_heads=llm.kv_heads,
      channels=llm.head_dim,
      dtype=jnp.bfloat16,
    )

    def advance(inputs_BSD, tokens_BS, step, cache):
      valid_BS = jnp.ones(inputs_BSD.shape[:2], bool)
      hidden_BSD, cache = speech_llm.decode(params, inputs_BSD, valid_BS, config, cache=cache)
      token_B1 = speech_llm.logits(params, hidden_BSD[:, -1:], config).argmax(-1)
      tokens_BS = jax.lax.dynamic_update_slice_in_dim(tokens_BS, token_B1, step, axis=1)
      return token_B1, tokens_BS, step + 1, cache

    def body(carry):
      token_B1, tokens_BS, step, cache = carry
      return advance(speech_llm.embed(params, token_B1, config), tokens_BS, step, cache)

    empty_BS = jnp.zeros((sizes.rows, sizes.new), jnp.int32)
    first = advance(prompt_BSD, empty_BS, jnp.zeros((), jnp.int32), cache)
    return jax.lax.while_loop(lambda carry: carry[2] < sizes.new, body, first)[1]

  program, compile_seconds, memory = compiled(greedy, params, prompt_BSD)
  seconds = median_seconds(lambda: program(params, prompt_BSD).block_until_ready(), sizes.repeats)
  return {
    "seconds": seconds,
    "memory_gb": memory,
    "compile_seconds": compile_seconds,
    "tokens_per_second": sizes.rows * sizes.new / seconds,
  }
