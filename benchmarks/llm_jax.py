"""Qwen2-7B with random bfloat16 weights in JAX: forward, LoRA train step, greedy decoding."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.llm_sizes import DRY, FULL, GB, LR, Sizes, median_seconds, with_falling_losses
from mooer_jax import speech_llm, tree
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation import GenerationConfig, generate_from
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.training.step import create, make_train_step


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
  shapes = jax.eval_shape(lambda: speech_llm.init(jax.random.key(0), config)["decoder"])
  flat = {}
  for seed, (path, leaf) in enumerate(tree.flatten({"decoder": shapes}).items()):
    dtype = jnp.float32 if "lora" in path else jnp.bfloat16
    if path.endswith("scale"):
      flat[path] = jnp.ones(leaf.shape, dtype)
    else:
      flat[path] = random_normal(seed, leaf.shape, 0.02, dtype)
  return tree.unflatten(flat)


def answer_logits(params, inputs_BSD, config, answer: int):
  """Logits at the last `answer` positions, [B, A, V]."""
  valid_BS = jnp.ones(inputs_BSD.shape[:2], bool)
  hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, valid_BS, config)
  return speech_llm.logits(params, hidden_BSD[:, -answer:], config)


def measured(function, arguments, sizes: Sizes, call=None, **options) -> tuple[Any, dict[str, Any]]:
  """Compile a function with options of `jax.jit`, and time `call(executable)`.

  Returns:
    (executable, {"seconds": median, "memory_gb": what is in use at once, "compile_seconds"}).
  """
  start = time.perf_counter()
  program = jax.jit(function, **options).lower(*arguments).compile()
  compile_seconds = round(time.perf_counter() - start, 2)
  stats = program.memory_analysis()
  alive = (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
  )
  call = call or (lambda program: jax.block_until_ready(program(*arguments)))
  seconds = median_seconds(lambda: call(program), sizes.repeats)
  result = {"seconds": seconds, "memory_gb": alive / GB, "compile_seconds": compile_seconds}
  return program, result


def forward(params, inputs_BSD, config, sizes: Sizes) -> dict[str, Any]:
  logits = functools.partial(answer_logits, config=config, answer=sizes.answer)
  program, result = measured(logits, (params, inputs_BSD), sizes)
  if not jnp.isfinite(program(params, inputs_BSD)).all():
    raise FloatingPointError("forward: logits are not finite")
  return result


def train_step(params, inputs_BSD, config, sizes: Sizes) -> dict[str, Any]:
  trainable, frozen = tree.partition(params, (".*/lora_[ab]",))
  tx = optax.adam(LR)

  def loss_fn(trainable, frozen, batch, key):
    inputs_BSD, target_BA = batch
    logits_BAV = answer_logits(tree.merge(trainable, frozen), inputs_BSD, config, sizes.answer)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits_BAV, target_BA).sum()
    tokens = jnp.int32(target_BA.size)
    return nats / tokens, {"loss_sum": nats, "tokens": tokens, "correct": jnp.int32(0)}

  step = make_train_step(loss_fn, tx, schedule=optax.constant_schedule(LR))
  # The state is donated at each call, and `params` is used again.
  state = create(jax.tree.map(jnp.copy, trainable), tx, jax.random.key(0))
  key, shape = jax.random.key(2), (sizes.rows, sizes.answer)
  batch = (inputs_BSD, jax.random.randint(key, shape, 0, sizes.llm.vocab_size))
  losses = []

  def call(program):
    nonlocal state
    state, metrics = program(state, frozen, batch)
    losses.append(float(metrics["loss"]))

  _, result = measured(step, (state, frozen, batch), sizes, call, donate_argnums=0)
  return with_falling_losses(result, losses)


def decode(params, config, sizes: Sizes) -> dict[str, Any]:
  """Greedy decoding of `sizes.new` tokens after a prompt of embeddings."""
  prompt_BSD = random_normal(3, (sizes.rows, sizes.prompt, config.decoder.hidden_size))
  options = GenerationConfig(max_new_tokens=sizes.new)  # without EOS

  def greedy(params, prompt_BSD):
    valid_BS = jnp.ones(prompt_BSD.shape[:2], bool)
    return generate_from(params, prompt_BSD, valid_BS, config, options).tokens_BS

  _, result = measured(greedy, (params, prompt_BSD), sizes)
  return sizes.with_token_rate(result)
