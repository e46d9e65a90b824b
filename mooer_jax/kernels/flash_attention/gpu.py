"""Flash attention for NVIDIA GPUs: Pallas kernels that Triton compiles, forward and backward.

The same algorithm as in `tpu.py`. A program holds one tile of queries (or keys) and loops over the
tiles of the other; arrays keep their layout, and masked loads take the place of padding.

Source: FlashAttention-2 (Dao, 2023).
"""

import functools

import jax
import jax.numpy as jnp
from einops import reduce
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def _block(size: int) -> int:
  """Rows of a tile: a power of 2, as Triton wants, from 16 (a product's least) to 64."""
  return min(64, max(16, pl.next_power_of_2(size)))


def _dot(a, b):
  # Float32 stays float32 ("ieee"), where Triton would take TF32.
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


class _Rows:
  """Tile number n of the rows of an array, of which `size` exist."""

  def __init__(self, n, block, size):
    self.index, self.slice = n * block + jnp.arange(block), pl.ds(n * block, block)
    self.exist = self.index < size

  def load(self, ref, where=None):
    """Rows of [size, C] or entries of [size]; 0 where they do not exist or `where` is False."""
    mask = self.exist if where is None else self.exist & where
    if len(ref.shape) == 1:
      return plgpu.load(ref.at[self.slice], mask=mask, other=0)
    return plgpu.load(ref.at[self.slice, :], mask=mask[:, None], other=0)

  def store(self, ref, x):
    if len(ref.shape) == 1:
      plgpu.store(ref.at[self.slice], x, mask=self.exist)
    else:
      plgpu.store(ref.at[self.slice, :], x.astype(ref.dtype), mask=self.exist[:, None])


class _Scores:
  """What the three kernels share: scores of a tile, and which of its pairs are visible."""

  def __init__(self, query_ref, valid_ref, bias_refs, *, scale, causal, queries):
    self.query, self.valid_ref, self.bias_refs = query_ref[0], valid_ref, bias_refs
    self.scale, self.causal, self.queries = scale, causal, queries

  def valid(self, keys):
    return keys.load(self.valid_ref) != 0

  def mask_TS(self, rows, keys, valid_S):
    mask_TS = rows.exist[:, None] & valid_S[None, :]
    if self.causal:
      mask_TS &= keys.index[None, :] <= rows.index[:, None] + self.query
    return mask_TS

  def scores_TS(self, rows, keys, q_TC, k_SC, mask_TS):
    scores_TS = _dot(q_TC, k_SC.T) * self.scale
    if self.bias_refs:
      scores_TS += rows.load(self.bias_refs[0])[:, None] * self.bias_TS(rows, keys, mask_TS)
    return scores_TS

  def places(self, rows, keys):
    return keys.index[None, :] - rows.index[:, None] + self.queries - 1

  def bias_TS(self, rows, keys, mask_TS):
    return plgpu.load(self.bias_refs[1].at[self.places(rows, keys)], mask=mask_TS, other=0)


def _key_tiles(first_ref, end_ref, query_ref, i, *, block_t, block_s, causal):
  end = end_ref[0]
  if causal:
    end = jnp.minimum(end, query_ref[0] + (i + 1) * block_t)
  return jax.lax.div(first_ref[0], block_s), jax.lax.div(end + block_s - 1, block_s)


def _forward_kernel(*refs, scale, causal, block_t, block_s):
  first_ref, end_ref, query_ref, q_ref, k_ref, v_ref, valid_ref = refs[:7]
  bias_refs, (out_ref, lse_ref) = refs[7:-2], refs[-2:]
  i = pl.program_id(0)
  (T, C), S = q_ref.shape, k_ref.shape[0]
  pairs = _Scores(query_ref, valid_ref, bias_refs, scale=scale, causal=causal, queries=T)
  rows = _Rows(i, block_t, T)
  q_TC = rows.load(q_ref)

  def body(j, carry):
    old_T, sum_T, acc_TC = carry
    keys = _Rows(j, block_s, S)
    valid_S = pairs.valid(keys)
    mask_TS = pairs.mask_TS(rows, keys, valid_S)
    scores_TS = pairs.scores_TS(rows, keys, q_TC, keys.load(k_ref, valid_S), mask_TS)
    max_T = jnp.maximum(old_T, jnp.where(mask_TS, scores_TS, _MASKED).max(axis=1))
    weights_TS = jnp.where(mask_TS, jnp.exp(scores_TS - max_T[:, None]), 0.0)
    shrink_T = jnp.exp(old_T - max_T)
    v_SC = keys.load(v_ref, valid_S)
    acc_TC = acc_TC * shrink_T[:, None] + _dot(weights_TS.astype(v_SC.dtype), v_SC)
    return max_T, sum_T * shrink_T + weights_TS.sum(axis=1), acc_TC

  start = (
    jnp.full((block_t,), _MASKED, jnp.float32),
    jnp.zeros((block_t,), jnp.float32),
    jnp.zeros((block_t, C), jnp.float32),
  )
  tiles = _key_tiles(
    first_ref, end_ref, query_ref, i, block_t=block_t, block_s=block_s, causal=causal
  )
  max_T, sum_T, acc_TC = jax.lax.fori_loop(*tiles, body, start)
  has_no_key_T = sum_T == 0  # queries that attend to no key
  sum_T = jnp.where(has_no_key_T, 1.0, sum_T)
  rows.store(out_ref, acc_TC / sum_T[:, None])
  rows.store(lse_ref, jnp.where(has_no_key_T, -_MASKED, max_T + jnp.log(sum_T)))


def _dq_kernel(*refs, scale, causal, block_t, block_s):
  first_ref, end_ref, query_ref, q_ref, k_ref, v_ref, valid_ref = refs[:7]
  (do_ref, lse_ref, delta_ref), bias_refs, dq_ref = refs[7:10], refs[10:-1], refs[-1]
  i = pl.program_id(0)
  (T, C), S = q_ref.shape, k_ref.shape[0]
  pairs = _Scores(query_ref, valid_ref, bias_refs, scale=scale, causal=causal, queries=T)
  rows = _Rows(i, block_t, T)
  q_TC, do_TC, lse_T, delta_T = (rows.load(ref) for ref in (q_ref, do_ref, lse_ref, delta_ref))

  def body(j, dq_TC):
    keys = _Rows(j, block_s, S)
    valid_S = pairs.valid(keys)
    mask_TS = pairs.mask_TS(rows, keys, valid_S)
    k_SC, v_SC = keys.load(k_ref, valid_S), keys.load(v_ref, valid_S)
    scores_TS = pairs.scores_TS(rows, keys, q_TC, k_SC, mask_TS)
    weights_TS = jnp.where(mask_TS, jnp.exp(scores_TS - lse_T[:, None]), 0.0)
    dscores_TS = weights_TS * (_dot(do_TC, v_SC.T) - delta_T[:, None])
    return dq_TC + _dot(dscores_TS.astype(k_SC.dtype), k_SC)

  tiles = _key_tiles(
    first_ref, end_ref, query_ref, i, block_t=block_t, block_s=block_s, causal=causal
  )
  dq_TC = jax.lax.fori_loop(*tiles, body, jnp.zeros((block_t, C), jnp.float32))
  rows.store(dq_ref, dq_TC * scale)


def _dkv_kernel(*refs, scale, causal, block_t, block_s):
  _, _, query_ref, q_ref, k_ref, v_ref, valid_ref, do_ref, lse_ref, delta_ref = refs[:10]
  bias_refs, (dk_ref, dv_ref) = refs[10:-2], refs[-2:]
  j = pl.program_id(0)
  (T, C), S = q_ref.shape, k_ref.shape[0]
  pairs = _Scores(query_ref, valid_ref, bias_refs, scale=scale, causal=causal, queries=T)
  keys = _Rows(j, block_s, S)
  valid_S = pairs.valid(keys)
  k_SC, v_SC = keys.load(k_ref, valid_S), keys.load(v_ref, valid_S)

  def body(i, carry):
    dk_SC, dv_SC = carry
    rows = _Rows(i, block_t, T)
    mask_TS = pairs.mask_TS(rows, keys, valid_S)
    q_TC, do_TC, lse_T, delta_T = (rows.load(ref) for ref in (q_ref, do_ref, lse_ref, delta_ref))
    scores_TS = pairs.scores_TS(rows, keys, q_TC, k_SC, mask_TS)
    weights_TS = jnp.where(mask_TS, jnp.exp(scores_TS - lse_T[:, None]), 0.0)
    dscores_TS = weights_TS * (_dot(do_TC, v_SC.T) - delta_T[:, None])
    dv_SC += _dot(weights_TS.astype(do_TC.dtype).T, do_TC)
    return dk_SC + _dot(dscores_TS.astype(q_TC.dtype).T, q_TC), dv_SC

  first = 0
  if causal:
    first = jax.lax.div(jnp.maximum(j * block_s - query_ref[0], 0), block_t)
  start = jnp.zeros((block_s, C), jnp.float32), jnp.zeros((block_s, C), jnp.float32)
  dk_SC, dv_SC = jax.lax.fori_loop(first, pl.cdiv(T, block_t), body, start)
  keys.store(dk_ref, dk_SC * scale)
  keys.store(dv_ref, dv_SC)


def _call(kernel, name, inputs, outputs, *, over, causal, interpret):
  """Runs a kernel for all tiles of queries or keys (`over`), heads and rows.

  Args:
    kernel: takes refs of the inputs and outputs.
    name: for profiles and compiled programs.
    inputs: pairs of kind and array. The kind is "scalar" [B], "scalar of all" [1], "queries"
      [B, T, H, C], "keys" [B, S, K, C], "valid" [B, S], "row" [B, H, T] or "table" [H, R]; a
      program sees what belongs to its row and head.
    outputs: pairs of kind and dtype; "keys of heads" is [B, S, H, C].
    over: "queries" or "keys".
    causal, interpret: as of `flash_attention`.
  """
  arrays = dict(inputs)  # for the shapes: the last of each kind
  B, T, H, C = arrays["queries"].shape
  S, K = arrays["keys"].shape[1:3]
  blocks = {
    "scalar": ((1,), lambda n, h, b: (b,)),
    "scalar of all": ((1,), lambda n, h, b: (0,)),
    "queries": ((None, T, None, C), lambda n, h, b: (b, 0, h, 0)),
    "keys": ((None, S, None, C), lambda n, h, b: (b, 0, jax.lax.div(h, H // K), 0)),
    "keys of heads": ((None, S, None, C), lambda n, h, b: (b, 0, h, 0)),
    "valid": ((None, S), lambda n, h, b: (b, 0)),
    "row": ((None, None, T), lambda n, h, b: (b, h, 0)),
    "table": ((None, T + S - 1), lambda n, h, b: (h, 0)),
  }
  shapes = {"queries": (B, T, H, C), "keys of heads": (B, S, H, C), "row": (B, H, T)}
  block_t, block_s = _block(T), _block(S)
  tiles = pl.cdiv(T, block_t) if over == "queries" else pl.cdiv(S, block_s)
  return pl.pallas_call(
    functools.partial(kernel, scale=C**-0.5, causal=causal, block_t=block_t, block_s=block_s),
    grid=(tiles, H, B),
    in_specs=[pl.BlockSpec(*blocks[kind]) for kind, _ in inputs],
    out_specs=[pl.BlockSpec(*blocks[kind]) for kind, _ in outputs],
    out_shape=[jax.ShapeDtypeStruct(shapes[kind], dtype) for kind, dtype in outputs],
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name=name,
  )(*(array for _, array in inputs))


def _inputs(q_BTHC, k_BSKC, v_BSKC, bias, keys):
  """Arrays of the kernels with their kinds."""
  inputs = [
    ("scalar", keys.first_B), ("scalar", keys.end_B), ("scalar of all", keys.query_1),
    ("queries", q_BTHC), ("keys", k_BSKC), ("keys", v_BSKC), ("valid", keys.valid_BS),
  ]  # fmt: skip
  if bias is None:
    return inputs, []
  return inputs, [("row", bias.gate_BTH.swapaxes(1, 2)), ("table", bias.table_HR)]


def forward(q_BTHC, k_BSKC, v_BSKC, bias, keys, *, causal, interpret):
  """Returns out [B, T, H, C] and the log-sum-exp of the scores, float32 [B, H, T]."""
  inputs, bias_inputs = _inputs(q_BTHC, k_BSKC, v_BSKC, bias, keys)
  return _call(
    _forward_kernel,
    "flash_attention_forward",
    [*inputs, *bias_inputs],
    [("queries", q_BTHC.dtype), ("row", jnp.float32)],
    over="queries", causal=causal, interpret=interpret,
  )  # fmt: skip


def backward(
  q_BTHC, k_BSKC, v_BSKC, bias, keys, do_BTHC, lse_BHT, delta_BHT, *, causal, interpret
):  # fmt: skip
  """Returns the gradients of q, k and v; delta is the sum of out * do of each query."""
  inputs, bias_inputs = _inputs(q_BTHC, k_BSKC, v_BSKC, bias, keys)
  inputs += [("queries", do_BTHC), ("row", lse_BHT), ("row", delta_BHT), *bias_inputs]
  call = functools.partial(_call, inputs=inputs, causal=causal, interpret=interpret)
  [dq] = call(
    _dq_kernel, "flash_attention_dq", outputs=[("queries", q_BTHC.dtype)], over="queries"
  )  # fmt: skip
  # One for each head of the queries: programs cannot add to the same keys.
  of_heads = "keys of heads", jnp.float32
  dk, dv = call(_dkv_kernel, "flash_attention_dkv", outputs=[of_heads, of_heads], over="keys")
  dk, dv = (
    reduce(x, "B S (K G) C -> B S K C", "sum", K=of.shape[2]).astype(of.dtype)
    for x, of in ((dk, k_BSKC), (dv, v_BSKC))
  )
  return dq, dk, dv
