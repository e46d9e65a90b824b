"""Share of the FSMN memory in a SAN-M layer.

    python -m benchmarks.sanm_memory --json benchmarks/results/sanm_memory.json

Compiles one layer at the released size (width 512, kernel 11), with and without the memory, in
bfloat16 for 8 clips of 30 s on one TPU v5e, without one; the difference of XLA's counts is the
memory's share. A kernel that fused it with attention could save at most its bytes. Attention is the
Pallas kernel for the bytes and XLA's for the FLOPs: XLA does not count those in a kernel.
"""

import dataclasses
from typing import Any

from benchmarks.chips import topology_devices  # isort: skip  (before jax)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.provenance import run_benchmark, versions
from mooer_jax.encoders.sanm import Memory, SANMConfig, SANMLayer
from mooer_jax.nn.compute import ExecutionConfig

SOURCES = (
  "mooer_jax/encoders/sanm.py", "mooer_jax/kernels/attention", "mooer_jax/nn",
  "benchmarks/sanm_memory.py",
)  # fmt: skip
ROWS, FRAMES = 8, 500
COUNTS = {"bytes": ("mosaic", "bytes accessed"), "flops": ("xla", "flops")}


def compiled(attention: str, *, memory: bool, gradients: bool):
  """The program of a layer for a v5e: its output, or output and all gradients."""
  config = SANMConfig()
  compute = ExecutionConfig(dtype="bfloat16", attention=attention, platform="tpu")
  layer = SANMLayer(config, compute)
  chip = topology_devices("v5e:2x2")[0]
  sharding = NamedSharding(Mesh(np.array([chip]), ("x",)), PartitionSpec())

  def shape(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  x_BTD, valid_BT = shape((ROWS, FRAMES, config.hidden_size)), shape((ROWS, FRAMES), jnp.bool_)
  params = jax.eval_shape(layer.init, jax.random.key(0), x_BTD, valid_BT)
  params = jax.tree.map(lambda x: shape(x.shape), params)

  def without(function, arguments, options, context):
    if isinstance(context.module, Memory):
      return jnp.zeros_like(arguments[0])
    return function(*arguments, **options)

  def output(params, x_BTD, valid_BT):
    if memory:
      return layer.apply(params, x_BTD, valid_BT)[0]
    with nn.intercept_methods(without):
      return layer.apply(params, x_BTD, valid_BT)[0]

  def trained(params, x_BTD, valid_BT, dy_BTD):
    y_BTD, vjp = jax.vjp(lambda params, x_BTD: output(params, x_BTD, valid_BT), params, x_BTD)
    return y_BTD, vjp(dy_BTD)

  if gradients:
    return jax.jit(trained).lower(params, x_BTD, valid_BT, x_BTD).compile()
  return jax.jit(output).lower(params, x_BTD, valid_BT).compile()


def is_in_output_projection(program) -> bool:
  """Whether XLA computes the taps of the memory in the same fusion as the output projection."""
  computations = program.as_text().split("\n}\n")
  return any("/fsmn/mul" in text and "/attention/out/" in text for text in computations)


def measure() -> dict[str, Any]:
  result: dict[str, Any] = {
    "encoder": dataclasses.asdict(SANMConfig()),
    "rows": ROWS,
    "frames": FRAMES,
    "chip": topology_devices("v5e:2x2")[0].device_kind,
  }
  for name, gradients in (("forward", False), ("forward and backward", True)):
    found: dict[str, Any] = {}
    for count, (attention, key) in COUNTS.items():
      whole, without = (
        compiled(attention, memory=memory, gradients=gradients) for memory in (True, False)
      )
      layer, rest = (program.cost_analysis()[key] for program in (whole, without))
      found[count] = {"layer": layer, "memory": layer - rest, "share": (layer - rest) / layer}
      if attention == "mosaic":
        found["fused_with_output_projection"] = is_in_output_projection(whole)
    shares = ", ".join(f"{found[count]['share']:.1%} of its {count}" for count in COUNTS)
    print(f"memory in a layer, {name}: {shares}", flush=True)
    result[name] = found
  return {**result, "versions": versions("jax", "jaxlib", "libtpu", "flax")}


if __name__ == "__main__":
  run_benchmark(__doc__, measure, SOURCES)
