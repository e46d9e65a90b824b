"""Weights as decoding reads them fastest; made once, when a model is loaded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mooer_jax import tree
from mooer_jax.config import SpeechLLMConfig


def merge_lora(
  params: dict, config: SpeechLLMConfig, lora_scale: float | None = None
) -> tuple[dict, SpeechLLMConfig]:
  """Adds the LoRA at a fixed scale to the kernels of the LLM: (params, config without LoRA).

  The sum is computed in float32 and rounded once to the dtype of the kernel.

  Args:
    params: per-layer parameters; those of the LLM are consumed leaf by leaf, to save memory.
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
    leaves[f"{path}/kernel"] = _merged(kernel, a, b, scale)
  decoder = dataclasses.replace(decoder, lora_rank=0)
  return tree.unflatten(leaves), dataclasses.replace(config, decoder=decoder)


@functools.partial(jax.jit, donate_argnums=0)
def _merged(kernel, a, b, scale):
  highest = jax.lax.Precision.HIGHEST
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return (kernel + scale * jnp.matmul(a, b, precision=highest)).astype(kernel.dtype)


def quantize(params: dict) -> dict:
  """Rounds the kernels of the LLM to int8, with a float32 scale for each output.

  The largest magnitude of a column becomes 127. Biases, norms, embeddings and a LoRA that was not
  merged stay as they are.

  Args:
    params: per-layer parameters; the kernels are consumed leaf by leaf, to save memory.
  """
  leaves = tree.flatten(params["decoder"])
  for path in [path for path in leaves if path.endswith("/kernel")]:
    leaves[f"{path}_int8"], leaves[f"{path}_scale"] = _quantized(leaves.pop(path))
  return {**params, "decoder": tree.unflatten(leaves)}


@jax.jit
def _quantized(kernel_IO):
  kernel_IO = kernel_IO.astype(jnp.float32)
  scale_O = jnp.abs(kernel_IO).max(axis=0) / 127
  return jnp.round(kernel_IO / jnp.where(scale_O == 0, 1, scale_O)).astype(jnp.int8), scale_O


def lay_out(params: dict, config: SpeechLLMConfig) -> dict:
  """The same parameters in the layout that decodes fastest on the backend of JAX.

  Layers of encoders are stacked: a scan over them compiles much faster than a list of 50. On CPUs,
  the kernels [in, out] of the LLM become weights [out, in] (see `nn.layers.Dense`), and tied
  embeddings are its head without a copy.

  Args:
    params: per-layer parameters; those of the LLM are consumed leaf by leaf, to save memory.
    config: the model.
  """
  params = {**params, "encoders": tree.stack_layers(params["encoders"])}
  if jax.default_backend() != "cpu":
    return params
  leaves = tree.flatten(params["decoder"])
  for path in [path for path in leaves if path.endswith("/kernel")]:
    leaves[path.removesuffix("kernel") + "weight"] = _transposed(leaves.pop(path))
  if config.decoder.tie_word_embeddings:
    leaves["head/weight"] = leaves["embed/embedding"]
  return {**params, "decoder": tree.unflatten(leaves)}


_transposed = jax.jit(jnp.transpose)
