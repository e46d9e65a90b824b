"""Times of the implementations of each operation on this device, at the shapes of released models.

    python -m benchmarks.kernels --write     # updates mooer_jax/kernels/measurements.json

`compute.attention="auto"` follows that file. Attention and windows are timed with their gradients,
as in training, decoding without. A time is the median over rounds of calls that wait once a round.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.provenance import ROOT, versions, write_result
from mooer_jax import kernels
from mooer_jax.kernels import choice
from mooer_jax.kernels.attention import Bias

PATH = ROOT / "mooer_jax" / "kernels" / "measurements.json"
SOURCES = ("mooer_jax/kernels/attention", "mooer_jax/kernels/decode_attention",
           "mooer_jax/kernels/window_attention", "benchmarks/kernels.py")  # fmt: skip
_CALLS, _ROUNDS = 10, 5


@dataclasses.dataclass(frozen=True)
class Spec:
  """Arguments of an operation: B rows (or windows) of T queries and S keys; see `choice.Call`."""

  operation: str
  rows: int
  queries: int
  keys: int
  heads: int
  kv_heads: int
  channels: int
  dtype: str = "bfloat16"
  causal: bool = False
  bias: bool = False

  @property
  def call(self) -> choice.Call:
    names = ("queries", "keys", "heads", "kv_heads", "channels")
    extras = ("bias",) if self.bias else ()
    sizes = (getattr(self, name) for name in names)
    return choice.Call(self.operation, jnp.dtype(self.dtype), *sizes, extras)

  @property
  def gflop(self) -> float:
    """Of the products: 2 forward and 5 backward; half of the pairs if causal."""
    products = 2 if self.operation == "decode_attention" else 7
    pairs = self.rows * self.heads * self.queries * self.keys * (0.5 if self.causal else 1)
    return 2 * products * pairs * self.channels / 1e9

  @property
  def cache_gb(self) -> float:
    """Keys and values, which each call must read at least once."""
    size = jnp.dtype(self.dtype).itemsize
    return 2 * self.rows * self.keys * self.kv_heads * self.channels * size / 1e9

  def shapes(self) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the arguments of `function`."""
    B, T, S, H, K, C = (
      self.rows, self.queries, self.keys, self.heads, self.kv_heads, self.channels
    )  # fmt: skip
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(self.dtype))
    if self.operation == "decode_attention":
      cache = of((B, S, K * C))
      mask, end = jax.ShapeDtypeStruct((B, T, S), bool), jax.ShapeDtypeStruct((), jnp.int32)
      return [of((B, T, H, C)), cache, cache, mask, end]
    qkv = [of((B, T, H, C)), of((B, S, K, C)), of((B, S, K, C))]
    if self.operation == "window_attention":
      return qkv
    valid = jax.ShapeDtypeStruct((B, S), bool)
    bias = [
      jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, H), (H, T + S - 1)) if self.bias
    ]
    return [*qkv, valid, *bias]

  def function(self, implementation: str, platform: str | None = None):
    """The operation, for arguments of `shapes`; with its gradients, unless it decodes."""
    chosen = dict(implementation=implementation, platform=platform)
    if self.operation == "decode_attention":

      def attend(q, k, v, mask, end):
        return kernels.decode_attention(
          q, k, v, kv_heads=self.kv_heads, mask_BTS=mask, end=end, **chosen
        )

      return attend

    def loss(q, k, v, valid=None, *bias):
      if self.operation == "window_attention":
        out = kernels.window_attention(q, k, v, **chosen)
      else:
        options = dict(causal=self.causal, bias=Bias(*bias) if bias else None)
        out = kernels.attention(q, k, v, valid_BS=valid, **options, **chosen)
      return out.astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1, 2, 4, 5) if self.bias else (0, 1, 2))


# Clips of 30 s: encoders, training of LLMs, their beams, and the windows of SALMONN's Q-Former.
SPECS = {
  "sanm": Spec("attention", 8, 500, 500, 4, 4, 128),
  "whisper": Spec("attention", 4, 1500, 1500, 20, 20, 64),
  "beats": Spec("attention", 4, 1496, 1496, 12, 12, 64, bias=True),
  "qwen2_7b": Spec("attention", 8, 620, 620, 28, 4, 128, causal=True),
  "qwen2_0.5b": Spec("attention", 1, 187, 187, 14, 2, 64, "float32", causal=True),
  "decode qwen2_7b": Spec("decode_attention", 16, 4, 1500, 28, 4, 128),
  "decode qwen2_7b, one clip": Spec("decode_attention", 1, 1, 700, 28, 4, 128),
  "decode qwen2_0.5b": Spec("decode_attention", 4, 1, 333, 14, 2, 64),
  "decode vicuna_13b": Spec("decode_attention", 4, 4, 700, 40, 40, 128),
  "windows": Spec("window_attention", 704, 1, 17, 12, 12, 64),
  "windows of 4 queries": Spec("window_attention", 88, 4, 17, 12, 12, 64, "float32"),
}


def arguments(spec: Spec) -> list[jax.Array]:
  """Random arguments; all keys are valid and all slots filled."""
  rng = np.random.default_rng(0)

  def draw(x):
    if x.dtype == jnp.bool_:
      return jnp.ones(x.shape, bool)
    if not x.shape:
      return jnp.int32(spec.keys)
    return jnp.asarray(rng.normal(size=x.shape), x.dtype)

  return [draw(x) for x in spec.shapes()]


def seconds_of(spec: Spec, implementation: str) -> float:
  function, given = jax.jit(spec.function(implementation)), arguments(spec)
  jax.block_until_ready(function(*given))  # compiles
  times = []
  for _ in range(_ROUNDS):
    start = time.perf_counter()
    jax.block_until_ready([function(*given) for _ in range(_CALLS)])
    times.append((time.perf_counter() - start) / _CALLS)
  return statistics.median(times)


def measure(spec: Spec) -> dict[str, Any]:
  """A row of measurements.json: the seconds of each implementation that runs on this device."""
  platform = jax.default_backend()
  seconds, refused = {}, {}
  for name, platforms in choice.IMPLEMENTATIONS.items():
    if platform not in platforms:
      continue
    try:
      seconds[name] = seconds_of(spec, name)
    except Exception as error:  # of a compiler, too: the row says so, and "auto" avoids it
      refused[name] = str(error).strip().splitlines()[0][:200]
  return {
    **spec.call._replace(dtype=spec.dtype)._asdict(),
    "rows": spec.rows,
    "causal": spec.causal,
    "platform": platform,
    "device": jax.devices()[0].device_kind,
    "seconds": seconds,
    "refused": refused,
    "gflop": round(spec.gflop, 3),
    "cache_gb": round(spec.cache_gb, 6),
  }


def merged(old: list[dict], new: list[dict]) -> list[dict]:
  """New rows, and those old ones that they do not replace."""

  def key(row):
    return [row[x] for x in ("device", *choice.Call._fields, "rows", "causal")]

  replaced = [key(row) for row in new]
  return [row for row in old if key(row) not in replaced] + new


def show(name: str, row: dict[str, Any]) -> None:
  for implementation, seconds in sorted(row["seconds"].items(), key=lambda item: item[1]):
    rates = f"{row['gflop'] / seconds / 1e3:8.2f} TFLOP/s {row['cache_gb'] / seconds:8.1f} GB/s"
    print(f"{name:26} {implementation:8} {seconds * 1e3:9.3f} ms {rates}")
  for implementation, reason in row["refused"].items():
    print(f"{name:26} {implementation:8} {reason}")


def run(dry_run: bool) -> dict[str, Any]:
  """Section of `gpu_suite`: all rows; with dry_run, of one spec."""
  names = ["decode qwen2_0.5b"] if dry_run else SPECS
  rows = {name: measure(SPECS[name]) for name in names}
  for name, row in rows.items():
    show(name, row)
  failed = {name: row["refused"] for name, row in rows.items() if "xla" in row["refused"]}
  return {"device": jax.devices()[0].device_kind, "rows": [*rows.values()], "passed": not failed}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--only", nargs="+", choices=SPECS, default=SPECS, help="shapes to time")
  parser.add_argument("--write", action="store_true", help=f"update {PATH.relative_to(ROOT)}")
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  if args.write and jax.default_backend() == "cpu":
    parser.error("--write needs an accelerator: on CPUs there is only 'xla' to choose")
  rows = []
  for name in args.only:
    rows.append(measure(SPECS[name]))
    show(name, rows[-1])
  result = {"rows": rows, "versions": versions("jax", "jaxlib")}
  write_result(args.json, result, SOURCES)
  if args.write:
    old = json.loads(PATH.read_text("utf-8"))["rows"]
    write_result(PATH, {**result, "rows": merged(old, rows)}, SOURCES)


if __name__ == "__main__":
  main()
