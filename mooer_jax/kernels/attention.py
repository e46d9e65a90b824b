"""Attention, the same functions for all parts, with several implementations."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mooer_jax.kernels import decode_tpu, window_tpu
from mooer_jax.kernels.flash_attention import Bias, flash_attention

# Implementations and the backends of JAX that they run on.
IMPLEMENTATIONS = {
  "xla": ("cpu", "gpu", "tpu"), "cudnn": ("gpu",), "mosaic": ("tpu",), "triton": ("gpu",)
}  # fmt: skip
# Axes of a mesh that split rows and heads, if it has them.
_ROWS, _HEADS = ("data", "fsdp"), "tensor"


def check_backend(implementation: str) -> None:
  """Raises ValueError if an implementation does not run on the default backend of JAX."""
  backends, here = IMPLEMENTATIONS[implementation], jax.default_backend()
  if here not in backends:
    raise ValueError(
      f"compute.attention={implementation!r} runs on {' and '.join(backends)}; JAX runs on {here}"
      " here. Set compute.attention='xla'"
    )


def precision(dtype: Any) -> jax.lax.Precision:
  """HIGHEST for float32, since GPUs use TF32 and TPUs bfloat16 by default."""
  return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def attention(
  q_BTHC: jax.Array,
  k_BSKC: jax.Array,
  v_BSKC: jax.Array,
  *,
  valid_BS: jax.Array,
  causal: bool = False,
  first_query: jax.Array | int = 0,
  bias: Bias | None = None,
  implementation: str = "xla",
) -> jax.Array:
  """Scaled dot-product attention with grouped key-value heads; softmax in float32.

  Args:
    q_BTHC: queries; H is a multiple of K.
    k_BSKC, v_BSKC: keys and values.
    valid_BS: bool, True for keys that may be attended to.
    causal: mask keys after index `first_query + t` for query t.
    first_query: key index of query 0; with a KV cache, the number of filled slots.
    bias: added to the scaled scores before the softmax.
    implementation: "xla" (any backend), "cudnn" (GPU, bfloat16, no bias), "mosaic" (TPU) or
      "triton" (NVIDIA GPU).

  Returns:
    [B, T, H, C] in q's dtype; zeros for a query without keys.

  Raises:
    ValueError: for an unknown implementation or one that does not support these arguments; for
      shapes or dtypes that do not fit; or if H is not divisible by K, or K by the mesh axis that
      splits the heads of a kernel.
  """
  added = {} if bias is None else {"gate_BTH": bias.gate_BTH, "table_HR": bias.table_HR}
  _check_inputs(q_BTHC=q_BTHC, k_BSKC=k_BSKC, v_BSKC=v_BSKC, valid_BS=valid_BS, **added)
  _check(implementation, q_BTHC.shape[2], k_BSKC.shape[2])
  if implementation in ("mosaic", "triton"):

    def of_device(q, k, v, valid_BS, first_query, bias):
      options = dict(causal=causal, first_query=first_query, bias=bias, backend=implementation)
      return flash_attention(q, k, v, valid_BS=valid_BS, **options)

    heads, table = P(_ROWS, None, _HEADS), P(_HEADS)
    specs = heads, heads, heads, P(_ROWS), P(), bias and Bias(heads, table)  # type: ignore[arg-type]
    first_query = jnp.asarray(first_query, jnp.int32)
    return on_mesh(of_device, specs, heads)(q_BTHC, k_BSKC, v_BSKC, valid_BS, first_query, bias)
  mask_BTS = valid_BS[:, None, :]
  if causal:
    query_T = first_query + jnp.arange(q_BTHC.shape[1])
    mask_BTS = mask_BTS & (jnp.arange(k_BSKC.shape[1])[None] <= query_T[:, None])[None]
  if implementation == "cudnn" and bias is not None:
    raise ValueError("attention='cudnn' does not support a bias on the scores; use attention='xla'")
  return _masked(
    implementation, q_BTHC, k_BSKC, v_BSKC, mask_BTS=mask_BTS, bias_BHTS=bias and bias.expand()
  )


def decode_attention(
  q_BTHC: jax.Array,
  k_BSE: jax.Array,
  v_BSE: jax.Array,
  *,
  kv_heads: int,
  mask_BTS: jax.Array,
  end: jax.Array | int,
  implementation: str = "xla",
) -> jax.Array:
  """Attention of a few new tokens to a KV cache: beams of a prompt, or tokens of a draft.

  Args:
    q_BTHC: queries; T is small.
    k_BSE, v_BSE: the cache, S slots of kv_heads * C channels.
    kv_heads: number of key-value heads; H is a multiple.
    mask_BTS: bool, True where query t may attend to slot s.
    end: number of filled slots; the others are not read by "mosaic", and must be masked.
    implementation: as for `attention`. "triton" has no kernel for this: use "xla".

  Returns and raises: as `attention`.
  """
  sizes = _check_inputs(q_BTHC=q_BTHC, k_BSE=k_BSE, v_BSE=v_BSE, mask_BTS=mask_BTS)
  if sizes["E"] != kv_heads * sizes["C"]:
    raise ValueError(
      f"k_BSE has E={sizes['E']} channels; expected kv_heads * C = {kv_heads} * {sizes['C']}"
    )
  _check(implementation, q_BTHC.shape[2], kv_heads, operation="decoding")
  if implementation == "mosaic":

    def of_device(q, k, v, mask_BTS, end):
      heads = k.shape[-1] // q.shape[-1]
      return decode_tpu.decode_attention(q, k, v, kv_heads=heads, mask_BTS=mask_BTS, end=end)

    heads = P(_ROWS, None, _HEADS)
    end = jnp.asarray(end, jnp.int32)
    in_specs = heads, heads, heads, P(_ROWS), P()
    return on_mesh(of_device, in_specs, heads)(q_BTHC, k_BSE, v_BSE, mask_BTS, end)
  k_BSKC, v_BSKC = (rearrange(x, "B S (K C) -> B S K C", K=kv_heads) for x in (k_BSE, v_BSE))
  return _masked(implementation, q_BTHC, k_BSKC, v_BSKC, mask_BTS=mask_BTS)


def window_attention(
  q_NQHC: jax.Array,
  k_NLHC: jax.Array,
  v_NLHC: jax.Array,
  *,
  weight_scale_NHQL: jax.Array | None = None,
  implementation: str = "xla",
) -> jax.Array:
  """Attention of a few queries to all frames of their window, for many windows.

  Args:
    q_NQHC: queries of N windows, a few each.
    k_NLHC, v_NLHC: keys and values of the frames of each window.
    weight_scale_NHQL: factor of the weights after the softmax, for dropout; only of "xla".
    implementation: as for `attention`; "triton" has no kernel for this.

  Returns and raises: as `attention`.
  """
  scale = {} if weight_scale_NHQL is None else {"weight_scale_NHQL": weight_scale_NHQL}
  _check_inputs(q_NQHC=q_NQHC, k_NLKC=k_NLHC, v_NLKC=v_NLHC, **scale)
  _check(implementation, q_NQHC.shape[2], k_NLHC.shape[2], operation="windows")
  if weight_scale_NHQL is not None and implementation != "xla":
    raise ValueError(
      f"attention={implementation!r} does not support dropout; use attention='xla' or dropout=0"
    )
  if implementation == "mosaic":
    spec = P(_ROWS, None, _HEADS)
    return on_mesh(window_tpu.window_attention, (spec,) * 3, spec)(q_NQHC, k_NLHC, v_NLHC)
  mask_NQL = jnp.ones((*q_NQHC.shape[:2], k_NLHC.shape[1]), bool)
  return _masked(
    implementation, q_NQHC, k_NLHC, v_NLHC, mask_BTS=mask_NQL, weight_scale_BHTS=weight_scale_NHQL
  )


def on_mesh(function, in_specs, out_specs):
  """Runs a function on each device's part of its arguments, which XLA cannot split by itself.

  Without a mesh in the context (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`), or inside of
  `shard_map` and `pmap`, the function is called as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_types)
  names = [n for n, kind in kinds if kind is not AxisType.Manual and mesh.shape[n] > 1]
  if not names:
    return function

  def known(spec):
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in spec]
    return P(*(tuple(name for name in of if name in names) or None for of in axes))

  in_specs, out_specs = jax.tree.map(
    known, (in_specs, out_specs), is_leaf=lambda x: isinstance(x, P)
  )
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _check_inputs(**arrays: jax.Array) -> dict[str, int]:
  """Checks that shapes fit the letters after the `_` of the names; returns the size of each."""
  sizes: dict[str, int] = {}
  for name, x in arrays.items():
    kind, letters = name.rsplit("_", 1)
    if "R" in letters:
      sizes["R"] = sizes["T"] + sizes["S"] - 1
    known = zip(letters, x.shape)
    if x.ndim != len(letters) or any(sizes.get(letter, size) != size for letter, size in known):
      wanted = ", ".join(f"{n}={sizes[n]}" if n in sizes else n for n in letters)
      raise ValueError(f"{name} has shape {x.shape}; expected [{wanted}]")
    sizes |= zip(letters, x.shape)
    dtype = jnp.bool_ if kind in ("valid", "mask") else jnp.floating
    if not jnp.issubdtype(x.dtype, dtype):
      raise ValueError(f"{name} is {x.dtype}; expected {'bool' if dtype is jnp.bool_ else 'float'}")
  return sizes


def _check(implementation: str, heads: int, kv_heads: int, *, operation: str = "") -> None:
  """Checks implementation and heads for an operation: "decoding", "windows" or any attention."""
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention={implementation!r}: choose one of {[*IMPLEMENTATIONS]}")
  if implementation == "triton" and operation:
    raise ValueError(f"attention='triton' has no kernel for {operation}; use attention='xla'")
  if not kv_heads or heads % kv_heads or (operation == "windows" and heads != kv_heads):
    rule = "equal to" if operation == "windows" else "divisible by"
    raise ValueError(f"{heads} query heads must be {rule} {kv_heads} key-value heads")
  parts = dict(jax.sharding.get_abstract_mesh().shape).get(_HEADS, 1)
  if implementation in ("mosaic", "triton") and kv_heads % parts:
    raise ValueError(
      f"attention={implementation!r} splits {kv_heads} key-value heads over mesh.tensor={parts},"
      " which must divide them; lower mesh.tensor or use attention='xla'"
    )


def _masked(
  implementation, q_BTHC, k_BSKC, v_BSKC, *, mask_BTS, bias_BHTS=None, weight_scale_BHTS=None
):
  """Attention by "xla" or "cudnn", which materialize the mask."""
  if implementation == "cudnn":
    return _cudnn(q_BTHC, k_BSKC, v_BSKC, mask_BTS)
  K, C = k_BSKC.shape[2:]
  q_BTKGC = rearrange(q_BTHC * C**-0.5, "B T (K G) C -> B T K G C", K=K)
  scores_BKGTS = jnp.einsum(
    "BTKGC,BSKC->BKGTS",
    q_BTKGC,
    k_BSKC,
    precision=precision(q_BTHC.dtype),
    preferred_element_type=jnp.float32,
  )
  if bias_BHTS is not None:
    scores_BKGTS += rearrange(bias_BHTS, "B (K G) T S -> B K G T S", K=K)
  mask_B11TS = mask_BTS[:, None, None]
  scores_BKGTS = jnp.where(mask_B11TS, scores_BKGTS, jnp.finfo(jnp.float32).min)
  weights_BKGTS = jnp.where(mask_B11TS, jax.nn.softmax(scores_BKGTS, axis=-1), 0.0)
  if weight_scale_BHTS is not None:
    weights_BKGTS *= rearrange(weight_scale_BHTS, "B (K G) T S -> B K G T S", K=K)
  out_BTKGC = jnp.einsum(
    "BKGTS,BSKC->BTKGC",
    weights_BKGTS.astype(v_BSKC.dtype),
    v_BSKC,
    precision=precision(q_BTHC.dtype),
  )
  return rearrange(out_BTKGC, "B T K G C -> B T (K G) C").astype(q_BTHC.dtype)


def _cudnn(q_BTHC, k_BSKC, v_BSKC, mask_BTS):
  if jax.default_backend() != "gpu" or q_BTHC.dtype != jnp.bfloat16:
    raise ValueError(
      f"attention='cudnn' runs on GPUs in bfloat16; here: {jax.default_backend()}, {q_BTHC.dtype}."
      " Use attention='xla'"
    )
  out_BTHC = jax.nn.dot_product_attention(
    q_BTHC, k_BSKC, v_BSKC, mask=mask_BTS[:, None], implementation="cudnn"
  )
  return jnp.where(mask_BTS.any(-1)[..., None, None], out_BTHC, 0)
