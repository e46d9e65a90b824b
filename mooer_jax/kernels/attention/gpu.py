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

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def _block(size: int) -> int:
  """Rows of a tile: a power of 2, as Triton wants, from 16 (a product's least) to 64."""
  return min(64, max(16, pl.next_power_of_2(size)))


def dot(a, b):
  # Float32 stays float32 ("ieee"), where Triton would take TF32.
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


class _Rows:
  """Tile number n of the rows of queries or keys; of these, only valid ones are loaded."""

  def __init__(self, n, block, size, valid_ref=None):
    self.index, self._slice = n * block + jnp.arange(block), pl.ds(n * block, block)
    self._exist = self.loaded = self.index < size
    if valid_ref is not None:
      self.loaded = self.load(valid_ref) != 0

  def load(self, ref):
    """Rows of [size, C] or entries of [size]; 0 for those that are not loaded."""
    mask = self.loaded if len(ref.shape) == 1 else self.loaded[:, None]
    return plgpu.load(ref.at[self._slice], mask=mask, other=0)

  def store(self, ref, x):
    mask = self._exist if len(ref.shape) == 1 else self._exist[:, None]
    plgpu.store(ref.at[self._slice], x.astype(ref.dtype), mask=mask)


class _Program:
  """One program of a kernel: its arrays, and the tiles of queries and keys."""

  def __init__(self, refs, causal):
    self._refs, self._causal = refs, causal
    (self._T, C), self._S = refs["q"].shape, refs["k"].shape[0]
    self.block_t, self.block_s, self.scale = _block(self._T), _block(self._S), C**-0.5

  def queries(self, i):
    return _Rows(i, self.block_t, self._T)

  def keys(self, j):
    return _Rows(j, self.block_s, self._S, self._refs["valid"])

  def key_tiles(self, i):
    """Range of the tiles of keys that a tile of queries may attend to."""
    end = self._refs["end"][0]
    if self._causal:
      end = jnp.minimum(end, self._refs["query"][0] + (i + 1) * self.block_t)
    first = jax.lax.div(self._refs["first"][0], self.block_s)
    return first, jax.lax.div(end + self.block_s - 1, self.block_s)

  def query_tiles(self, j):
    """Range of the tiles of queries that may attend to a tile of keys."""
    start, stop = j * self.block_s, (j + 1) * self.block_s
    is_valid = (start < self._refs["end"][0]) & (self._refs["first"][0] < stop)
    first = 0
    if self._causal:
      first = jax.lax.div(jnp.maximum(start - self._refs["query"][0], 0), self.block_t)
    return first, jnp.where(is_valid, pl.cdiv(self._T, self.block_t), 0)

  def scores(self, rows, keys, q_TC, k_SC):
    """Scores of a tile, and which of its pairs are visible."""
    mask_TS = rows.loaded[:, None] & keys.loaded[None, :]
    if self._causal:
      mask_TS &= keys.index[None, :] <= rows.index[:, None] + self._refs["query"][0]
    scores_TS = dot(q_TC, k_SC.T) * self.scale
    if "table" in self._refs:
      places_TS = keys.index[None, :] - rows.index[:, None] + self._T - 1
      bias_TS = plgpu.load(self._refs["table"].at[places_TS], mask=mask_TS, other=0)
      scores_TS += rows.load(self._refs["gate"])[:, None] * bias_TS
    return scores_TS, mask_TS

  def weights(self, rows, keys, k_SC, v_SC):
    """Queries of a tile, their gradients, the weights, and the gradients of the scores."""
    q_TC, do_TC, lse_T, delta_T = (rows.load(self._refs[x]) for x in ("q", "do", "lse", "delta"))
    scores_TS, mask_TS = self.scores(rows, keys, q_TC, k_SC)
    weights_TS = jnp.where(mask_TS, jnp.exp(scores_TS - lse_T[:, None]), 0.0)
    return q_TC, do_TC, weights_TS, weights_TS * (dot(do_TC, v_SC.T) - delta_T[:, None])


def _forward_kernel(refs, out, *, causal):
  program, i = _Program(refs, causal), pl.program_id(0)
  rows = program.queries(i)
  q_TC = rows.load(refs["q"])

  def body(j, carry):
    old_T, sum_T, acc_TC = carry
    keys = program.keys(j)
    scores_TS, mask_TS = program.scores(rows, keys, q_TC, keys.load(refs["k"]))
    max_T = jnp.maximum(old_T, jnp.where(mask_TS, scores_TS, MASKED).max(axis=1))
    weights_TS = jnp.where(mask_TS, jnp.exp(scores_TS - max_T[:, None]), 0.0)
    shrink_T = jnp.exp(old_T - max_T)
    v_SC = keys.load(refs["v"])
    acc_TC = acc_TC * shrink_T[:, None] + dot(weights_TS.astype(v_SC.dtype), v_SC)
    return max_T, sum_T * shrink_T + weights_TS.sum(axis=1), acc_TC

  block_t = program.block_t
  start = jnp.full(block_t, MASKED), jnp.zeros(block_t), jnp.zeros(q_TC.shape)
  max_T, sum_T, acc_TC = jax.lax.fori_loop(*program.key_tiles(i), body, start)
  has_no_key_T = sum_T == 0
  sum_T = jnp.where(has_no_key_T, 1.0, sum_T)
  rows.store(out["out"], acc_TC / sum_T[:, None])
  rows.store(out["lse"], jnp.where(has_no_key_T, -MASKED, max_T + jnp.log(sum_T)))


def _dq_kernel(refs, out, *, causal):
  program, i = _Program(refs, causal), pl.program_id(0)
  rows = program.queries(i)

  def body(j, dq_TC):
    keys = program.keys(j)
    k_SC = keys.load(refs["k"])
    *_, dscores_TS = program.weights(rows, keys, k_SC, keys.load(refs["v"]))
    return dq_TC + dot(dscores_TS.astype(k_SC.dtype), k_SC)

  start = jnp.zeros((program.block_t, refs["q"].shape[1]))
  rows.store(out["dq"], jax.lax.fori_loop(*program.key_tiles(i), body, start) * program.scale)


def _dkv_kernel(refs, out, *, causal):
  program, j = _Program(refs, causal), pl.program_id(0)
  keys = program.keys(j)
  k_SC, v_SC = keys.load(refs["k"]), keys.load(refs["v"])

  def body(i, carry):
    dk_SC, dv_SC = carry
    q_TC, do_TC, weights_TS, dscores_TS = program.weights(program.queries(i), keys, k_SC, v_SC)
    dv_SC += dot(weights_TS.astype(do_TC.dtype).T, do_TC)
    return dk_SC + dot(dscores_TS.astype(q_TC.dtype).T, q_TC), dv_SC

  start = jnp.zeros(k_SC.shape), jnp.zeros(v_SC.shape)
  dk_SC, dv_SC = jax.lax.fori_loop(*program.query_tiles(j), body, start)
  keys.store(out["dk"], dk_SC * program.scale)
  keys.store(out["dv"], dv_SC)


def _call(kernel, name, inputs, outputs, *, causal, interpret):
  """Runs a kernel for all tiles of queries (or of keys, if it returns dk), heads and rows.

  The kernel takes dicts of the refs of inputs and outputs, of one row and head. Outputs are given
  by anything with their shape and dtype; dk and dv have the heads of the queries.
  """
  B, T, H, C = inputs["q"].shape
  S, K = inputs["k"].shape[1:3]
  queries = pl.BlockSpec((None, T, None, C), lambda n, h, b: (b, 0, h, 0))
  keys = pl.BlockSpec((None, S, None, C), lambda n, h, b: (b, 0, jax.lax.div(h, H // K), 0))
  keys_of_head = pl.BlockSpec((None, S, None, C), lambda n, h, b: (b, 0, h, 0))
  row = pl.BlockSpec((None, None, T), lambda n, h, b: (b, h, 0))
  scalar = pl.BlockSpec((1,), lambda n, h, b: (b,))
  specs = {
    "first": scalar, "end": scalar, "query": pl.BlockSpec((1,), lambda n, h, b: (0,)),
    "valid": pl.BlockSpec((None, S), lambda n, h, b: (b, 0)),
    "q": queries, "do": queries, "out": queries, "dq": queries,
    "k": keys, "v": keys, "dk": keys_of_head, "dv": keys_of_head,
    "lse": row, "delta": row, "gate": row,
    "table": pl.BlockSpec((None, T + S - 1), lambda n, h, b: (h, 0)),
  }  # fmt: skip
  tiles = pl.cdiv(S, _block(S)) if "dk" in outputs else pl.cdiv(T, _block(T))
  return pl.pallas_call(
    functools.partial(kernel, causal=causal),
    grid=(tiles, H, B),
    in_specs=[{x: specs[x] for x in inputs}],
    out_specs={x: specs[x] for x in outputs},
    out_shape={x: jax.ShapeDtypeStruct(y.shape, y.dtype) for x, y in outputs.items()},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name=name,
  )(inputs)


def _inputs(q_BTHC, k_BSKC, v_BSKC, bias, keys):
  inputs = {"q": q_BTHC, "k": k_BSKC, "v": v_BSKC, "valid": keys.valid_BS}
  inputs |= {"first": keys.first_B, "end": keys.end_B, "query": keys.query_1}
  if bias is not None:
    inputs |= {"gate": bias.gate_BTH.swapaxes(1, 2), "table": bias.table_HR}
  return inputs


def forward(q_BTHC, k_BSKC, v_BSKC, bias, keys, *, causal, interpret):
  """Returns out [B, T, H, C] and the log-sum-exp of the scores, float32 [B, H, T]."""
  B, T, H, _ = q_BTHC.shape
  inputs = _inputs(q_BTHC, k_BSKC, v_BSKC, bias, keys)
  outputs = {"out": q_BTHC, "lse": jax.ShapeDtypeStruct((B, H, T), jnp.float32)}
  outputs = _call(
    _forward_kernel, "flash_attention_forward", inputs, outputs, causal=causal, interpret=interpret
  )
  return outputs["out"], outputs["lse"]


def backward(
  q_BTHC, k_BSKC, v_BSKC, bias, keys, do_BTHC, lse_BHT, delta_BHT, *, causal, interpret
):  # fmt: skip
  """Returns the gradients of q, k and v; delta is the sum of out * do of each query."""
  inputs = _inputs(q_BTHC, k_BSKC, v_BSKC, bias, keys)
  inputs |= {"do": do_BTHC, "lse": lse_BHT, "delta": delta_BHT}
  call = functools.partial(_call, inputs=inputs, causal=causal, interpret=interpret)
  dq = call(_dq_kernel, "flash_attention_dq", outputs={"dq": q_BTHC})["dq"]
  # One for each head of the queries: programs cannot add to the same keys.
  B, S, K, C = k_BSKC.shape
  of_heads = jax.ShapeDtypeStruct((B, S, q_BTHC.shape[2], C), jnp.float32)
  dkv = call(_dkv_kernel, "flash_attention_dkv", outputs={"dk": of_heads, "dv": of_heads})
  dk, dv = (reduce(dkv[x], "B S (K G) C -> B S K C", "sum", K=K) for x in ("dk", "dv"))
  return dq, dk.astype(k_BSKC.dtype), dv.astype(v_BSKC.dtype)
