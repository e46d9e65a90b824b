"""Implementations of the operations, and which one runs."""

import functools
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mooer_jax.kernels.arrays import HEADS, axes_to_split

# Implementations and the backends of JAX that they run on.
IMPLEMENTATIONS = {
  "xla": ("cpu", "gpu", "tpu"), "cudnn": ("gpu",), "splash": ("tpu",), "mosaic": ("tpu",),
  "triton": ("gpu",),
}  # fmt: skip
# What "auto" takes where `measurements.json` has no row for the backend and operation.
_UNMEASURED = {"tpu": "mosaic"}


class Call(NamedTuple):
  """What the choice of an implementation depends on; shapes are those of all devices together.

  Attributes:
    operation: "attention", "decode_attention" or "window_attention".
    extras: what the call needs besides: "bias", "dropout".
  """

  operation: str
  dtype: Any
  queries: int
  keys: int
  heads: int
  kv_heads: int
  channels: int  # of a head
  extras: tuple[str, ...] = ()

  @classmethod
  def of(
    cls, operation: str, q: jax.Array, sizes: Mapping[str, int], extras: tuple[str, ...] = ()
  ) -> "Call":
    """The call with these queries and sizes, named T, S, H, K and C."""
    T, S, H, K, C = (sizes[letter] for letter in "TSHKC")
    return cls(operation, q.dtype, T, S, H, K, C, extras)


def choose(
  implementation: str,
  call: Call,
  *,
  platform: str | None = None,
  unsupported: Mapping[str, str] = {},
) -> str:
  """The name of the implementation that runs.

  "auto" is the fastest one of `measurements.json` that supports the call, by the row of the same
  backend, operation, dtype and head size whose numbers of queries and keys are nearest. Where there
  is no such row, it is "mosaic" on TPUs and "xla" elsewhere.

  Args:
    implementation: a name, or "auto".
    call: the call.
    platform: backend that the program is compiled for; default: that of JAX.
    unsupported: {implementation: reason} of those that the operation rules out for this call.

  Raises:
    ValueError: for an unknown name or one that does not support the call.
  """
  if implementation not in ("auto", *IMPLEMENTATIONS):
    raise ValueError(f"attention={implementation!r}: choose one of {['auto', *IMPLEMENTATIONS]}")
  platform = platform or jax.default_backend()
  if platform not in IMPLEMENTATIONS["xla"]:
    raise ValueError(f"platform={platform!r}: use 'cpu', 'gpu' or 'tpu'")
  unsupported = {**_unsupported(call, platform), **unsupported}
  if implementation == "auto":
    names = [*_measured(call, platform), _UNMEASURED.get(platform, "xla"), "xla"]
    return next(name for name in names if name not in unsupported)
  if implementation in unsupported:
    raise ValueError(f"attention={implementation!r} {unsupported[implementation]}")
  return implementation


def _unsupported(call: Call, platform: str) -> dict[str, str]:
  """{implementation: why it does not support a call}."""
  found: dict[str, str] = {}
  if call.dtype != jnp.bfloat16:
    reason = f"runs in bfloat16; got {jnp.dtype(call.dtype)}. Use attention='auto'"
    found |= {"cudnn": reason, "splash": reason}
  if call.channels < 16 or call.channels & (call.channels - 1):
    found["triton"] = (
      f"needs heads of 16, 32, 64 or more channels, a power of 2; got {call.channels}."
      " Use attention='auto'"
    )
  parts = axes_to_split().get(HEADS, 1)
  if call.kv_heads % parts:
    reason = (
      f"splits {call.kv_heads} key-value heads over mesh.tensor={parts}, which must divide them;"
      " lower mesh.tensor or use attention='auto'"
    )
    found |= dict.fromkeys(("splash", "mosaic", "triton"), reason)
  if "bias" in call.extras:
    reason = "does not support a bias on the scores; use attention='auto'"
    found |= {"cudnn": reason, "splash": reason}
  if call.operation != "attention":
    found["splash"] = f"does not support {call.operation}; use attention='auto'"
  if "dropout" in call.extras:
    reason = "does not support dropout; use attention='auto' or dropout=0"
    found |= dict.fromkeys(("cudnn", "splash", "mosaic", "triton"), reason)
  for name, platforms in IMPLEMENTATIONS.items():
    if platform not in platforms:
      where = " and ".join(platforms)
      found[name] = f"runs on {where}; the program is for {platform}. Use attention='auto'"
  return found


def check_backend(implementation: str) -> None:
  """Raises ValueError if an implementation does not run on the default backend of JAX."""
  if implementation == "auto":
    return
  backends, here = IMPLEMENTATIONS[implementation], jax.default_backend()
  if here not in backends:
    raise ValueError(
      f"compute.attention={implementation!r} runs on {' and '.join(backends)}; JAX runs on {here}"
      " here. Set compute.attention='auto'"
    )


def _measured(call: Call, platform: str) -> list[str]:
  """Implementations of the nearest measurement, the fastest first; none without a measurement."""

  def key_of(row):
    return row["platform"], row["operation"], row["dtype"], row["channels"], tuple(row["extras"])

  dtype = jnp.dtype(call.dtype).name
  wanted = platform, call.operation, dtype, call.channels, call.extras
  rows = [row for row in measurements() if key_of(row) == wanted]
  if not rows:
    return []

  def distance(row):
    pairs = (row["queries"], call.queries), (row["keys"], call.keys)
    return sum(abs(math.log(theirs / ours)) for theirs, ours in pairs)

  seconds = min(rows, key=distance)["seconds"]
  return sorted(seconds, key=seconds.__getitem__)


@functools.cache
def measurements() -> list[dict[str, Any]]:
  """Rows of `measurements.json`, which `python -m benchmarks.kernels` writes."""
  text = resources.files(__package__).joinpath("measurements.json").read_text("utf-8")
  return json.loads(text)["rows"]
