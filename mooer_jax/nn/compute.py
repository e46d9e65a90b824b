"""How a model is run, as opposed to what it is: nothing here changes a parameter."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mooer_jax.kernels.attention import IMPLEMENTATIONS

Remat = Literal["none", "dots", "full"]
_POLICIES = {
  "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
  "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
  """Execution choices; they travel with the run, never with the checkpoint.

  Attributes:
    dtype: "float32" or "bfloat16" for activations and matmuls. float16 is refused: Qwen2's
      activations overflow it.
    scan: True takes params with stacked layers (training); False takes per-layer params (decoding).
    remat: what the backward pass recomputes: "none", "dots" (all but matmul outputs), "full".
    attention: a name that `kernels.attention` knows.
  """

  dtype: str = "float32"
  scan: bool = False
  remat: Remat = "none"
  attention: str = "auto"

  def __post_init__(self):
    if self.dtype not in ("float32", "bfloat16"):
      reason = " (float16 overflows in Qwen2's activations)" if self.dtype == "float16" else ""
      raise ValueError(f"dtype={self.dtype!r}: use 'float32' or 'bfloat16'{reason}")
    if self.remat not in ("none", *_POLICIES):
      raise ValueError(f"remat={self.remat!r}: use 'none', 'dots' or 'full'")
    if self.attention not in IMPLEMENTATIONS:
      raise ValueError(f"attention={self.attention!r}: choose one of {IMPLEMENTATIONS}")

  @property
  def jnp_dtype(self) -> Any:
    return jnp.dtype(self.dtype)


def repeat_layer(layer: type[nn.Module], count: int, compute: ExecutionConfig) -> Any:
  """Returns a factory for `count` layers: one scanned module, or a list of separate ones.

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


def run_layers(layers: Any, x: jax.Array, context: Any, caches: tuple | None = None):
  """Applies what `repeat_layer` made. Returns (x, new caches); caches need separate layers."""
  if not isinstance(layers, (list, tuple)):
    if caches is not None:
      raise ValueError("a KV cache needs per-layer params: set compute.scan=False, unstack_layers")
    x, _ = layers(x, context, None)
    return x, None
  new = []
  for index, layer in enumerate(layers):
    x, cache = layer(x, context, None if caches is None else caches[index])
    new.append(cache)
  return x, (None if caches is None else tuple(new))
