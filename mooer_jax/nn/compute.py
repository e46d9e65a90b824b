"""Execution of a model: dtypes, scanned layers, rematerialization, attention, place of features."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mooer_jax.kernels.choice import IMPLEMENTATIONS

# Pattern of the paths of layers from `repeat_layer`.
LAYER = r"layers(_\d+)?"
Remat = Literal["none", "dots", "full"]
Features = Literal["host", "device"]
_POLICIES = {
  "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
  "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
  """Execution options; they belong to a run and are not saved in checkpoints.

  Attributes:
    dtype: of activations and matmuls, "float32" or "bfloat16" (Qwen2's overflow float16).
    scan: scan over stacked layers (training) instead of per-layer params (decoding).
    remat: recomputed in the backward pass: "none", "dots" (all but matmul outputs and the logits of
      long answers) or "full".
    attention: implementation of `kernels.attention` and its siblings: "auto" (what is fastest, see
      `kernels.choice`), "xla", "cudnn" (GPU, bfloat16), "splash" (TPU, bfloat16; training only),
      "mosaic" (TPU) or "triton" (NVIDIA GPU).
    quantization: "int8": the LLM's matrices are rounded to 8 bits when a model is loaded for
      decoding, with a scale for each output. On CPUs, their inputs are rounded to 16 bits.
    features: where features are computed: "host" (NumPy, by the data workers or a thread) or
      "device" (the compiled program, whose batches then hold waveforms).
    platform: "cpu", "gpu" or "tpu", if a program is compiled for another backend than that of JAX.
  """

  dtype: str = "float32"
  scan: bool = False
  remat: Remat = "none"
  attention: str = "auto"
  quantization: Literal["none", "int8"] = "none"
  features: Features = "host"
  platform: str | None = None

  def __post_init__(self):
    if self.dtype not in ("float32", "bfloat16"):
      reason = " (float16 overflows in Qwen2's activations)" if self.dtype == "float16" else ""
      raise ValueError(f"dtype={self.dtype!r}: use 'float32' or 'bfloat16'{reason}")
    if self.remat not in ("none", *_POLICIES):
      raise ValueError(f"remat={self.remat!r}: use 'none', 'dots' or 'full'")
    if self.quantization not in ("none", "int8"):
      raise ValueError(f"quantization={self.quantization!r}: use 'none' or 'int8'")
    if self.attention not in ("auto", *IMPLEMENTATIONS):
      raise ValueError(f"attention={self.attention!r}: choose one of {['auto', *IMPLEMENTATIONS]}")
    if self.platform not in (None, "cpu", "gpu", "tpu"):
      raise ValueError(f"platform={self.platform!r}: use 'cpu', 'gpu', 'tpu' or None")
    if self.features not in ("host", "device"):
      raise ValueError(f"features={self.features!r}: use 'host' or 'device'")

  @property
  def jnp_dtype(self) -> Any:
    return jnp.dtype(self.dtype)

  @property
  def attention_options(self) -> dict[str, Any]:
    """Arguments of `kernels.attention` and its siblings."""
    return {"implementation": self.attention, "platform": self.platform}


def repeat_layer(layer: type[nn.Module], count: int, compute: ExecutionConfig) -> Any:
  """A factory for `count` layers: one scanned module, or a list of modules.

  The layer's `__call__(x, context, cache)` returns `(x, cache)`; `context` is the same for all.
  """
  if compute.remat != "none":
    layer = nn.remat(layer, policy=_POLICIES[compute.remat], prevent_cse=not compute.scan)
  if not compute.scan:
    return lambda *args: [layer(*args) for _ in range(count)]
  return nn.scan(
    layer,
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(nn.broadcast, nn.broadcast),
    length=count,
  )


def run_layers(layers: Any, x: jax.Array, context: Any, *, caches: tuple | None = None):
  """Apply layers from `repeat_layer`: (x, new caches). Caches need a list of modules."""
  if not isinstance(layers, (list, tuple)):
    if caches is not None:
      raise ValueError("a KV cache needs per-layer params: set compute.scan=False, unstack_layers")
    x, _ = layers(x, context, None)
    return x, None
  if caches is None:
    for layer in layers:
      x, _ = layer(x, context, None)
    return x, None
  new = []
  for layer, cache in zip(layers, caches, strict=True):
    x, cache = _run_layer(layer.clone(parent=None, name=None), layer.variables, x, context, cache)
    new.append(cache)
  return x, tuple(new)


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(layer: nn.Module, variables: Any, x: jax.Array, context: Any, cache: tuple):
  """A layer apart from its parent, so that equal layers are traced and lowered once."""
  return layer.apply(variables, x, context, cache)
