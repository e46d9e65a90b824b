"""Weights as decoding reads them fastest; made once, when a model is loaded.

To save memory, each function deletes the leaves that it replaces, one after the other, whoever else
refers to them. It takes per-layer parameters in JAX arrays.
"""

import ctypes
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp

from mooer_jax import tree
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.speech_llm import param_shapes


def merge_lora(
  params: dict, config: SpeechLLMConfig, lora_scale: float | None = None
) -> tuple[dict, SpeechLLMConfig]:
  """Adds the LoRA at a fixed scale to the kernels of the LLM: (params, config without LoRA).

  The sum is computed in float32 and rounded once to the dtype of the kernel.

  Args:
    params: per-layer parameters.
    config: the model.
    lora_scale: default: the scale of training.

  Raises:
    ValueError: for a lora_scale if the model has no LoRA.
  """
  decoder = config.decoder
  if not decoder.lora_rank:
    if lora_scale is not None:
      raise ValueError(f"lora_scale={lora_scale:g} has no effect: the model has no LoRA")
    return params, config
  scale = decoder.lora_scale if lora_scale is None else lora_scale
  leaves = tree.flatten(params)
  for path in [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]:
    kernel, a, b = (leaves.pop(f"{path}/{name}") for name in ("kernel", "lora_a", "lora_b"))
    sharding = kernel.sharding
    merged = _replaced(functools.partial(merged_kernel, scale=scale), kernel, a, b)
    leaves[f"{path}/kernel"] = jax.device_put(merged, sharding)
  decoder = dataclasses.replace(decoder, lora_rank=0)
  return tree.unflatten(leaves), dataclasses.replace(config, decoder=decoder)


@jax.jit
def merged_kernel(kernel, a, b, scale) -> jax.Array:
  """kernel + scale * a @ b, computed in float32, in the dtype of the kernel."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  added = scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  return (kernel + added).astype(kernel.dtype)


def quantize(params: dict) -> dict:
  """Rounds the kernels of the LLM to int8, with a float32 scale for each output.

  The largest magnitude of a column becomes 127. Biases, norms, embeddings and a LoRA that was not
  merged stay as they are.
  """
  leaves = tree.flatten(params["decoder"])
  for path in [path for path in leaves if path.endswith("/kernel")]:
    leaves[f"{path}_int8"], leaves[f"{path}_scale"] = _replaced(quantized_kernel, leaves.pop(path))
  return {**params, "decoder": tree.unflatten(leaves)}


def is_quantized(params: dict) -> bool:
  """Whether the kernels of the LLM are int8."""
  return any(path.endswith("/kernel_int8") for path in tree.flatten(params))


def quantized_shapes(shapes: dict) -> dict:
  """`ShapeDtypeStruct`s of a model after `quantize`, from those before."""
  leaves = tree.flatten(shapes["decoder"])
  for path in [path for path in leaves if path.endswith("/kernel")]:
    rounded, scale = jax.eval_shape(quantized_kernel, leaves.pop(path))
    leaves[f"{path}_int8"], leaves[f"{path}_scale"] = rounded, scale
  return {**shapes, "decoder": tree.unflatten(leaves)}


def saved_shapes(params: dict, config: SpeechLLMConfig) -> dict:
  """`ShapeDtypeStruct`s that the params of a checkpoint of a model must have."""
  shapes = param_shapes(config)
  return quantized_shapes(shapes) if is_quantized(params) else shapes


@jax.jit
def quantized_kernel(kernel_IO):
  """A kernel as int8 [in, out] and its scale, float32 [out]; the largest of a column is 127."""
  kernel_IO = kernel_IO.astype(jnp.float32)
  scale_O = jnp.abs(kernel_IO).max(axis=0) / 127
  return jnp.round(kernel_IO / jnp.where(scale_O == 0, 1, scale_O)).astype(jnp.int8), scale_O


def lay_out(params: dict, config: SpeechLLMConfig) -> dict:
  """The same parameters in the layout that decodes fastest on the backend of JAX.

  Layers of encoders are stacked: a scan over them compiles much faster than a list of 50. On CPUs,
  the kernels [in, out] of the LLM, int8 too, become weights [out, in] (see `nn.layers.Dense`), and
  tied embeddings are its head without a copy.
  """
  stacked = _replaced(tree.stack_layers, params["encoders"])
  params = {**params, "encoders": stacked}
  if jax.default_backend() != "cpu":
    return params
  leaves = tree.flatten(params["decoder"])
  for path in [path for path in leaves if path.endswith(("/kernel", "/kernel_int8"))]:
    weight = _replaced(jnp.transpose, leaves.pop(path))
    leaves["/weight".join(path.rsplit("/kernel", 1))] = weight
  if config.decoder.tie_word_embeddings:
    leaves["head/weight"] = leaves["embed/embedding"]
  return {**params, "decoder": tree.unflatten(leaves)}


def _replaced(function, *arguments):
  """The result of a function; leaves of the arguments that are not in it are deleted."""
  global _freed
  result = jax.block_until_ready(function(*arguments))
  kept = {id(leaf) for leaf in jax.tree.leaves(result)}
  for leaf in jax.tree.leaves(arguments):
    if id(leaf) not in kept:
      _freed += leaf.nbytes
      leaf.delete()
  if _malloc_trim is not None and _freed >= _TRIM_BYTES:
    _freed = 0
    _malloc_trim(0)
  return result


# glibc keeps freed memory for the thread that allocated it: 2.6 of 5.6 GB after a MooER of 0.7 B.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
_TRIM_BYTES = 2**28  # after each leaf, the next one would get new pages: 0.4 s for that MooER
_freed = 0  # since memory was returned
